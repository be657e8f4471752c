"""Learning rates over the steps of a training."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vispeft.errors import ConfigError, counted

__all__ = ["DECAYS", "check_decay", "warmup_cosine", "warmup_decay", "warmup_factor"]

POWER = 0.9
"""Exponent of the polynomial decay, as in DeepLab (arXiv 1606.00915) and most recipes of mmsegmentation."""


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _poly(progress: float) -> float:
    return float((1 - progress) ** POWER)


DECAYS = {"cosine": _cosine, "poly": _poly}
"""How the learning rate falls from 1 to 0 after the warm-up, by name."""


def check_decay(task: str, schedule: str) -> None:
    """Refuse an unknown decay.

    Args:
        task: The class that was asked, for the message.
        schedule: The name that it got.

    Raises:
        ConfigError: If there is no such decay.
    """
    if schedule not in DECAYS:
        raise ConfigError(f"{task}(schedule={schedule!r}): choose {' or '.join(sorted(DECAYS))}.")


def warmup_factor(
    step: int,
    steps: int,
    warmup_steps: int,
    decay: str = "cosine",
    ends: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Compute a step's learning rate as a fraction of the highest one.

    It rises linearly over the warm-up, reaches 1 with its last step, and falls along half a cosine or a polynomial
    towards the last fraction, which it would reach one step after the last, so that no step is wasted on a rate of
    zero. A warm-up that starts above zero starts there with the first step, and reaches 1 with the step behind the
    warm-up, as timm's schedulers do.

    Args:
        step: The step, counted from zero.
        steps: Steps from the start of the training to the end of the decay.
        warmup_steps: Steps of the warm-up.
        decay: A key of `DECAYS`.
        ends: Fractions at the start of the warm-up and at the end of the decay, from 0 to 1.

    Returns:
        A number from 0 to 1.
    """
    first, last = ends
    if step < warmup_steps:
        return first + (1 - first) * step / warmup_steps if first else (step + 1) / warmup_steps
    return last + (1 - last) * DECAYS[decay](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))


def warmup_decay(
    optimizer: Optimizer,
    steps: int,
    warmup: float,
    decay: str,
    ends: tuple[float, float] = (0.0, 0.0),
    *,
    length: int | None = None,
    final_lr: float | None = None,
) -> LambdaLR:
    """Create the schedule of an optimiser, to be stepped after each of its steps.

    Args:
        optimizer: The optimiser; each group falls from its own learning rate.
        steps: Steps of the whole training.
        warmup: Fraction of the steps in which the rate rises, from 0 up to, not including, 1.
        decay: A key of `DECAYS`.
        ends: Fractions of the highest rate at the start of the warm-up and at the end of the decay, from 0 to 1.
        length: Steps from the start of the training to the end of the decay, at least `steps`; None for `steps`. A
            longer decay is cut off by the end of the training.
        final_lr: Learning rate of all groups at the end of the decay, at most that of each; None takes the fraction in
            `ends`.

    Raises:
        ConfigError: If the training has no end, the warm-up leaves nothing of it, the decay ends before it, or a rate
            would rise to its end.
    """
    if not math.isfinite(steps) or steps < 1:
        raise ConfigError(
            f"A {decay} schedule needs to know its end, and this training has {counted(steps, 'step')}. "
            "Give trainer.max_epochs or trainer.max_steps, at least 1."
        )
    if not 0 <= warmup < 1:
        raise ConfigError(f"warmup is {warmup}; give a share of all steps, from 0 up to, not including, 1.")
    if length is not None and length < steps:
        raise ConfigError(
            f"The schedule has {counted(length, 'step')} (schedule_epochs), and the training has {steps}. Make the "
            "schedule as long as the training or longer, or leave schedule_epochs out."
        )
    factors = [
        partial(
            warmup_factor,
            steps=int(steps if length is None else length),
            warmup_steps=round(warmup * steps),
            decay=decay,
            ends=(ends[0], ends[1] if final_lr is None else _share(final_lr, group)),
        )
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, factors)


def _share(final_lr: float, group: dict[str, Any]) -> float:
    """Return the final learning rate as a fraction of the highest one of a group."""
    if final_lr > group["lr"]:
        raise ConfigError(
            f"final_lr is {final_lr:g}, and the highest learning rate of the group {group.get('name', '')!r} is "
            f"{group['lr']:g}. Make final_lr smaller, or give the share lr_ends."
        )
    return final_lr / float(group["lr"])


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Create the cosine schedule; see `warmup_decay`.

    Args:
        optimizer: The optimiser.
        steps: Steps of the whole training.
        warmup: Fraction of the steps in which the rate rises.
    """
    return warmup_decay(optimizer, steps, warmup, "cosine")
