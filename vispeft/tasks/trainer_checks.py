"""Checks of a trainer before a task trains: precisions and callbacks that no task supports, and its epochs."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from vispeft.errors import ConfigError

__all__ = ["check_averaging", "check_precision", "check_schedule", "steps_per_epoch"]


def check_precision(precision: Any) -> None:
    """Refuse precisions that convert the whole task, adapter and optimiser included.

    Args:
        precision: The trainer's setting; None for the default.

    Raises:
        ConfigError: If it is one of them.
    """
    wanted = str(precision)
    if wanted in _WHOLE:
        raise ConfigError(
            f"trainer.precision is {wanted}, which converts the adapter with the backbone, and an adapter trains in "
            "float32. Leave it out and set model.base_dtype to bfloat16, with which the frozen backbone takes half the "
            "memory, or give bf16-mixed, with which it computes in half precision."
        )


def check_averaging(trainer: Any) -> None:
    """Refuse Lightning's own averages, which keep a copy of the whole task and cannot be resumed without it.

    Args:
        trainer: The trainer.

    Raises:
        ConfigError: If one of its callbacks is such an average.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ConfigError(
                f"The callback {type(callback).__name__} averages a copy of the whole model, and checkpoints hold only "
                "what is trained, so that the run could not be resumed. Leave it out and set ema (model.ema 0.999): "
                "that average is validated, kept and resumed."
            )


def check_schedule(schedule_epochs: int | None, max_epochs: int | None) -> None:
    """Refuse a schedule that ends before the training.

    Args:
        schedule_epochs: Epochs from the start of the training to the end of the decay; None for those of the training.
        max_epochs: The trainer's setting; None or -1 where it has none.

    Raises:
        ConfigError: If the schedule is shorter.
    """
    if schedule_epochs is not None and max_epochs is not None and schedule_epochs < max_epochs:
        raise ConfigError(
            f"model.schedule_epochs is {schedule_epochs} and trainer.max_epochs {max_epochs}: the learning rate would "
            "have reached its end before the training does. Give as many epochs or more, or leave "
            "model.schedule_epochs out (null)."
        )


def steps_per_epoch(trainer: Any) -> int:
    """Count the steps of the optimiser in an epoch.

    Args:
        trainer: The trainer.

    Raises:
        ConfigError: If the training data do not say how many batches they have.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ConfigError(
            "schedule_epochs was given, and the training data do not say how many batches an epoch has. Leave it out, "
            "and the schedule has the length of the training."
        )
    return math.ceil(batches / trainer.accumulate_grad_batches)


_WHOLE = ("bf16-true", "16-true", "64-true", "64", "transformer-engine", "transformer-engine-float16")
"""Precisions of Lightning that convert a module's parameters."""
