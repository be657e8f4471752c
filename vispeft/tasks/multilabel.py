"""Multi-label classification: any number of labels per image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from vispeft.errors import ConfigError, DataError
from vispeft.metrics import Absent, ClassScores, mean_over_classes, per_class
from vispeft.tasks.supervised import SupervisedTask
from vispeft.viz import bars

__all__ = ["MultiLabel", "PresentMeanAveragePrecision", "balanced_pos_weights"]

THRESHOLD = 0.5
"""Probability from which a label counts as given, for F1 and for predictions."""


class PresentMeanAveragePrecision(MultilabelAveragePrecision):
    """Mean average precision of the labels; one that no image has counts by a stated rule."""

    def __init__(self, num_labels: int, absent: Absent = "skip") -> None:
        """Measure each label on its own.

        Args:
            num_labels: Number of labels.
            absent: Treatment of labels that no image has: ``skip`` leaves them out, ``zero`` counts them as zero.
        """
        super().__init__(num_labels, average="none")
        self.absent: Absent = absent

    def compute(self) -> Tensor:
        """Compute the mean over the labels; NaN if none was measured."""
        if not len(self.target):
            return torch.tensor(math.nan)
        present = (dim_zero_cat(self.target) == 1).any(dim=0)
        return mean_over_classes(_quietly(super().compute).masked_fill(~present, math.nan), self.absent)


def _quietly(compute: Callable[..., Tensor], *arguments: Any, **settings: Any) -> Tensor:
    """Compute without a warning about labels that are absent, which are left out afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*No positive samples.*")
        return compute(*arguments, **settings)


class MultiLabel(SupervisedTask):
    """Each label is present or not, on its own; trained with binary cross entropy.

    Logs the loss, and of validation and test the mean average precision and the mean F1 of the labels. Targets are
    zeros and ones (B, labels); numbers between them, as mixup makes them, train too.
    """

    target: ClassVar[str] = "multilabel"
    least_outputs: ClassVar[int] = 1
    monitor = "validation/mean_average_precision"

    def __init__(
        self,
        *,
        pos_weights: list[float] | Literal["balanced"] | None = None,
        absent: Literal["skip", "zero"] = "skip",
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            pos_weights: How much more a present label counts than an absent one, per label; ``balanced`` takes absent
                over present among the training images.
            absent: How a label that no image has counts in the means over labels: not at all (``skip``), or as zero.
            settings: Settings of `AdapterTask`; ``num_classes`` is the number of labels.

        Raises:
            ConfigError: If a number is out of range, or the backbone is unknown.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        self.absent = absent
        super().__init__(**settings)
        self.pos_weights = pos_weights
        self.targets_needed = pos_weights == "balanced"
        weights = None if pos_weights in (None, "balanced") else _checked_weights(pos_weights, self.num_classes)
        self.register_buffer("_weights", weights, persistent=False)

    def make_metrics(self, split: str) -> MetricCollection:
        """Create the metrics of a split; training has none but its loss.

        Args:
            split: train, validation or test.
        """
        metrics: dict[str, Any] = {}
        if split != "train":
            metrics["mean_average_precision"] = PresentMeanAveragePrecision(self.num_classes, self.absent)
            metrics["f1"] = ClassScores(self.num_classes, figure="f1", absent=self.absent, threshold=THRESHOLD)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)

    def training_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the binary cross entropy, present labels weighted.

        Args:
            scores: Scores (B, labels).
            targets: From 0 to 1 (B, labels).
        """
        return F.binary_cross_entropy_with_logits(scores, targets.float(), pos_weight=self._weights)

    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the binary cross entropy.

        Args:
            scores: Scores (B, labels).
            targets: From 0 to 1 (B, labels).
        """
        return F.binary_cross_entropy_with_logits(scores, targets.float())

    def for_metrics(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn scores and targets into probabilities and whole labels.

        Args:
            scores: Scores (B, labels).
            targets: From 0 to 1 (B, labels).
        """
        return scores.sigmoid(), (targets > 0.5).long()

    def for_probe(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give targets, and the weights of the training loss."""
        return targets, self._weights

    def take_targets(self, targets: Tensor) -> None:
        """Compute balanced weights.

        Args:
            targets: Targets of the training split (N, labels).
        """
        self._weights = balanced_pos_weights(targets, self.num_classes).to(self.device)

    def decode(self, scores: Tensor) -> Tensor:
        """Probability of each label (B, labels).

        Args:
            scores: Scores (B, labels).
        """
        return scores.sigmoid()

    def summary(self, scores: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Average precision of each label; None for one that no test image has.

        Args:
            scores: Scores of the test split (N, labels).
            targets: Targets (N, labels).
            names: Names of the labels.
        """
        return {"test_average_precision_per_class": per_class(self._precisions(scores, targets), names)}

    def _precisions(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the average precision of each label (labels,), NaN for one that no image has."""
        values, labels = self.for_metrics(scores, targets)
        precisions = _quietly(multilabel_average_precision, values, labels, self.num_classes, average="none")
        return precisions.masked_fill(labels.sum(0) == 0, math.nan)

    def draw(self, scores: Tensor, targets: Tensor, names: Sequence[str], folder: Path) -> None:
        """Draw the average precision of each label next to its frequency, which guessing would reach.

        Args:
            scores: Scores of the test split (N, labels).
            targets: Targets (N, labels).
            names: Names of the labels.
            folder: Folder for the plots.
        """
        heights, marks = (per_class(v, names) for v in (self._precisions(scores, targets), targets.float().mean(0)))
        bars(heights, marks, folder / "average_precision.png", label="average precision", mark_label="share of images")

    def columns(self, names: Sequence[str]) -> list[str]:
        """Name the columns of a table of predictions."""
        return ["labels", *names]

    def row(self, values: Tensor, names: Sequence[str]) -> list[str]:
        """The labels from a probability of one half, and the probability of each."""
        given = [name for name, value in zip(names, values.tolist(), strict=True) if value >= THRESHOLD]
        return [";".join(given), *(f"{value:.6f}" for value in values.tolist())]


def balanced_pos_weights(targets: Tensor, labels: int) -> Tensor:
    """Compute weights with which the present and the absent images of a label count the same in sum.

    Args:
        targets: Zeros and ones of all training images (N, labels).
        labels: Number of labels.

    Returns:
        Absent over present, per label.

    Raises:
        DataError: If a label is never or always present.
    """
    if targets.ndim != 2 or targets.shape[1] != labels:
        raise DataError(f"Targets have shape {tuple(targets.shape)}; (images, {labels}) is needed.")
    present = (targets > 0.5).sum(0)
    constant = ((present == 0) | (present == len(targets))).nonzero().flatten().tolist()
    if constant:
        raise DataError(
            f"pos_weights is 'balanced', and {len(constant)} of {labels} labels are on all or on none of the training "
            f"images, first label {constant[0]}. Leave these labels out, or give a list of weights."
        )
    return (len(targets) - present) / present


def _checked_weights(weights: Any, labels: int) -> Tensor:
    if isinstance(weights, str) or len(weights) != labels or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ConfigError(
            f"MultiLabel(pos_weights={weights!r}): give 'balanced', or one finite number above 0 for each of the "
            f"{labels} labels."
        )
    return torch.tensor(weights, dtype=torch.float32)
