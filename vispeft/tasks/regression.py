"""Regression: one or several numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

from vispeft.errors import DataError, FileError
from vispeft.metrics import ExplainedVariance, known_values
from vispeft.tasks.supervised import SupervisedTask
from vispeft.viz import predicted_against_true

__all__ = ["Regression"]

_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class Regression(SupervisedTask):
    """Numbers per image, trained with squared or absolute errors.

    The model learns targets from which the mean of the training images is subtracted and which are divided by their
    deviation; the adapter's file holds both. Metrics and predictions are in the targets' own unit: mean absolute
    error, root mean squared error, and R² (averaged over the targets that have one). The loss is in
    the standardised one.
    """

    target: ClassVar[str] = "regression"
    least_outputs: ClassVar[int] = 1
    targets_needed = True
    targets_measured = True
    monitor = "validation/mae"
    monitor_mode = "min"

    def __init__(self, *, loss: Literal["mse", "l1"] = "mse", **settings: Any) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            loss: ``mse`` for squared errors, ``l1`` for absolute ones, which follow outliers less.
            settings: Settings of `AdapterTask`; ``num_classes`` is the number of targets.

        Raises:
            ConfigError: If a number is out of range, or the backbone is unknown.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        super().__init__(**settings)
        self.loss = loss
        self.register_buffer("mean", torch.zeros(self.num_classes), persistent=False)
        self.register_buffer("deviation", torch.ones(self.num_classes), persistent=False)

    def make_metrics(self, split: str) -> MetricCollection:
        """Create the metrics of a split.

        Args:
            split: train, validation or test.
        """
        metrics: dict[str, Any] = {"mae": MeanAbsoluteError()}
        if split != "train":
            metrics["rmse"] = MeanSquaredError(squared=False)
            metrics["r2"] = ExplainedVariance(self.num_classes)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)

    def take_targets(self, targets: Tensor) -> None:
        """Compute mean and standard deviation of each target.

        Args:
            targets: Targets of the training split (N,) or (N, targets).

        Raises:
            DataError: If their number is wrong, one is not finite, or all of one are equal.
        """
        values = targets.double().reshape(len(targets), -1)
        if values.shape[1] != self.num_classes:
            raise DataError(f"Each image has {values.shape[1]} targets, and the model gives {self.num_classes}.")
        broken = (~values.isfinite()).any(1).nonzero().flatten().tolist()
        if broken:
            raise DataError(f"{len(broken)} of {len(values)} training targets are not finite, first {broken[0]}.")
        deviation = values.std(0, correction=0)
        equal = (deviation == 0).nonzero().flatten().tolist()
        if equal:
            raise DataError(f"Target {equal[0]} is {values[0, equal[0]]:g} on all training images: nothing to learn.")
        self.mean, self.deviation = values.mean(0).float().to(self.device), deviation.float().to(self.device)

    def for_probe(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give standardised targets (N, targets)."""
        return (_columns(targets) - self.mean.cpu()) / self.deviation.cpu(), None

    def training_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the error of standardised targets.

        Args:
            scores: Standardised values (B, targets).
            targets: Values (B,) or (B, targets).
        """
        return _LOSSES[self.loss](scores, (_columns(targets) - self.mean) / self.deviation)

    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the same as in training."""
        return self.training_loss(scores, targets)

    def for_metrics(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn scores and targets into values in the targets' own unit.

        Args:
            scores: Standardised values (B, targets).
            targets: Values (B,) or (B, targets).
        """
        values, wanted = self.decode(scores), _columns(targets)
        return (values.squeeze(1), wanted.squeeze(1)) if self.num_classes == 1 else (values, wanted)

    def decode(self, scores: Tensor) -> Tensor:
        """Values in the targets' own unit (B, targets).

        Args:
            scores: Standardised values (B, targets).
        """
        return scores * self.deviation.to(scores.device) + self.mean.to(scores.device)

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read: times the deviation, plus the mean."""
        return {**super().output(), "mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    def load_adapter(self, path: str | Path) -> None:
        """Replace the adapter by a saved one, mean and deviation included.

        Args:
            path: Its directory.

        Raises:
            FileError: If it was not trained for regression, or a file is altered.
        """
        super().load_adapter(path)
        read = self.bank.notes().get("output") or {}
        if len(read.get("mean", ())) != self.num_classes:
            raise FileError(f"{path} does not say how its outputs become {self.num_classes} values of a regression.")
        self.mean = torch.tensor(read["mean"], device=self.device)
        self.deviation = torch.tensor(read["deviation"], device=self.device)
        self._targets_taken = True

    def summary(self, scores: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Mean absolute error and R² of each target; None where R² is not defined: one image, or equal targets.

        Args:
            scores: Standardised values of the test split (N, targets).
            targets: Values (N,) or (N, targets).
            names: Names of the targets.
        """
        values, wanted = self.decode(scores), _columns(targets)
        r2 = ExplainedVariance(self.num_classes).to(values.device)
        r2.update(values, wanted)
        errors, explained = known_values((values - wanted).abs().mean(0)), known_values(r2.per_target())
        return {
            "test_per_target": {
                name: {"mae": error, "r2": share} for name, error, share in zip(names, errors, explained, strict=True)
            }
        }

    def draw(self, scores: Tensor, targets: Tensor, names: Sequence[str], folder: Path) -> None:
        """Draw predicted against true values.

        Args:
            scores: Standardised values of the test split (N, targets).
            targets: Values (N,) or (N, targets).
            names: Names of the targets.
            folder: Folder for the plots.
        """
        predicted_against_true(self.decode(scores), _columns(targets), names, folder / "predicted.png")

    def columns(self, names: Sequence[str]) -> list[str]:
        """Name the columns of a table of predictions."""
        return list(names)

    def row(self, values: Tensor, names: Sequence[str]) -> list[str]:
        """The values."""
        return [f"{value:.6g}" for value in values.tolist()]


def _columns(targets: Tensor) -> Tensor:
    return targets.float().reshape(len(targets), -1)
