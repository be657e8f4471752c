"""Figures of single-task models that several tasks are compared with, where they come from, and the score without."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.errors import ConfigError, DataError, FileError, UnknownNameError
from vispeft.metrics import delta_m

__all__ = ["MEASURED_ON", "Baselines", "Facts", "compared", "mean_gain", "mean_score", "measured", "read_baselines"]

METRICS = "metrics.json"
"""File of a run with its figures."""
MEASURED_ON = "measured_on"
"""Entry of that file that says on what each task was measured."""
SPLITS = ("validation", "test")
ALIKE = {
    "data": "data of {there} there and of {here} here",
    "size": "images of {there} pixels there and {here} here",
    "images": "{there} {split} images there and {here} here",
    "names": "other {split} images",
    "contents": "other pixels or labels of the {split} images",
    "absent": "absent classes by {there!r} there and {here!r} here",
}
"""What figures need in common to be compared, with the words for a difference."""
LEAST = 1e-3
"""Figures are at least this in a mean of logarithms, or a single one of zero would hide all others."""

Facts = Mapping[str, Any]
"""What a figure was measured on: a result of `ImageData.measured_on`, ``absent`` for classes, and ``measured``, the
number of images, where it was a part of the split."""


@dataclass(frozen=True)
class Baselines:
    """Figures of single-task models, and what they were measured on."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figure by split and task; empty without baselines."""
    runs: dict[str, str] = field(default_factory=dict)
    """The run by task, of those that were read from one; a given figure has none and counts as it is."""
    facts: dict[str, dict[str, Facts]] = field(default_factory=dict)
    """What it was measured on, by task and split; empty for runs of earlier versions."""
    recalled: bool = False
    """Whether they are those of a finished run that is measured again."""

    def __bool__(self) -> bool:
        return bool(self.figures)

    def of(self, split: str) -> dict[str, float]:
        """Return the figure of each task for a split; empty without baselines.

        Args:
            split: validation or test.
        """
        return self.figures.get(split, {})

    @classmethod
    def recall(cls, run: str, metrics: Mapping[str, Any]) -> Baselines:
        """Return the baselines of a finished run, from its own ``metrics.json``: theirs may be gone by now.

        Args:
            run: Name of the run, for messages.
            metrics: Content of the file.
        """
        given = metrics.get("baselines")
        figures = {
            split: {task: float(value) for task, value in found.items() if isinstance(value, int | float)}
            for split, found in (given.items() if isinstance(given, Mapping) else ())
            if isinstance(found, Mapping)
        }
        tasks = dict.fromkeys(task for found in figures.values() for task in found)
        return cls(figures, dict.fromkeys(tasks, run), {task: _facts(metrics, task) for task in tasks}, recalled=True)

    def unlike(self, here: Mapping[str, Mapping[str, Facts]]) -> list[str]:
        """List the runs that measured a task on something else, with what differs.

        Args:
            here: What this task's figures are measured on, by task and split.
        """
        found: dict[str, dict[str, None]] = {}
        for task, run in self.runs.items():
            for split in SPLITS:
                there, own = (facts.get(task, {}).get(split, {}) for facts in (self.facts, here))
                found.setdefault(f"{run} ({task})", {}).update(dict.fromkeys(_differing(there, own, split)))
        return [f"{run}: {'; '.join(said)}" for run, said in found.items() if said]

    def partial(self) -> list[str]:
        """List the runs that measured a part of a split, with the numbers of images."""
        return [
            f"{run} ({task}) measured {facts['measured']} of {facts.get('images')} images of the {split} split"
            for task, run in self.runs.items()
            for split, facts in self.facts.get(task, {}).items()
            if "measured" in facts
        ]

    def unknown(self, here: Mapping[str, Mapping[str, Facts]]) -> list[str]:
        """List the runs of which nothing is known that could be compared.

        Args:
            here: What this task's figures are measured on, by task and split; empty for data that do not say.
        """
        return [f"{run} ({task})" for task, run in self.runs.items() if not self.facts.get(task) or not here.get(task)]


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
        return Baselines()
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
    found: dict[str, dict[str, float]] = {split: {} for split in SPLITS}
    facts: dict[str, dict[str, Facts]] = {}
    for task, value in named.items():
        by_split = dict.fromkeys(SPLITS, value)
        if isinstance(value, str):
            by_split, facts[task] = _from_run(value, task, mains[task])
        for split, given_number in by_split.items():
            number = float(given_number)
            if not (math.isfinite(number) and number > 0):
                raise ConfigError(f"baselines[{task!r}] is {number}; delta m divides by it. Give a figure above 0.")
            found[split][task] = number
    runs = {task: value for task, value in named.items() if isinstance(value, str)}
    return Baselines(found, runs, facts)


