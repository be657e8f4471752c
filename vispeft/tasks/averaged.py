"""Optimisers that train at one point and are measured at another, the average of their steps (schedule-free ones)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vispeft.errors import ConfigError
from vispeft.tasks.optimizers import is_schedule_free

__all__ = ["AveragedWeights", "averaged_weights", "check_schedule_free", "ends_of"]


def check_schedule_free(node: dict[str, Any], ema: float, final_lr: float | None) -> dict[str, Any]:
    """Refuse settings that a schedule-free optimiser replaces.

    Args:
        node: The optimiser, as `optimizer_node` returns it.
        ema: Decay of an average of the weights; 0 for none.
        final_lr: Learning rate at the end of a decay; None for none.

    Returns:
        The optimiser.

    Raises:
        ConfigError: If there is one.
    """
    if is_schedule_free(node) and (ema or final_lr is not None):
        asked = f"ema={ema:g}" if ema else f"final_lr={final_lr:g}"
        raise ConfigError(
            f"{asked} was given with {node['class_path']}, which averages its steps by itself and keeps the learning "
            "rate after the warm-up. Leave it out."
        )
    return node


def ends_of(task: Any) -> tuple[float, float]:
    """Return the learning rates at both ends of a training, relative to the highest: no decay without a schedule.

    Args:
        task: The task.
    """
    first, last = task.lr_ends
    return (first, 1.0 if is_schedule_free(task.optimizer) else last)


def averaged_weights(task: Any) -> AveragedWeights | None:
    """Create the callback that a task needs for its optimiser.

    Args:
        task: The task.
    """
    return AveragedWeights() if is_schedule_free(task.optimizer) else None


class AveragedWeights(Callback):
    """Put the average into the model for validation and for what is kept, and the point of training for each step.

    Checkpoints between two steps hold the point of training; those of the best epoch, which are written right after a
    validation, hold the average, as does the model when training ends.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on at the point of training."""
        _switch(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the average."""
        _switch(trainer, "eval")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model, to be saved."""
        _switch(trainer, "eval")


def _switch(trainer: Trainer, mode: str) -> None:
    for optimizer in trainer.optimizers:
        getattr(optimizer, mode)()
