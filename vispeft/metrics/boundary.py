"""Boundary F1: how well predicted contours match the labelled ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError
from vispeft.metrics.segmentation import Absent, check_rule, class_maps, mean_over_classes

__all__ = ["BoundaryF"]

NONE = IGNORE
"""Value of pixels on no contour, in maps of contour classes."""


class BoundaryF(Metric):
    """Mean boundary F1 of the classes (Csurka et al., BMVC 2013; the contour measure of DAVIS, CVPR 2016).

    A pixel lies on the contour of its class if one of its four neighbours has another class. Precision is the fraction
    of predicted contour pixels with a labelled one of the same class within the tolerance, recall the fraction of
    labelled ones with a predicted one; F1 is computed per image and class and averaged over images, then over classes.

    Unlabelled pixels are ignored: they are on no contour and put none of their neighbours on one. Data sets that mark
    contours as unlabelled (VOC) therefore cannot be scored.

    If neither label nor prediction of an image has a contour of a class, the image does not count for that class; if
    only one of them has, F1 is 0. Classes for which no image counts are left out of the mean with ``absent="skip"`` and
    count as zero with ``absent="zero"``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    images: Tensor

    def __init__(
        self, num_classes: int, *, tolerance: float = 0.0075, absent: Absent = "skip", **settings: Any
    ) -> None:
        """Create the metric with all counts at zero.

        Args:
            num_classes: Number of classes, at most 255.
            tolerance: Largest distance between matching pixels as a fraction of the image's diagonal, at least one
                pixel. 0.0075 as in Csurka et al., and in the edge benchmark of Martin et al. (PAMI 2004).
            absent: Treatment of classes that were not measured in the mean: ``skip`` or ``zero``.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If a setting is out of range.
        """
        super().__init__(**settings)
        check_rule(num_classes, absent)
        if not 0 <= tolerance < 1:
            raise ConfigError(f"BoundaryF(tolerance={tolerance}): a share of the diagonal, 0 to below 1, is needed.")
        self.num_classes, self.tolerance, self.absent = num_classes, tolerance, absent
        self.add_state("total", torch.zeros(num_classes, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Add the images of a batch.

        Args:
            predictions: Classes (B, h, w), or class scores (B, C, h, w); whole images.
            masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            DataError: If shapes differ, or a value is not a class.
        """
        classes = class_maps(predictions, masks, self.num_classes)
        valid = masks != IGNORE
        predicted, labelled = contours(classes, valid), contours(masks, valid)
        radius = max(1.0, self.tolerance * math.hypot(*masks.shape[-2:]))
        precision, of_predicted = self._matched(predicted, labelled, radius)
        recall, of_labelled = self._matched(labelled, predicted, radius)
        # With no contour pixel on one side, precision and recall are zero, and so is F1.
        f1 = 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.double).tiny)
        self.total += f1.sum(0)
        self.images += ((of_predicted > 0) | (of_labelled > 0)).sum(0)

    def compute(self) -> Tensor:
        """Return the mean over classes, from 0 to 1; NaN if nothing was measured."""
        return mean_over_classes(self._per_class(), self.absent)

    def per_class(self) -> Tensor:
        """Return the F1 of each class (C,), NaN where not measured; reduced over all processes."""
        with self.sync_context(should_sync=self._to_sync):
            return self._per_class()

    def _per_class(self) -> Tensor:
        return (self.total / self.images).float()

    def _matched(self, wanted: Tensor, offered: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Return the fraction of contour pixels that have a match, and their number, per image and class (B, C)."""
        matched = near(wanted, offered, radius)
        number = self._count(wanted, wanted != NONE)
        return self._count(wanted, matched) / number.clamp_min(1), number

    def _count(self, classes: Tensor, chosen: Tensor) -> Tensor:
        """Count chosen pixels per image and class (B, C)."""
        rows = torch.arange(len(classes), device=classes.device).reshape(-1, 1, 1) * self.num_classes
        cells = (rows + classes)[chosen]
        size = len(classes) * self.num_classes
        return torch.bincount(cells, minlength=size).reshape(-1, self.num_classes).double()


def contours(classes: Tensor, valid: Tensor) -> Tensor:
    """Find the pixels with one of four neighbours in another class.

    Args:
        classes: Classes (B, h, w).
        valid: Whether each pixel is labelled (B, h, w).

    Returns:
        Their classes (B, h, w) in bytes, `NONE` for all other pixels.
    """
    found = torch.zeros_like(valid)
    everything, first, last = slice(None), slice(None, -1), slice(1, None)
    for one, other in (
        ((everything, first), (everything, last)),
        ((everything, everything, first), (everything, everything, last)),
    ):
        differs = (classes[one] != classes[other]) & valid[one] & valid[other]
        found[one] |= differs
        found[other] |= differs
    return classes.to(torch.uint8).masked_fill(~found, NONE)


def near(wanted: Tensor, offered: Tensor, radius: float) -> Tensor:
    """Mark the contour pixels that have one of the same class within a distance in the other map.

    Offsets are tried from the nearest outwards, and a matched pixel leaves the search, so the cost depends on the
    length of the contours and their agreement, not on image size or number of classes.

    Args:
        wanted: Classes of contour pixels (B, h, w), `NONE` elsewhere.
        offered: Classes of the other map's contour pixels, in the same form.
        radius: Greatest Euclidean distance in pixels.

    Returns:
        Booleans (B, h, w).
    """
    reach = int(radius)
    padded = F.pad(offered, (reach,) * 4, value=NONE)
    places = (F.pad(wanted, (reach,) * 4, value=NONE) != NONE).flatten().nonzero().squeeze(1)
    searched = wanted[wanted != NONE]
    matched = torch.zeros_like(searched, dtype=torch.bool)
    left = torch.arange(len(places), device=places.device)
    for y, x in offsets(radius):
        hit = padded.flatten()[places[left] + y * padded.shape[-1] + x] == searched[left]
        matched[left[hit]] = True
        left = left[~hit]
        if not len(left):
            break
    return torch.zeros_like(wanted, dtype=torch.bool).masked_scatter(wanted != NONE, matched)


def offsets(radius: float) -> list[tuple[int, int]]:
    """List the offsets (rows, columns) of at most this length, shortest first."""
    steps = range(-int(radius), int(radius) + 1)
    inside = [(y, x) for y in steps for x in steps if math.hypot(y, x) <= radius]
    return sorted(inside, key=lambda step: math.hypot(*step))
