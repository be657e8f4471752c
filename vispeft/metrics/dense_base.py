"""The base of metrics of dense tasks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from vispeft.data.dense_checks import check_batch
from vispeft.data.dense_targets import DenseTarget
from vispeft.metrics.sums import sum_type

__all__ = ["DenseMetric"]


class DenseMetric(Metric):
    """A metric of one dense task: outputs and labels in, named figures out; NaN where nothing was labelled."""

    is_differentiable = False
    full_state_update = False

    main: ClassVar[str]
    """Name of the figure that stands for the task."""

    def __init__(self, target: DenseTarget, name: str, **settings: Any) -> None:
        """Store the task.

        Args:
            target: Description of the task.
            name: Name of the task, for messages.
            settings: Settings of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.target, self.name = target, name

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add the images of a batch, of which there may be one.

        Args:
            outputs: Scores or values (B, channels, h, w) at the labels' size.
            labels: Labels in the form that `DenseTarget` describes.

        Raises:
            DataError: If outputs or labels do not have the form of the task.
        """
        check_batch(self.target, self.name, outputs, labels)
        self.add(outputs.float(), labels)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add the images of a batch that was checked.

        Args:
            outputs: Scores or values (B, channels, h, w) in float32.
            labels: Labels in the form that `DenseTarget` describes.
        """
        raise NotImplementedError

    def add_sums(self, name: str, *shape: int) -> None:
        """Add a state of floating-point sums.

        Args:
            name: Name of the state.
            shape: Its shape.
        """
        self.add_state(name, torch.zeros(shape, dtype=sum_type()), dist_reduce_fx="sum")

    def add_counts(self, name: str, *shape: int) -> None:
        """Add a state of counts.

        Args:
            name: Name of the state.
            shape: Its shape.
        """
        self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
