"""Figures of single-task models that several tasks are compared with, and the score without them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.metrics import delta_m

__all__ = ["Baselines", "mean_gain", "mean_score", "measured", "read_baselines"]

METRICS = "metrics.json"
"""File of a run with its figures."""
SPLITS = ("validation", "test")
LEAST = 1e-3
"""Figures are at least this in a mean of logarithms, or a single one of zero would hide all others."""

Baselines = dict[str, dict[str, float]]
"""Figure by split and task; empty without baselines."""


def read_baselines(given: Mapping[str, float | str] | str | None, mains: Mapping[str, str]) -> Baselines:
    """Read the figures of single-task models.

    Args:
        given: A figure by task, which counts for both splits, or the directory of a run that measured the task; or one
            run that measured all; None for no baselines.
        mains: The figure that counts, by task, such as ``miou``.

    Raises:
        UnknownNameError: If a task is unknown.
        ConfigError: If a task has none, or a figure is not finite and above zero.
        FileError: If a run has no such figure.
    """
    if given is None:
        return {}
    named = dict.fromkeys(mains, given) if isinstance(given, str) else dict(given)
    for task in named:
        if task not in mains:
            raise UnknownNameError("task of baselines", task, mains)
    missing = [task for task in mains if task not in named]
    if missing:
        raise ConfigError(
            f"baselines has no figure for {', '.join(missing)}, and delta m is a mean over all tasks. Give one for "
            "each, or none at all."
        )
    found: Baselines = {split: {} for split in SPLITS}
    for task, value in named.items():
        for split in SPLITS:
            number = _from_run(value, split, task, mains[task]) if isinstance(value, str) else float(value)
            if not (math.isfinite(number) and number > 0):
                raise ConfigError(f"baselines[{task!r}] is {number}; delta m divides by it. Give a figure above 0.")
            found[split][task] = number
    return found


def _from_run(run: str, split: str, task: str, main: str) -> float:
    path = Path(run) / METRICS
    try:
        metrics: Any = json.loads(path.read_text(encoding="utf-8"))
        return float(metrics[split][f"{task}/{main}"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"baselines[{task!r}] is {run!r}, and {path} does not have {task}/{main} of the {split} split "
            f"({type(error).__name__}). Give the directory of a finished run that has the task, or a figure."
        ) from error


def mean_score(figures: Mapping[str, Tensor], higher_is_better: Mapping[str, bool]) -> Tensor:
    """Compute the geometric mean of one figure per task, of its inverse where less is better.

    To first order it changes as delta m does, whatever the baselines are: delta m is the mean of the relative changes,
    this the exponential of the mean of their logarithms. So it can choose an epoch where there are no baselines.

    Args:
        figures: The figure that counts by task, from 0; see `measured` for those that are NaN.
        higher_is_better: Whether more is better, by task.

    Returns:
        A scalar; NaN if nothing was measured.
    """
    logs = [
        value.double().clamp(min=LEAST).log() * (1 if higher_is_better[task] else -1)
        for task, value in measured(figures).items()
    ]
    return torch.stack(logs).mean().exp().float() if logs else torch.tensor(math.nan)


def mean_gain(
    figures: Mapping[str, Tensor], baselines: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> Tensor:
    """Compute delta m, in percent.

    Args:
        figures: The figure that counts by task; see `measured` for those that are NaN.
        baselines: Figure of a single-task model, by task.
        higher_is_better: Whether more is better, by task.

    Returns:
        A scalar; NaN if nothing was measured.
    """
    values = {task: float(value) for task, value in measured(figures).items()}
    if not values:
        return torch.tensor(math.nan)
    named = ({task: given[task] for task in values} for given in (baselines, higher_is_better))
    return torch.tensor(delta_m(values, *named))


def measured(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tasks whose figure is NaN, as no pixel of the split has a label; a mean is then one of the others.

    Args:
        figures: The figure that counts by task.
    """
    return {task: value for task, value in figures.items() if not torch.isnan(value)}
