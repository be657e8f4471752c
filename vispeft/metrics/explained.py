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
    moments: Tensor
    smallest: Tensor
    largest: Tensor

    def __init__(self, targets: int, **settings: Any) -> None:
        """Create the metric without images.

        Args:
            targets: Number of targets.
            settings: Settings of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        zeros = torch.zeros(targets, dtype=sum_type())
        self.add_state("errors", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("moments", torch.stack([zeros] * 3), dist_reduce_fx=merged)
        self.add_state("smallest", zeros + math.inf, dist_reduce_fx="min")
        self.add_state("largest", zeros - math.inf, dist_reduce_fx="max")

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add the images of a batch.

        Args:
            values: Predictions (B,) or (B, targets).
            targets: True values, of the same shape.
        """
        found, wanted = (n.to(self.errors.dtype).reshape(len(n), -1) for n in (values, targets))
        self.errors += (found - wanted).square().sum(0)
        mean = wanted.mean(0)
        batch = torch.stack([torch.full_like(mean, len(wanted)), mean, (wanted - mean).square().sum(0)])
        self.moments = merged(torch.stack([self.moments, batch]))
        self.smallest = torch.minimum(self.smallest, wanted.amin(0))
        self.largest = torch.maximum(self.largest, wanted.amax(0))

    def compute(self) -> Tensor:
        """Return the mean over targets, at most 1; NaN if no target has an R²."""
        return self.per_target().nanmean()

    def per_target(self) -> Tensor:
        """Return R² of each target (targets,), NaN where it is not defined."""
        constant = self.smallest >= self.largest
        return (1 - self.errors / self.moments[2]).masked_fill(constant, math.nan).float()


def merged(parts: Tensor) -> Tensor:
    """Merge the moments of several parts of some images.

    Squares of the values are never summed, from which those of a mean far from 0 would cancel (Chan, Golub and LeVeque,
    Updating formulae and a pairwise algorithm for computing sample variances, 1979).

    Args:
        parts: Number of images, mean, and sum of squared distances from that mean, of each target (parts, 3, targets).

    Returns:
        The same of all images (3, targets).
    """
    images, means, spreads = parts.unbind(1)
    total = images.sum(0)
    mean = (images * means).sum(0) / total.clamp(min=1)
    between = (images * (means - mean).square()).sum(0)
    return torch.stack([total, mean, spreads.sum(0) + between])
