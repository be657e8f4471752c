"""Masks from whole images, windows and augmented views, against a plain average of everything that is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.errors import ConfigError, DataError
from vispeft.tasks import Inference, predict_masks
from vispeft.tasks.inference import padded_to


def scores(images: Tensor) -> Tensor:
    """Scores that depend on the place in what is seen, and on the image."""
    height, width = images.shape[-2:]
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    planes = [images[:, 0] + rows, images[:, 1] - columns * rows, images[:, 2] * columns]
    return torch.stack(planes, 1)


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def starts(side: int, window: int, stride: int) -> list[int]:
    """As mmsegmentation's slide_inference has them."""
    grids = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride + window, side) - window, 0) for index in range(grids)]


def mean_of_windows(x: Tensor, window: int, stride: int) -> Tensor:
    """The scores as mmsegmentation averages them, all at once."""
    height, width = x.shape[-2:]
    total, counts = torch.zeros(2, 3, height, width), torch.zeros(height, width)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            place = (slice(top, top + window), slice(left, left + window))
            total[(..., *place)] += scores(x[(..., *place)])
            counts[place] += 1
    assert counts.min() >= 1
    return total / counts


@pytest.mark.parametrize(("height", "width"), [(8, 8), (21, 13), (30, 8), (19, 40)])
@pytest.mark.parametrize(("window", "stride"), [(8, 5), (8, 8), (8, 1), (7, 3)])
def test_windows_are_averaged_where_they_overlap(height: int, width: int, window: int, stride: int) -> None:
    x, mean = images(height, width), mean_of_windows(images(height, width), window, stride)
    slide = Inference(mode="slide", window=window, stride=stride)
    assert torch.equal(predict_masks(scores, x, slide), mean.argmax(1))
    # Scores are resized before they are compared, band by band as if they were there as a whole.
    for size in ((2 * height, 3 * width), (height // 2, width + 5), (150, width)):
        resized = F.interpolate(mean, size, mode="bilinear", align_corners=False)
        first, second = resized.topk(2, dim=1).values.unbind(1)
        agrees = predict_masks(scores, x, slide, size) == resized.argmax(1)
        assert (agrees | (first - second < 1e-5)).all()
        assert agrees.float().mean() > 0.99


@pytest.mark.parametrize("columns", [8, 11, 20])
def test_wide_images_are_predicted_in_slabs_with_equal_masks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    x, slide, sizes = images(19, 40), Inference(mode="slide", window=8, stride=5), []
    mean = mean_of_windows(x, 8, 5)
    monkeypatch.setattr("vispeft.tasks.inference.BAND", 3 * 8 * 4 * columns)
    new_zeros = Tensor.new_zeros

    def watched(tensor: Tensor, *shape: Any) -> Tensor:
        sizes.append(shape[-1])
        return new_zeros(tensor, *shape)

    monkeypatch.setattr(Tensor, "new_zeros", watched)
    assert torch.equal(predict_masks(scores, x, slide), mean.argmax(1))
    for size in ((30, 77), (7, 13), (5, 3)):
        resized = F.interpolate(mean, size, mode="bilinear", align_corners=False)
        first, second = resized.topk(2, dim=1).values.unbind(1)
        agrees = predict_masks(scores, x, slide, size) == resized.argmax(1)
        assert (agrees | (first - second < 1e-5)).all(), size
    assert len(sizes) > 4
    assert max(sizes) <= columns + 40 // 3  # a slab of a small mask needs the columns between two of its own


def test_scores_of_whole_images_are_resized_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, largest = images(12, 10), []
    expected = F.interpolate(scores(x), (90, 70), mode="bilinear").argmax(1)
    monkeypatch.setattr("vispeft.tasks.inference.CHUNK", 2 * 3 * 70 * 4 * 5)
    argmax = Tensor.argmax

    def watched(tensor: Tensor, *given: Any) -> Tensor:
        largest.append(tensor.numel())
        return argmax(tensor, *given)

    monkeypatch.setattr(Tensor, "argmax", watched)
    assert torch.equal(predict_masks(scores, x, Inference(), (90, 70)), expected)
    assert len(largest) == 18
    assert max(largest) == 2 * 3 * 5 * 70


def test_no_more_than_one_row_of_windows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = images(64, 24), []
    new_zeros = Tensor.new_zeros

    def watched(tensor: Tensor, *shape: Any) -> Tensor:
        sizes.append(shape)
        return new_zeros(tensor, *shape)

    monkeypatch.setattr(Tensor, "new_zeros", watched)
    predict_masks(scores, x, Inference(mode="slide", window=8, stride=6))
    assert sizes == [(2, 3, 8, 24)]


def test_views_are_averaged_as_probabilities() -> None:
    x = images(10, 12)
    expected = torch.zeros(2, 3, 10, 12)
    for size in ((10, 12), (15, 18)):
        seen = x if size == (10, 12) else F.interpolate(x, size, mode="bilinear")
        for view in (lambda t: t, lambda t: t.flip(-1)):
            found = view(scores(view(seen)))
            expected += F.interpolate(found, (10, 12), mode="bilinear").softmax(1)
    found = predict_masks(scores, x, Inference(flip=True, scales=(1.0, 1.5)))
    assert torch.equal(found, expected.argmax(1))


def test_masks_of_another_size() -> None:
    x = images(8, 8)
    found = predict_masks(scores, x, Inference(), (20, 11))
    assert torch.equal(found, F.interpolate(scores(x), (20, 11), mode="bilinear").argmax(1))


def test_wrong_settings_and_small_images() -> None:
    for wrong in ({"mode": "tiles"}, {"window": 8, "stride": 9}, {"stride": 0}, {"scales": ()}, {"scales": (0.5, 0)}):
        with pytest.raises(ConfigError):
            Inference(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"7 x 30 .* window has 8"):
        predict_masks(scores, images(7, 30), Inference(mode="slide", window=8, stride=4))


def test_padding_stands_below_and_beside() -> None:
    x = images(5, 8)
    padded = padded_to(x, 4)
    assert padded.shape[-2:] == (8, 8)
    assert torch.equal(padded[..., :5, :], x)
    assert not padded[..., 5:, :].any()
    assert padded_to(x[..., :4, :], 4).data_ptr() == x.data_ptr()
