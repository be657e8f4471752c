"""Metrics of semantic segmentation from one confusion matrix over all pixels of a split."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError, DataError

__all__ = ["Absent", "SegmentationScores", "check_rule", "class_maps", "mean_over_classes"]

Absent = Literal["skip", "zero"]
"""Treatment of classes that were not measured in a mean: leave them out, or count them as zero."""


class SegmentationScores(Metric):
    """Mean IoU, mean class accuracy, pixel accuracy and mean Dice coefficient.

    With TP, FP and FN of a class summed over all labelled pixels: IoU = TP / (TP + FP + FN), accuracy = TP / (TP + FN),
    Dice = 2 TP / (2 TP + FP + FN). A score with a zero denominator counts as not measured: IoU and Dice of a class
    neither labelled nor predicted, accuracy of a class that is not labelled. Means leave it out with ``absent="skip"``
    (as mmsegmentation) and count it as zero with ``absent="zero"`` (as the multi-task benchmarks on PASCAL-Context).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confusion: Tensor

    def __init__(self, num_classes: int, *, absent: Absent = "skip", **settings: Any) -> None:
        """Create the metric with all counts at zero.

        Args:
            num_classes: Number of classes, at most 255.
            absent: Treatment of classes that were not measured in means: ``skip`` or ``zero``.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If the number of classes or the rule is invalid.
        """
        super().__init__(**settings)
        check_rule(num_classes, absent)
        self.num_classes, self.absent = num_classes, absent
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch, of whole images or of parts such as a band of rows.

        Args:
            predictions: Classes (B, h, w), or class scores (B, C, h, w).
            masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.

        Raises:
            DataError: If shapes differ, or a value is not a class.
        """
        classes = class_maps(predictions, masks, self.num_classes)
        self.confusion += multiclass_confusion_matrix(
            classes, masks, self.num_classes, ignore_index=IGNORE, validate_args=False
        )

    def compute(self) -> dict[str, Tensor]:
        """Return ``miou``, ``macc``, ``aacc`` and ``mdice``, from 0 to 1; NaN if nothing was measured."""
        scores = self._per_class()
        means = {f"m{name}": mean_over_classes(values, self.absent) for name, values in scores.items()}
        right, pixels = self.confusion.diagonal().sum(), self.confusion.sum()
        return {**means, "aacc": mean_over_classes((right.double() / pixels).float().reshape(1), self.absent)}

    def per_class(self) -> dict[str, Tensor]:
        """Return ``iou``, ``acc`` and ``dice`` of each class (C,), NaN where not measured; over all processes."""
        with self.sync_context(should_sync=self._to_sync):
            return self._per_class()

    def _per_class(self) -> dict[str, Tensor]:
        counts = self.confusion.double()  # float32 rounds counts above 2^24
        right, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        scores = {
            "iou": right / (labelled + predicted - right),
            "acc": right / labelled,
            "dice": 2 * right / (labelled + predicted),
        }
        return {name: values.float() for name, values in scores.items()}


def mean_over_classes(values: Tensor, absent: Absent) -> Tensor:
    """Average scores (C,), some of which may be NaN, by the given rule.

    Args:
        values: Scores.
        absent: ``skip`` leaves NaN out, ``zero`` counts it as zero.
    """
    return values.nanmean() if absent == "skip" else values.nan_to_num(nan=0.0).mean()


def class_maps(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Return predicted classes (B, h, w) after checking them and the labels.

    Args:
        predictions: Classes (B, h, w), or class scores (B, C, h, w).
        masks: Classes (B, h, w), 0 to C-1 or `IGNORE`.
        num_classes: Number of classes C.

    Raises:
        DataError: If shapes differ, or a value is not a class.
    """
    classes = predictions.argmax(dim=1) if predictions.ndim == masks.ndim + 1 else predictions
    if classes.shape != masks.shape:
        raise DataError(
            f"Predictions {tuple(predictions.shape)} were to be compared with masks {tuple(masks.shape)}; "
            "resize the scores to the masks' size first."
        )
    valid = masks != IGNORE
    for what, values in (("Predictions", classes), ("Masks", masks)):
        if bool((valid & ((values < 0) | (values >= num_classes))).any()):
            found = values[valid]
            raise DataError(
                f"{what} hold values from {int(found.min())} to {int(found.max())}; with {num_classes} classes, "
                f"0 to {num_classes - 1} are possible (masks: also {IGNORE}, which is ignored)."
            )
    return classes


def check_rule(num_classes: int, absent: str) -> None:
    """Refuse invalid settings.

    Args:
        num_classes: Number of classes.
        absent: The rule for classes that were not measured.

    Raises:
        ConfigError: If one of them is invalid.
    """
    if not 1 <= num_classes <= IGNORE:
        raise ConfigError(f"A metric of {num_classes} classes was asked for; 1 to {IGNORE} are possible.")
    if absent not in ("skip", "zero"):
        raise ConfigError(f"A metric with absent={absent!r} was asked for; give 'skip' or 'zero'.")
