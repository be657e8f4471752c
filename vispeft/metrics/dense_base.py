"""The base of metrics of dense tasks."""

from __future__ import annotations

from collections.abc import Mapping
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
    SUMS: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Shapes of the states of floating-point sums, by name."""
    COUNTS: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Shapes of the states of counts, by name."""

    def __init__(self, target: DenseTarget, name: str, **settings: Any) -> None:
        """Store the task, and create the states, all of them zero.

        Args:
            target: Description of the task.
            name: Name of the task, for messages.
            settings: Settings of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.target, self.name = target, name
        for states, dtype in ((self.SUMS, sum_type()), (self.COUNTS, torch.long)):
            for state, shape in states.items():
                self.add_state(state, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

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
