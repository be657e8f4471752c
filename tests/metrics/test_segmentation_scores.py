import warnings

import numpy as np
import pytest
import torch

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError, DataError
from vispeft.metrics import SegmentationScores


def batches(classes=6, count=4, seed=0):
    """Random batches in which the last class but one is never labelled, and the last one neither labelled nor given."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = (2, int(rng.integers(5, 30)), int(rng.integers(5, 30)))
        masks = rng.integers(0, classes - 2, size)
        masks[rng.random(size) < 0.2] = IGNORE
        right = rng.random(size) < 0.5
        predictions = np.where(right & (masks != IGNORE), masks, rng.integers(0, classes - 1, size))
        yield predictions, masks


def areas(pairs, classes):
    """Count intersection, prediction and label per class, image by image, as mmsegmentation does."""
    totals = np.zeros((3, classes), dtype=np.int64)
    for predictions, masks in pairs:
        for predicted, label in zip(predictions, masks, strict=True):
            valid = label != IGNORE
            p, y = predicted[valid], label[valid]
            totals += np.array([[np.sum(v == c) for c in range(classes)] for v in (y[p == y], p, y)])
    return totals


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_scores_equal_the_formula_with_ignored_pixels_and_absent_classes(seed, absent):
    pairs = list(batches(seed=seed))
    metric = SegmentationScores(6, absent=absent)
    for predictions, masks in pairs:
        metric.update(torch.from_numpy(predictions), torch.from_numpy(masks))
    both, predicted, label = areas(pairs, 6)
    with np.errstate(invalid="ignore"):
        each = {"iou": both / (predicted + label - both), "acc": both / label, "dice": 2 * both / (predicted + label)}
    assert np.isnan(each["iou"]).tolist() == [False] * 5 + [True]
    assert np.isnan(each["acc"]).tolist() == [False] * 4 + [True] * 2
    found = metric.compute()
    for name, values in each.items():
        np.testing.assert_allclose(metric.per_class()[name].numpy(), values, atol=1e-6)
        mean = np.nanmean(values) if absent == "skip" else np.nan_to_num(values).mean()
        assert found[f"m{name}"].item() == pytest.approx(mean, abs=1e-6)
    assert found["aacc"].item() == pytest.approx(both.sum() / label.sum(), abs=1e-6)


def test_mean_iou_equals_mmsegmentations_from_its_unrounded_areas():
    pytest.importorskip("mmseg")
    from mmseg.evaluation import IoUMetric

    pairs = [[torch.from_numpy(values) for values in pair] for pair in batches(seed=5)]
    metric = SegmentationScores(6)
    totals = torch.zeros(4, 6)
    for predictions, masks in pairs:
        metric.update(predictions, masks)
        for predicted, label in zip(predictions, masks, strict=True):
            totals += torch.stack(IoUMetric.intersect_and_union(predicted, label, 6, IGNORE))
    theirs = IoUMetric.total_area_to_metrics(*totals, metrics=["mIoU", "mDice"])
    found = metric.compute()
    for ours, name in (("miou", "IoU"), ("macc", "Acc"), ("mdice", "Dice"), ("aacc", "aAcc")):
        assert found[ours].item() == pytest.approx(np.nanmean(theirs[name]), abs=1e-6)


def test_scores_are_taken_as_classes_and_bands_of_an_image_as_its_parts():
    scores, masks = torch.randn(2, 4, 8, 6), torch.randint(4, (2, 8, 6))
    whole, bands = SegmentationScores(4), SegmentationScores(4)
    whole.update(scores, masks)
    for rows in (slice(0, 3), slice(3, 8)):
        bands.update(scores.argmax(1)[:, rows], masks[:, rows])
    assert torch.equal(whole.confusion, bands.confusion)
    assert whole.confusion.sum() == masks.numel()


def test_counts_beyond_float32_stay_exact():
    metric = SegmentationScores(2)
    metric.confusion = torch.tensor([[2**40 + 1, 1], [0, 2**24 + 1]])
    right, union = 2**24 + 1, 2**24 + 2
    assert metric.per_class()["iou"][1].item() == pytest.approx(right / union, abs=1e-7)


def test_nothing_measured_is_not_a_number_under_skip_and_zero_under_zero():
    for absent, expected in (("skip", True), ("zero", False)):
        metric = SegmentationScores(3, absent=absent)
        metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), IGNORE))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = metric.compute()
        assert all(value.isnan().item() is expected for value in values.values())
        assert sorted(values) == ["aacc", "macc", "mdice", "miou"]


def test_what_cannot_be_compared_is_refused():
    metric = SegmentationScores(3)
    zeros = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(DataError, match="resize the scores"):
        metric.update(torch.zeros(1, 3, 2, 2), zeros)
    with pytest.raises(DataError, match="Masks hold values from 0 to 3"):
        metric.update(zeros, torch.arange(16).reshape(1, 4, 4) % 4)
    with pytest.raises(DataError, match="Predictions hold"):
        metric.update(zeros + 3, zeros)
    assert not metric.confusion.any()
    for settings in ({"num_classes": 256}, {"num_classes": 0}, {"num_classes": 3, "absent": "drop"}):
        with pytest.raises(ConfigError):
            SegmentationScores(**settings)
