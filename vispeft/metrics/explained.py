"""R² of predicted numbers, with a rule for targets that have none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vispeft.metrics.sums import sum_type

__all__ = ["ExplainedVariance"]


class ExplainedVariance(Metric):
    """Mean R² of several targets.

    R² = 1 - sum of squared errors / sum of squared distances from the mean. It is not defined for a target that is the
    same on all images, or on a single image; the mean leaves such a target out.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    errors: Tensor
    sums: Tensor
    squares: Tensor
    smallest: Tensor
    largest: Tensor
    images: Tensor

    def __init__(self, targets: int, **settings: Any) -> None:
        """Create the metric without images.

        Args:
            targets: Number of targets.
            settings: Settings of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        zeros = torch.zeros(targets, dtype=sum_type())
        for name in ("errors", "sums", "squares"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("smallest", zeros + math.inf, dist_reduce_fx="min")
        self.add_state("largest", zeros - math.inf, dist_reduce_fx="max")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add the images of a batch.

        Args:
            values: Predictions (B,) or (B, targets).
            targets: True values, of the same shape.
        """
        found, wanted = (n.to(self.errors.dtype).reshape(len(n), -1) for n in (values, targets))
        self.errors += (found - wanted).square().sum(0)
        self.sums += wanted.sum(0)
        self.squares += wanted.square().sum(0)
        self.smallest = torch.minimum(self.smallest, wanted.amin(0))
        self.largest = torch.maximum(self.largest, wanted.amax(0))
        self.images += len(wanted)

    def compute(self) -> Tensor:
        """Return the mean over targets, at most 1; NaN if no target has an R²."""
        return self.per_target().nanmean()

    def per_target(self) -> Tensor:
        """Return R² of each target (targets,), NaN where it is not defined."""
        spread = self.squares - self.sums.square() / self.images
        constant = self.smallest >= self.largest
        return (1 - self.errors / spread).masked_fill(constant, math.nan).float()
