import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.data.thinning import thin
from vispeft.errors import ConfigError
from vispeft.metrics import Edges

EDGE = DenseTarget(kind="edge")


def logits(probabilities):
    return torch.as_tensor(probabilities).double().clamp(1e-6, 1 - 1e-6).logit()


def squares(images=3, size=32, seed=0):
    """Outlines of squares, and probabilities that are wide, noisy and shifted."""
    rng = np.random.default_rng(seed)
    labels, found = np.zeros((2, images, 1, size, size), np.float32)
    for label, p in zip(labels[:, 0], found[:, 0], strict=True):
        for _ in range(3):
            y, x, side = rng.integers(2, 14, 3)
            for array, offset in ((label, 0), (p, rng.integers(0, 3))):
                rows, columns = slice(y + offset, y + offset + side + 1), slice(x + offset, x + offset + side + 1)
                array[rows.start, columns] = array[rows.stop - 1, columns] = 1
                array[rows, columns.start] = array[rows, columns.stop - 1] = 1
    wide = torch.nn.functional.avg_pool2d(torch.from_numpy(found), 3, 1, 1) * 1.8
    noise = torch.from_numpy(rng.random(found.shape)).float()
    return (wide + 0.4 * noise**4).clamp(0, 1), torch.from_numpy(labels)


def by_distances(probabilities, labels, tolerance):
    """Compute F1 at each threshold of a whole split, from exact distances."""
    figures = []
    for threshold in np.arange(1, 20) / 20:
        right = predicted = met = labelled = 0
        for p, label in zip(probabilities[:, 0], labels[:, 0], strict=True):
            known = (label != IGNORE).numpy()
            y = (label == 1).numpy()
            found = thin((logits(p).float().sigmoid() > threshold)[None] & torch.from_numpy(known))[0].numpy()
            radius = max(1.0, tolerance * math.hypot(*y.shape))
            right += (distance_transform_edt(~y)[found] <= radius).sum() if y.any() else 0
            met += (distance_transform_edt(~found)[y] <= radius).sum() if found.any() else 0
            predicted, labelled = predicted + found.sum(), labelled + y.sum()
        precision, recall = right / max(1, predicted), met / labelled
        figures.append(2 * precision * recall / (precision + recall) if right else 0)
    return np.array(figures)


@pytest.mark.parametrize("tolerance", [0.0075, 0.03])
def test_equals_the_definition_by_exact_distances(tolerance):
    probabilities, labels = squares()
    labels[:, :, 20:22] = IGNORE
    metric = Edges(EDGE, "coast", tolerance=tolerance)
    for some in (slice(0, 2), slice(2, 3)):
        metric.update(logits(probabilities)[some], labels[some])
    expected = by_distances(probabilities, labels, tolerance)
    found = metric.compute()
    assert 0.2 < expected.max() < 0.99
    assert found["odsf"].item() == pytest.approx(expected.max(), abs=1e-6)
    assert found["threshold"].item() == pytest.approx((expected.argmax() + 1) / 20)


def test_the_threshold_is_that_of_the_whole_split_not_of_each_image():
    labels = torch.zeros(2, 1, 20, 20)
    labels[:, :, 10] = 1
    probabilities = 0.32 * labels
    probabilities[1] = 0.92 * labels[1] + 0.6 * (torch.arange(20) == 3).float()[:, None]
    metric = Edges(EDGE, "coast")
    metric.update(logits(probabilities), labels)
    # Up to 0.3 both lines are found, and a false one: 40 of 60 right. From 0.6 on one line, and nothing false.
    assert metric.compute()["odsf"].item() == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    alone = Edges(EDGE, "coast")
    alone.update(logits(probabilities[1:]), labels[1:])
    assert alone.compute()["odsf"].item() == 1
    assert alone.compute()["threshold"].item() == pytest.approx(0.6, abs=1e-6)


def test_a_wide_band_scores_as_its_middle_line():
    label = torch.zeros(1, 1, 60, 80)  # diagonal 100: three pixels of tolerance
    label[..., 40] = 1
    for middle, expected in ((40, 1.0), (43, 1.0), (44, 0.0)):
        band = torch.zeros_like(label)
        band[..., middle - 4 : middle + 5] = 0.99
        metric = Edges(EDGE, "coast", tolerance=0.03)
        metric.update(logits(band), label)
        # Thinning shortens the band at both ends, by half of its width, so some of the label's 60 pixels stay unmet.
        assert metric.compute()["odsf"].item() == pytest.approx(expected, abs=0.1)


def test_edges_predicted_where_none_is_labelled_cost_precision():
    labels = torch.zeros(2, 1, 20, 20)
    labels[0, 0, 10] = 1
    metric = Edges(EDGE, "coast")
    metric.update(logits(labels[[0, 0]]), labels)
    precision = 0.5
    assert metric.compute()["odsf"].item() == pytest.approx(2 * precision / (precision + 1))


def test_a_tolerance_that_cannot_be_is_refused():
    for tolerance in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="tolerance"):
            Edges(EDGE, "coast", tolerance=tolerance)
