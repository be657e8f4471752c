"""Learning rates over the steps of a training."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vispeft.errors import ConfigError

__all__ = ["warmup_cosine", "warmup_cosine_factor"]


def warmup_cosine_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Compute the share of the highest learning rate that a step is taken with.

    It rises in equal parts over the warm-up, reaches 1 with its last step, and falls along half a cosine towards 0,
    which it would reach one step after the last, so that no step is wasted on a rate of zero.

    Args:
        step: The step, counted from zero.
        steps: Steps of the whole training.
        warmup_steps: Steps of the warm-up.

    Returns:
        A number from 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Make the schedule for an optimiser, to be stepped after each of its steps.

    Args:
        optimizer: The optimiser; each group falls from its own learning rate.
        steps: Steps of the whole training.
        warmup: Share of the steps in which the rate rises, from 0 up to, not including, 1.

    Raises:
        ConfigError: If the training has no end, or the warm-up leaves nothing of it.
    """
    if not math.isfinite(steps) or steps < 1:
        raise ConfigError(
            f"A cosine schedule needs to know its end, and this training has {steps} steps. "
            "Give trainer.max_epochs or trainer.max_steps, at least 1."
        )
    if not 0 <= warmup < 1:
        raise ConfigError(f"warmup is {warmup}; give a share of all steps, from 0 up to, not including, 1.")
    factor = partial(warmup_cosine_factor, steps=int(steps), warmup_steps=round(warmup * steps))
    return LambdaLR(optimizer, factor)
