"""Losses of dense tasks: classes, saliency, edges, normals, depth and values.

Sources: Vandenhende et al., PAMI 2021 (arXiv 2004.13379) and its public code, whose losses MTLoRA (arXiv 2403.20320)
and Polyhistor (arXiv 2210.03265) use. Deviations: a batch without a labelled pixel has a loss of zero with a gradient
of zero (the public cross entropy divides 0 by 0), pixels without a label count in no loss, also not in the balanced
one, and vectors that are too short to have a direction are not normalised.

Each loss is computed in float32 at least, from sums that may be added over processes before they are divided.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.data.dense_checks import check_batch
from vispeft.data.dense_targets import IGNORE, DenseTarget, TargetKind
from vispeft.errors import ConfigError, DataError
from vispeft.tasks.losses import at_least_float32

__all__ = [
    "AbsoluteError",
    "BalancedCrossEntropy",
    "DenseCrossEntropy",
    "DenseLoss",
    "NormalsError",
    "dense_loss",
]

EDGE_WEIGHT = 0.95
"""Weight of edge pixels; that of the others is 0.05 (public code of Vandenhende et al.)."""
SHORT = 1e-6
"""Length up to which a predicted vector is not normalised: its gradient would be the inverse of its length."""


class DenseLoss(nn.Module):
    """The loss of one task, from sums over pixels.

    Example:
        >>> loss = dense_loss(DenseTarget(kind="depth"), "depth")
        >>> loss(outputs, labels).backward()

    With several processes, only denominators have to be known to all of them before the backward pass, and they depend
    on labels alone. `combine` is linear in the numerator, so values and gradients of the processes add up to those of
    one process with all data:

        >>> numerator, denominator = loss.parts(outputs, labels)
        >>> torch.distributed.all_reduce(denominator)
        >>> loss.combine(numerator, denominator).backward()  # gradients are then summed, not averaged
    """

    def __init__(self, target: DenseTarget, name: str) -> None:
        """Store the task.

        Args:
            target: Description of the task.
            name: Name of the task, for messages.
        """
        super().__init__()
        self.target, self.name = target, name

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a number.

        Args:
            outputs: Scores or values (B, channels, h, w) at the labels' size.
            labels: Labels in the form that `DenseTarget` describes.

        Raises:
            DataError: If outputs or labels do not have the form of the task.
        """
        return self.combine(*self.parts(outputs, labels))

    def parts(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sums of which the loss is made.

        Args:
            outputs: Scores or values (B, channels, h, w) at the labels' size.
            labels: Labels in the form that `DenseTarget` describes.

        Returns:
            Numerator (float, with a gradient) and denominator (int64, without one). Both may be added over batches or
            processes.

        Raises:
            DataError: If outputs or labels do not have the form of the task.
        """
        check_batch(self.target, self.name, outputs, labels)
        errors, labelled = self.errors(at_least_float32(outputs), labels), labels != IGNORE
        return errors.where(labelled, 0).sum(), labelled.sum()

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the error of each label, of any value where there is none.

        Args:
            outputs: Scores or values (B, channels, h, w), in float32 or float64.
            labels: Labels in the form that `DenseTarget` describes, which were checked.

        Returns:
            Numbers of the labels' shape.
        """
        raise NotImplementedError

    def combine(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Compute the loss, a number, from sums; zero where no pixel is labelled.

        Args:
            numerator: The sums of errors that `parts` gives.
            denominator: The counts of labels that `parts` gives.
        """
        return numerator / denominator.clamp_min(1)


class DenseCrossEntropy(DenseLoss):
    """Cross entropy of classes, averaged over labelled pixels."""

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross entropy of each pixel (B, h, w)."""
        return F.cross_entropy(outputs, labels, ignore_index=IGNORE, reduction="none")


class AbsoluteError(DenseLoss):
    """Absolute error of depth in metres, or of other values, averaged over labelled pixels."""

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the absolute error of each pixel (B, 1, h, w)."""
        return (outputs - labels.to(outputs.dtype)).abs()


class NormalsError(DenseLoss):
    """Absolute error of predicted vectors of length one, averaged over labelled elements, three per pixel."""

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the absolute error of each element (B, 3, h, w)."""
        lengths = torch.linalg.vector_norm(outputs, dim=1, keepdim=True)
        return (outputs / lengths.where(lengths > SHORT, 1) - labels.to(outputs.dtype)).abs()


class BalancedCrossEntropy(DenseLoss):
    """Binary cross entropy in which rare positive pixels weigh more (HED, arXiv 1504.06375, equation 2).

    With L = softplus(o) - o y of a logit o, and the weight w of positive pixels:
    ``(w * sum of L over positives + (1 - w) * sum of L over negatives) / labelled pixels``. Unless it is given, w is
    the share of negatives in the whole batch, or, from summed parts, in that of all processes. Without a positive pixel
    w is one and the loss zero.
    """

    def __init__(self, target: DenseTarget, name: str, positive_weight: float | None = None) -> None:
        """Store the task.

        Args:
            target: Description of the task, of kind ``saliency`` or ``edge``.
            name: Name of the task, for messages.
            positive_weight: Weight w of positive pixels from 0 to 1; None for the share of negatives in a batch.

        Raises:
            ConfigError: If the weight is out of range.
        """
        super().__init__(target, name)
        if positive_weight is not None and not 0 <= positive_weight <= 1:
            raise ConfigError(
                f"BalancedCrossEntropy(positive_weight={positive_weight}) was asked for the task {name!r}; give a "
                "number from 0 to 1, or None."
            )
        self.positive_weight = positive_weight

    def forward(self, outputs: Tensor, labels: Tensor, void: Tensor | None = None) -> Tensor:
        """Compute the loss, a number.

        Args:
            outputs: Logits (B, 1, h, w).
            labels: 0 or 1 (B, 1, h, w), or `IGNORE`.
            void: Whether each pixel (B, 1, h, w) weighs nothing although it is labelled. As in the public code, void
                pixels still count among the negatives of w, and in the number that the sum is divided by; w is at most
                one here.

        Raises:
            DataError: If one of them does not have the form of the task.
        """
        return self.combine(*self.parts(outputs, labels, void))

    def parts(self, outputs: Tensor, labels: Tensor, void: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the sums of which the loss is made.

        Args:
            outputs: Logits (B, 1, h, w).
            labels: 0 or 1 (B, 1, h, w), or `IGNORE`.
            void: Whether each pixel (B, 1, h, w) weighs nothing although it is labelled.

        Returns:
            Sums of L over positive and over negative pixels (2,), and counts (3,) of negative, weighed and labelled
            pixels.

        Raises:
            DataError: If one of them does not have the form of the task.
        """
        check_batch(self.target, self.name, outputs, labels)
        labelled, positive = labels != IGNORE, labels >= 0.5
        weighed = labelled if void is None else labelled & ~self._checked(void, labels)
        logits = at_least_float32(outputs)
        # softplus(o) - o is softplus(-o), without the difference of two large numbers.
        errors = F.softplus(torch.where(positive, -logits, logits))
        sums = [errors.where(weighed & which, 0).sum() for which in (positive, ~positive)]
        counts = [which.sum() for which in (labelled & ~positive, weighed, labelled)]
        return torch.stack(sums), torch.stack(counts)

    def combine(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Compute the loss, a number, from sums; zero where no pixel is labelled.

        Args:
            numerator: The sums (2,) that `parts` gives.
            denominator: The counts (3,) that `parts` gives.
        """
        negatives, weighed, labelled = denominator.to(numerator.dtype)
        if self.positive_weight is None:
            weight = (negatives / weighed.clamp_min(1)).clamp_max(1)
        else:
            weight = torch.full_like(labelled, self.positive_weight)
        return torch.stack([weight, 1 - weight]).mul(numerator).sum() / labelled.clamp_min(1)

    def _checked(self, void: Tensor, labels: Tensor) -> Tensor:
        if void.dtype != torch.bool or void.shape != labels.shape:
            raise DataError(
                f"The void mask of the task {self.name!r} has the shape {tuple(void.shape)} and the type {void.dtype}; "
                f"booleans {tuple(labels.shape)} are needed."
            )
        return void


def dense_loss(target: DenseTarget, name: str) -> DenseLoss:
    """Create the loss of a task by its kind.

    Args:
        target: Description of the task.
        name: Name of the task, for messages.

    Returns:
        Cross entropy for classes, balanced binary cross entropy for saliency and edges (with a fixed weight of 0.95 for
        edges), absolute error of unit vectors for normals, absolute error for depth and values.
    """
    if target.kind == "edge":
        return BalancedCrossEntropy(target, name, EDGE_WEIGHT)
    return LOSSES[target.kind](target, name)


LOSSES: dict[TargetKind, type[DenseLoss]] = {
    "classes": DenseCrossEntropy,
    "saliency": BalancedCrossEntropy,
    "normals": NormalsError,
    "depth": AbsoluteError,
    "values": AbsoluteError,
}
