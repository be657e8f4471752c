"""The trackers of a run: which ones its config names, what they are told, and in which of their runs they go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger

from vispeft.building.classes import import_class
from vispeft.building.config_files import Node
from vispeft.cli import runs
from vispeft.cli.config import ConfigCLI
from vispeft.errors import ConfigError
from vispeft.tasks.trackers import Tracker, goes_on_by

__all__ = ["check_trackers", "make_trackers", "tracked"]

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "TrackioLogger": "trackio"}
"""Packages of loggers."""
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""How long MLflow asks a server that is gone, unless the environment says otherwise: its own are minutes per value."""


def check_trackers(nodes: Sequence[Node]) -> None:
    """Refuse trackers whose package is missing.

    Args:
        nodes: Class and arguments of each.

    Raises:
        ConfigError: If one is.
    """
    for node in nodes:
        bases = [base.__name__ for base in import_class(node["class_path"]).__mro__]
        needed = next((PACKAGES[name] for name in bases if name in PACKAGES), None)
        if needed is not None and find_spec(needed) is None:
            raise ConfigError(
                f"trainer.logger is {bases[0]}, which needs the package {needed}, and that is not installed. Install "
                f"it (pip install {needed}), or all trackers: pip install 'vispeft[trackers]'."
            )


def make_trackers(place: Path, cli: ConfigCLI) -> list[Tracker]:
    """Make the trackers of a run, which are not started yet.

    Args:
        place: The run directory, which says which of their runs they go on in.
        cli: The run's config.
    """
    earlier = _read(place)
    made = []
    for node in cli.trackers:
        known = next((entry for entry in earlier if entry["class"] == node["class_path"]), None)
        if known is not None:
            earlier.remove(known)
        made.append(_tracker(node, None if known is None else known["version"]))
    return made


def _tracker(node: Node, version: str | int | None) -> Tracker:
    cls: type[Logger] = import_class(node["class_path"])
    settings, argument = dict(node.get("init_args") or {}), goes_on_by(cls)
    if version is not None and argument is not None and settings.get(argument) is None:
        settings[argument] = version
    return Tracker(cls.__name__, partial(cls, **settings))


@contextmanager
def tracked(place: Path, trainer: Trainer, cli: ConfigCLI) -> Iterator[None]:
    """Start the trackers of a run, tell them its config, and at its end its figures.

    Args:
        place: The run directory.
        trainer: The trainer, which has them among its loggers.
        cli: The run's config.

    Raises:
        ConfigError: If one cannot be started.
    """
    trackers = [log for log in trainer.loggers if isinstance(log, Tracker)]
    status = "failed"
    try:
        _start(trackers, place, cli)
        yield
        status = "success"
    finally:
        done = runs.Run.open(place) if trackers and status == "success" else None
        for tracker in trackers:
            if done is None:
                tracker.close(status)
            else:
                tracker.close(status, _final(done), int(done.number("steps")))


def _start(trackers: Sequence[Tracker], place: Path, cli: ConfigCLI) -> None:
    if not trackers:
        return
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    known, config = _read(place), yaml.safe_load(cli.resolved())
    entries = []
    for tracker, node in zip(trackers, cli.trackers, strict=True):
        entry = {"class": node["class_path"], "version": tracker.start()}
        if entry not in known:  # a run of the tracker's that goes on has the config already
            tracker.log_hyperparams(config)
        entries.append(entry)
    runs.write_json(place / runs.TRACKERS, {"trackers": entries})


def _read(place: Path) -> list[dict[str, Any]]:
    """Read which runs the trackers have begun; nothing where the file is missing or was altered."""
    try:
        found = json.loads((place / runs.TRACKERS).read_text(encoding="utf-8"))["trackers"]
        return [entry for entry in found if isinstance(entry["version"], str | int) and entry["class"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _final(run: runs.Run) -> dict[str, float]:
    """Return the figures of the run's result, by names that no epoch has."""
    found: Mapping[str, Mapping[str, Any]] = {split: run.figures(split) for split in ("validation", "test")}
    return {
        f"final/{split}/{name}": float(value)
        for split, values in found.items()
        for name, value in values.items()
        if value is not None
    }
