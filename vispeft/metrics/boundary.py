"""How well the contours of a segmentation are met."""

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
"""Value of pixels that lie on no contour, in maps that hold the classes of those that do."""


class BoundaryF(Metric):
    """Mean boundary F1 of the classes (Csurka et al., BMVC 2013; the contour measure of DAVIS, CVPR 2016).

    A pixel lies on the contour of its class if one of its four neighbours has another class. Precision is the share of
    predicted contour pixels with a labelled one of the same class within the tolerance, recall the share of labelled
    ones with a predicted one; F1 is taken per image and class and averaged over images, then over classes.

    Pixels without a label are left out: they lie on no contour and make none of their neighbours lie on one. Sets whose
    contours are marked as such pixels (VOC) can therefore not be scored.

    An image where neither label nor prediction has a contour of a class says nothing about that class; where only one
    of them has, F1 is 0. Classes about which no image says anything are left out of the mean with ``absent="skip"`` and
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
        """Begin with nothing counted.

        Args:
            num_classes: Number of classes, at most 255.
            tolerance: Greatest distance of matching pixels, as a share of the image's diagonal, and never less than
                one pixel. 0.0075 as in Csurka et al., and in the edge benchmark of Martin et al. (PAMI 2004).
            absent: What the mean does with classes that were not measured: ``skip`` or ``zero``.
            settings: Those of `torchmetrics.Metric`.

        Raises:
            ConfigError: If a setting cannot be.
        """
        super().__init__(**settings)
        check_rule(num_classes, absent)
        if not 0 <= tolerance < 1:
            raise ConfigError(f"BoundaryF(tolerance={tolerance}): a share of the diagonal, 0 to below 1, is needed.")
        self.num_classes, self.tolerance, self.absent = num_classes, tolerance, absent
        self.add_state("total", torch.zeros(num_classes, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Measure the images of a batch.

        Args:
            predictions: Classes (B, h, w), or class scores (B, C, h, w); whole images.
            masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            DataError: If shapes differ, or a value is no class.
        """
        classes = class_maps(predictions, masks, self.num_classes)
        valid = masks != IGNORE
        predicted, labelled = contours(classes, valid), contours(masks, valid)
        radius = max(1.0, self.tolerance * math.hypot(*masks.shape[-2:]))
        precision, of_predicted = self._matched(predicted, labelled, radius)
        recall, of_labelled = self._matched(labelled, predicted, radius)
        # With no pixel on one side both shares are zero, and so is F1.
        f1 = 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.double).tiny)
        self.total += f1.sum(0)
        self.images += ((of_predicted > 0) | (of_labelled > 0)).sum(0)

    def compute(self) -> Tensor:
        """Give the mean over classes, from 0 to 1; NaN where nothing was measured at all."""
        return mean_over_classes(self._per_class(), self.absent)

    def per_class(self) -> Tensor:
        """Give the F1 of each class (C,), NaN where not measured; over all processes."""
        with self.sync_context(should_sync=self._to_sync):
            return self._per_class()

    def _per_class(self) -> Tensor:
        return (self.total / self.images).float()

    def _matched(self, wanted: Tensor, offered: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Give the share of contour pixels that are matched, and their number, per image and class (B, C)."""
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
    """Find the pixels that have a neighbour (of four) of another class.

    Args:
        classes: Classes (B, h, w).
        valid: Which pixels count (B, h, w).

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
    """Tell which contour pixels have one of the same class in the other map within a distance.

    Offsets are tried from the nearest on, and a pixel is dropped from the search as soon as it has its match, so that
    the work depends on the length of the contours and on how well they agree, and not on image or class number.

    Args:
        wanted: Classes of contour pixels (B, h, w), `NONE` elsewhere.
        offered: The same of the other map.
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
    """List the steps (rows, columns) of at most this length, the shortest first."""
    steps = range(-int(radius), int(radius) + 1)
    inside = [(y, x) for y in steps for x in steps if math.hypot(y, x) <= radius]
    return sorted(inside, key=lambda step: math.hypot(*step))
