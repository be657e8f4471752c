"""Checks of the numbers that a task is made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vispeft.errors import ConfigError

__all__ = ["check_numbers"]


def check_numbers(kind: type[Any], settings: Mapping[str, Any]) -> None:
    """Refuse numbers out of range, and two ends of one schedule.

    Args:
        kind: Class of the task.
        settings: Settings of `AdapterTask` by name, at least those of the table below and ``num_classes``.

    Raises:
        ConfigError: If one is out of range, or they exclude each other.
    """
    rules = {**_RULES, "num_classes": (f"at least {kind.least_outputs}", lambda value: value >= kind.least_outputs)}
    for name, (needed, good) in rules.items():
        if not good(settings[name]):
            raise ConfigError(f"{kind.__name__}({name}={settings[name]}): {needed} is needed.")
    final, share = settings["final_lr"], settings["lr_ends"][1]
    if final is not None and (share or final > settings["lr"]):
        raise ConfigError(
            f"{kind.__name__}(final_lr={final}): lr is {settings['lr']}, and lr_ends ends at {share}. Give a final_lr "
            "of at most lr, or a share in lr_ends, not both."
        )


_LARGEST = torch.finfo(torch.float32).max
"""Largest learning rate that an optimiser can multiply float32 tensors with."""
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number above 0 that float32 can hold", lambda value: 0 < value <= _LARGEST),
    "lr_ends": (
        "two shares of lr, each from 0 to 1,",
        lambda value: len(value) == 2 and all(0 <= end <= 1 for end in value),
    ),
    "final_lr": ("a learning rate from 0 on, or None,", lambda value: value is None or 0 <= value < math.inf),
    "schedule_epochs": (
        "a whole number of epochs, at least 1, or None,",
        lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
    ),
    "weight_decay": ("a finite number from 0", lambda value: 0 <= value < math.inf),
    "base_dtype": ("float32 or bfloat16", lambda value: value in ("float32", "bfloat16")),
    "layer_decay": ("a share above 0, at most 1,", lambda value: 0 < value <= 1),
    "ema": ("a decay from 0 up to, not including, 1,", lambda value: 0 <= value < 1),
    "warmup": ("a share of all steps, from 0 up to, not including, 1,", lambda value: 0 <= value < 1),
}
"""What each setting needs, in words and as a function."""