def compared(baselines: Baselines, here: Mapping[str, Mapping[str, Facts]]) -> tuple[Baselines, list[str]]:
    """Check that figures of single-task models are of the images and labels that are measured now.

    Args:
        baselines: The figures.
        here: What each task is measured on, by split; empty for data that do not say.

    Returns:
        The baselines, without figures where a finished run is measured on other data; and what to warn of.

    Raises:
        DataError: If a run that gives a baseline measured something else.
    """
    other = baselines.unlike(here)
    if other and baselines.recalled:
        return Baselines(), [f"delta m is left out, since its baselines were not measured on these data. {other[0]}."]
    if other:
        raise DataError(
            f"Delta m compares figures of the same images and labels, and baselines were measured on others. "
            f"{'. '.join(other)}. Train the single-task models on these data, or give their figures themselves "
            "(baselines: {TASK: FIGURE}), which count as they are."
        )
    said = [f"{found}; delta m compares with that." for found in baselines.partial()]
    if unknown := baselines.unknown(here):
        said.append(
            f"Whether the baselines of delta m were measured on these data is not known: {', '.join(unknown)}. Runs of "
            "earlier versions, and data modules of one's own, do not say what they measure."
        )
    return baselines, said


def _facts(metrics: Mapping[str, Any], task: str) -> dict[str, Facts]:
    """Return what a run measured a task on, by split, as far as its ``metrics.json`` says so."""
    found: Any = metrics
    for key in (MEASURED_ON, task):
        found = found.get(key) if isinstance(found, Mapping) else None
    by_split = found.items() if isinstance(found, Mapping) else ()
    return {split: facts for split, facts in by_split if isinstance(facts, Mapping)}


def _differing(there: Facts, here: Facts, split: str) -> list[str]:
    """Say what differs between two results of `ImageData.measured_on`, as far as both know it."""
    known = [name for name in ALIKE if None not in (there.get(name), here.get(name))]
    other = {name for name in known if there[name] != here[name]}
    if "contents" in known and "contents" not in other:
        other -= {"data", "names"}  # the same pixels and labels, kept elsewhere
    if "images" in other:
        other -= {"names", "contents"}
    if "names" in other:
        other -= {"contents"}
    values = {name: {"there": _shown(there[name]), "here": _shown(here[name])} for name in other}
    return [ALIKE[name].format(**values[name], split=split) for name in ALIKE if name in other]


def _shown(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _from_run(run: str, task: str, main: str) -> tuple[dict[str, float], dict[str, Facts]]:
    """Read the figure of a task by split, and what it was measured on."""
    path, found, lacking = Path(run) / METRICS, {}, " and ".join(SPLITS)
    try:
        metrics: Any = json.loads(path.read_text(encoding="utf-8"))
        for split in SPLITS:
            lacking = split
            found[split] = float(metrics[split][f"{task}/{main}"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"baselines[{task!r}] is {run!r}, and {path} does not have {task}/{main} of the {lacking} split "
            f"({type(error).__name__}). Give the directory of a finished run that has the task, or a figure."
        ) from error
    return found, _facts(metrics, task)


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
