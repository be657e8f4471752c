"""Accuracy and F1 per class or label, with one rule for those that do not occur."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from vispeft.errors import ConfigError
from vispeft.metrics.segmentation import Absent, mean_over_classes

__all__ = ["ClassScores", "known_values", "per_class"]


class ClassScores(Metric):
    """Mean accuracy or mean F1 of classes, or of labels that are each present or not.

    With TP, FP and FN of a class: accuracy = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN). A score with a zero
    denominator counts as not measured: the accuracy of a class without images, the F1 of one without images and
    predictions. The mean leaves it out with ``absent="skip"`` and counts it as zero with ``absent="zero"``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    hits: Tensor
    predicted: Tensor
    present: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        figure: Literal["accuracy", "f1"],
        absent: Absent = "skip",
        threshold: float = 0.5,
        **settings: Any,
    ) -> None:
        """Create the metric with all counts at zero.

        Args:
            num_classes: Number of classes or labels.
            figure: The figure to average.
            absent: Treatment of classes that were not measured in the mean: ``skip`` or ``zero``.
            threshold: Probability from which a label counts as predicted.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If the rule is invalid.
        """
        super().__init__(**settings)
        if absent not in ("skip", "zero"):
            raise ConfigError(f"A metric with absent={absent!r} was asked for; give 'skip' or 'zero'.")
        self.num_classes, self.figure, self.absent, self.threshold = num_classes, figure, absent, threshold
        for name in ("hits", "predicted", "present"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            scores: Scores of classes, or probabilities of labels (B, C).
            targets: Classes (B,), or labels as zeros and ones (B, C).
        """
        if targets.ndim == 1:
            predicted, present = (F.one_hot(found, self.num_classes).bool() for found in (scores.argmax(1), targets))
        else:
            predicted, present = scores >= self.threshold, targets > 0.5
        self.hits += (predicted & present).sum(0)
        self.predicted += predicted.sum(0)
        self.present += present.sum(0)

    def compute(self) -> Tensor:
        """Return the mean over classes, from 0 to 1; NaN if nothing was measured."""
        return mean_over_classes(self._per_class(), self.absent)

    def _per_class(self) -> Tensor:
        # Apple's GPUs have no doubles; single precision counts up to 2^24 images exactly.
        kind = torch.float32 if self.hits.device.type == "mps" else torch.double
        hits, predicted, present = self.hits.to(kind), self.predicted, self.present
        return (hits / present if self.figure == "accuracy" else 2 * hits / (predicted + present)).float()


def known_values(values: Tensor) -> list[float | None]:
    """Convert numbers to a list, with None for those that are not finite.

    Args:
        values: Numbers (N,).
    """
    return [value if math.isfinite(value) else None for value in values.tolist()]


def per_class(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """Give a figure of each class its name; None for a class that was not measured.

    Args:
        values: Figures (C,), NaN where not measured.
        names: Names of the classes.
    """
    return dict(zip(names, known_values(values), strict=True))
