import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError
from vispeft.metrics import BoundaryF


def blobs(rng, size, classes):
    """Random regions of a few pixels."""
    small = rng.integers(0, classes, (size[0] // 5 + 1, size[1] // 5 + 1))
    return small.repeat(5, 0).repeat(5, 1)[: size[0], : size[1]]


def contour(classes, valid, c):
    """Walk over all pixels and their neighbours."""
    found = np.zeros(classes.shape, bool)
    for y, x in np.argwhere(valid & (classes == c)):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= v < classes.shape[0] and 0 <= u < classes.shape[1]
            found[y, x] |= inside and valid[v, u] and classes[v, u] != c
    return found


def boundary_f(predicted, label, c, radius):
    """Compute F1 of one class in one image, from exact distances; None where no contour is."""
    valid = label != IGNORE
    ours, theirs = contour(predicted, valid, c), contour(label, valid, c)
    if not ours.any() and not theirs.any():
        return None
    if not ours.any() or not theirs.any():
        return 0.0
    precision = (distance_transform_edt(~theirs)[ours] <= radius).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.08])
@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_equals_the_definition_by_exact_distances(tolerance, absent):
    rng, classes = np.random.default_rng(0), 5
    metric, each = BoundaryF(classes, tolerance=tolerance, absent=absent), [[] for _ in range(classes)]
    for size in ((30, 41), (25, 25), (7, 33)):
        label = np.stack([blobs(rng, size, classes - 2) for _ in range(2)])
        predicted = np.where(rng.random(label.shape) < 0.02, classes - 2, np.roll(label, 1, axis=2))
        label[rng.random(label.shape) < 0.03] = IGNORE
        metric.update(torch.from_numpy(predicted), torch.from_numpy(label))
        radius = max(1.0, tolerance * math.hypot(*size))
        for p, y in zip(predicted, label, strict=True):
            for c in range(classes):
                value = boundary_f(p, y, c, radius)
                each[c] += [] if value is None else [value]
    expected = np.array([np.mean(values) if values else np.nan for values in each])
    assert expected[-2] == 0
    assert np.isnan(expected[-1])
    np.testing.assert_allclose(metric.per_class().numpy(), expected, atol=1e-6)
    mean = np.nanmean(expected) if absent == "skip" else np.nan_to_num(expected).mean()
    assert metric.compute().item() == pytest.approx(mean, abs=1e-6)


def test_a_shift_within_the_tolerance_costs_nothing_and_one_beyond_it_everything():
    label = torch.zeros(1, 60, 80, dtype=torch.long)  # diagonal 100
    label[:, :, 40:] = 1
    for shift, expected in ((3, 1.0), (4, 0.0)):
        predicted = torch.zeros_like(label)
        predicted[:, :, 40 + shift :] = 1
        metric = BoundaryF(2, tolerance=0.03)
        metric.update(predicted, label)
        assert metric.compute().item() == expected


def test_one_label_for_all_pixels_has_no_contour():
    label = torch.ones(1, 8, 8, dtype=torch.long)
    for absent, expected in (("skip", math.nan), ("zero", 0.0)):
        metric = BoundaryF(2, absent=absent)
        metric.update(label, label)
        assert metric.compute().item() == pytest.approx(expected, nan_ok=True)


def test_pixels_without_a_label_neither_are_contours_nor_make_them():
    label = torch.zeros(1, 12, 12, dtype=torch.long)
    label[:, :, 6:] = 1
    label[:, :, 5:7] = IGNORE  # a void band along the whole contour, as VOC draws it
    metric = BoundaryF(2)
    metric.update(label.clamp_max(1), label)
    assert metric.images.tolist() == [0, 0]


def test_a_tolerance_that_cannot_be_is_refused():
    for tolerance in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="tolerance"):
            BoundaryF(2, tolerance=tolerance)
