"""Checks of a trainer before a task trains: precisions and callbacks that no task supports."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from vispeft.errors import ConfigError

__all__ = ["check_averaging", "check_precision"]


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


_WHOLE = ("bf16-true", "16-true", "64-true", "64", "transformer-engine", "transformer-engine-float16")
"""Precisions of Lightning that convert a module's parameters."""
