"""The base of classification, multi-label classification and regression: one target per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from vispeft.errors import DataError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.finite import finite_rows
from vispeft.tasks.predictions import ScorePredictor
from vispeft.tasks.probe import Affine

__all__ = ["Batch", "SupervisedTask", "check_target", "train_targets"]

Batch = tuple[Tensor | Mapping[str, Tensor], Tensor]
"""Images (B, 3, H, W), or a frozen backbone's outputs for them, and their targets."""

_TASK_OF = {
    "class": "Classification",
    "embedding": "MetricLearning",
    "mask": "Segmentation",
    "multilabel": "MultiLabel",
    "regression": "Regression",
    "tasks": "MultiTaskDense",
}


class SupervisedTask(AdapterTask, ABC):
    """Base of the tasks with one target per image.

    A subclass names its kind of target, and defines the loss, the metrics and the reading of outputs.
    """

    target: ClassVar[str]
    """Kind of the data's targets: ``class``, ``multilabel`` or ``regression``."""
    kept_outputs: ClassVar[tuple[str, ...]] = ("scores", "targets")
    targets_needed: bool = False
    """Whether something is computed from all targets of the training split before the first step."""
    targets_measured: ClassVar[bool] = False
    """Whether validation and test need it, too, and not the loss of training alone."""

    def __init__(self, **settings: Any) -> None:
        """Create the model, then the metrics.

        Args:
            settings: Settings of `AdapterTask`.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(**settings)
        self._targets_taken, self._trains = False, True
        self.train_metrics = self.make_metrics("train")
        self.validation_metrics = self.make_metrics("validation")
        self.test_metrics = self.make_metrics("test")

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def make_metrics(self, split: str) -> MetricCollection:
        """Create the metrics of a split, with names that start with the split's.

        Args:
            split: train, validation or test.
        """

    @abstractmethod
    def training_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of training.

        Args:
            scores: Outputs of the model (B, outputs), in float32.
            targets: Targets of the data.
        """

    @abstractmethod
    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss without weights and smoothing, for validation and test.

        Args:
            scores: Outputs of the model (B, outputs), in float32.
            targets: Targets of the data.
        """

    @abstractmethod
    def decode(self, scores: Tensor) -> Tensor:
        """Turn the model's outputs into probabilities or values (B, outputs).

        Args:
            scores: Outputs of the model (B, outputs), in float32.
        """

    def for_metrics(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Convert outputs and targets to the form the metrics expect.

        Args:
            scores: Outputs of the model (B, outputs), in float32.
            targets: Targets of the data.
        """
        return scores, targets

    @property
    def probe_kind(self) -> str:
        """Kind of the linear models that may start the head; see `vispeft.tasks.HeadStart`."""
        return self.target

    def probe_layer(self) -> nn.Module | None:
        """Return the layer whose input the linear models are fitted to: the classifier."""
        return self.bank.head()

    def frozen_layer(self) -> nn.Module | None:
        """Return the layer that sees the features of the frozen backbone alone: the classifier of its own."""
        return self.bank.base_head

    def probe_rows(self, seen: Tensor, images: Any, targets: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Turn what the layer sees of a batch into rows of features (N, width) and their targets.

        Args:
            seen: Input of the layer, float32 on the CPU.
            images: The batch.
            targets: Its targets, on the CPU.
            most: Most rows of an image, where there are several.
        """
        return seen, targets

    def judge_probe(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Measure outputs of a linear model: figures of validation by name, and the loss.

        Args:
            scores: Outputs (N, outputs).
            targets: Targets of the data.
        """
        metrics = self.make_metrics("validation").to(scores.device)
        metrics.update(*self.for_metrics(scores, targets))
        return {"validation/loss": self.plain_loss(scores, targets), **metrics.compute()}

    def start_from_probe(self, model: Affine, features: Tensor) -> None:
        """Copy a linear model into the classifier.

        Args:
            model: The model.
            features: Rows that it was fitted to.
        """
        head: Any = self.probe_layer()
        head.weight.copy_(model.weight)
        if head.bias is not None:
            head.bias.copy_(model.bias)

    def for_probe(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give what a linear model of the same outputs is fitted to (`vispeft.tasks.HeadStart`).

        Args:
            targets: Targets of the data, on the CPU.

        Returns:
            Targets in the form of the outputs, and how much each class or present label counts.
        """
        return targets, None

    def take_targets(self, targets: Tensor) -> None:
        """Compute figures from the targets of the training split, where `targets_needed` is set.

        Args:
            targets: All of them.
        """

    def calibrate(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Calibrate the model's confidence on the validation split, if the task supports it.

        Args:
            scores: Outputs of the model (N, outputs).
            targets: Targets of the data.

        Returns:
            Values for ``metrics.json``; empty without calibration.
        """
        return {}

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        return {"target": self.target}

    def summary(self, scores: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Compute figures per output for ``metrics.json``.

        Args:
            scores: Outputs of the model for the test split (N, outputs).
            targets: Targets of the data.
            names: Names of the outputs.
        """
        return {}

    @abstractmethod
    def draw(self, scores: Tensor, targets: Tensor, names: Sequence[str], folder: Path) -> None:
        """Draw the results on the test split.

        Args:
            scores: Outputs of the model (N, outputs).
            targets: Targets of the data.
            names: Names of the outputs.
            folder: Folder for the plots.
        """

    @abstractmethod
    def columns(self, names: Sequence[str]) -> list[str]:
        """Name the columns of a table of predictions, after the image's path.

        Args:
            names: Names of the outputs.
        """

    @abstractmethod
    def row(self, values: Tensor, names: Sequence[str]) -> list[str]:
        """Fill these columns for one image.

        Args:
            values: The result of `decode` for it (outputs,).
            names: Names of the outputs.
        """

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Compute figures per output after the test, and calibrate after validation, where outputs are finite."""
        scores, targets = finite_rows(outputs["scores"], outputs["targets"])
        if not len(scores):
            return {}
        return self.summary(scores, targets, names) if split == "test" else self.calibrate(scores, targets)

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw the results on the test split, where outputs are finite."""
        scores, targets = finite_rows(outputs["scores"], outputs["targets"])
        if len(scores):
            self.draw(scores, targets, names, folder)

    # ------------------------------------------------------------------ data

    def check_data(self, data: Any) -> None:
        """Check that data fit the task and the model, as far as they are described.

        Args:
            data: A data module.

        Raises:
            DataError: If the kind of target, the class count or the image size do not fit.
        """
        check_target(type(self), data)
        super().check_data(data)
        if self.targets_needed and not self._targets_taken and (self._trains or self.targets_measured):
            self._take_from(data)

    def setup(self, stage: str) -> None:
        """Check the trainer's data before the first step, and take their targets where the loss needs them."""
        self._trains = stage == "fit"
        if self._trains:
            self._targets_taken = False
        super().setup(stage)
        if self._trains and self.head_start is not None:
            self.head_start.check(self, getattr(self.trainer, "datamodule", None))

    def _take_from(self, data: Any) -> None:
        targets = train_targets(data)
        if targets is None:
            return  # the data are not ready yet; `setup` comes here again
        self.take_targets(targets)
        self._targets_taken = True

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        images, targets = batch
        output, result = self.answered(images)
        scores = output.float()
        loss = self.with_method_loss(self.training_loss(scores, targets), batch, scores, result)
        self.train_metrics.update(*self.for_metrics(scores.detach(), targets))
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Measure a batch of the validation split and return its scores and targets."""
        return self._measure("validation", batch, self.validation_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Measure a batch of the test split and return its scores and targets."""
        return self._measure("test", batch, self.test_metrics)

    def _measure(self, split: str, batch: Batch, metrics: MetricCollection) -> dict[str, Tensor]:
        images, targets = batch
        scores = self(images).float()
        known = self.outputs_seen.known(scores)
        count, loss = int(known.sum()), scores.new_zeros(())  # in every process the same values are logged
        if count:
            loss = self.plain_loss(scores[known], targets[known])
            metrics.update(*self.for_metrics(scores[known], targets[known]))
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=count)
        self.log_dict(metrics, on_epoch=True, batch_size=len(targets))
        return {"scores": scores, "targets": targets}

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Compute probabilities or values (B, outputs)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.decode(self(images).float())

    def predictor(self) -> ScorePredictor:
        """Create the predictor of images: one row of values for each."""
        names = self.class_names()
        return ScorePredictor(
            lambda images: self.predict_step(images.to(self.device, non_blocking=True), 0),
            lambda values: self.row(values, names),
            self.columns(names),
            self.bank.notes(),
        )


def check_target(task: type[AdapterTask], data: Any) -> None:
    """Check that a task and data have the same kind of target, as far as both are described.

    Args:
        task: The task's class.
        data: A data module.

    Raises:
        DataError: If the kinds differ.
    """
    needed = getattr(task, "target", None)
    found = getattr(data, "target", needed)
    if needed is not None and found != needed:
        raise DataError(
            f"The data have targets of the kind {found!r}, and {task.__name__} needs {needed!r}. Use the task "
            f"{_TASK_OF.get(found, 'made for them')}, or other data."
        )


def train_targets(data: Any) -> Tensor | None:
    """Collect the targets of the training split, without its images where the data allow it.

    Args:
        data: A data module.

    Returns:
        All targets (N, ...), in the order of the split; None while the data are not set up.

    Raises:
        DataError: If they are only known after a random augmentation that changes them.
    """
    if not isinstance(data, LightningDataModule):
        return None
    try:
        split = data.split("train") if hasattr(data, "split") else data.train_dataloader().dataset
    except DataError:
        return None
    for name in ("targets", "labels"):
        known = getattr(split, name, None)
        if known is not None:
            return torch.as_tensor(known)
    if not hasattr(split, "__len__"):
        raise DataError(f"{type(data).__name__} is a stream, whose targets cannot all be seen before training.")
    loader = DataLoader(split, batch_size=256, num_workers=getattr(data, "num_workers", 0))
    return torch.cat([batch[1] for batch in loader])
