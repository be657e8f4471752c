"""``vispeft.train``: what ``vispeft train`` does, in one call from Python."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from vispeft.building.arguments import class_node
from vispeft.building.classes import find_class, import_class
from vispeft.building.config_files import read_config
from vispeft.cli import runs
from vispeft.cli.common import quiet_libraries
from vispeft.cli.config_keys import BASES, TOP_KEYS
from vispeft.cli.train import resume
from vispeft.cli.train import train as train_config
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.resources import find_config

__all__ = ["TASKS", "train"]

TASKS = {
    "classification": "classification/folder",
    "segmentation": "segmentation/folder",
    "multitask": "multitask/folder_mtlora",
    "metric_learning": "metric_learning/folder",
}
"""Packaged config for a folder of one's own, by task."""


def train(
    config: str | Path | None = None,
    *,
    task: str | None = None,
    model: str | None = None,
    data: str | Path | None = None,
    method: str | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    **overrides: Any,
) -> runs.Run:
    """Train an adapter as ``vispeft train`` does, with the same result bit for bit, and return the finished run.

    A run that was stopped in `out` is gone on with. With several devices the calling script is started once for each of
    them, as Lightning does it; only the first process returns from here, and the others end.

    Args:
        config: Name of a packaged config, or a YAML file; instead of `task`.
        task: ``classification``, ``segmentation``, ``multitask`` or ``metric_learning``: trains on a folder of one's
            own by the packaged config for it. Default ``classification``.
        model: Backbone instead of the config's: a name of timm, or ``zoo:NAME``.
        data: Folder of the images, or file, instead of the config's (``data.root``).
        method: Method instead of the config's: a name, or a YAML file.
        init: Adapter to start from: ``zoo:NAME``, or a directory.
        out: Run directory; None takes ``runs/<config name>/<n>``.
        overrides: Further keys. A name without a point is a setting of the task, the data or the trainer
            (``lr=1e-3``, ``batch_size=16``, ``max_epochs=5``), or a key of the top level
            (``checkpoints={"minutes": 1}``); others are given by their path, as ``**{"model.method.rank": 4}``.

    Returns:
        The run: ``path``, ``metrics``, and ``figures(split)``.

    Raises:
        ConfigError: If both a config and a task are given, or a name belongs to several sections.
        UnknownNameError: If a name is unknown.
        VispeftError: If training is refused or fails, as with ``vispeft train``.
    """
    if config is not None and task is not None:
        raise ConfigError(f"Both config={str(config)!r} and task={task!r} were given. Give one of them.")
    task = task or "classification"
    if config is None and task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    source = find_config(str(config) if config is not None else TASKS[task])
    given: dict[str, Any] = {}
    for key, value in (("init", init), ("model.method", method), ("model.backbone", model), ("data.root", data)):
        if value is not None:
            given[key] = str(value)
    if model is not None and model.startswith("zoo:"):
        given["model.backbone_args"] = {}  # such as `pretrained`: the zoo's backbones have their weights
    tree = read_config(source)
    given |= {name if "." in name else _placed(name, tree): value for name, value in overrides.items()}
    tokens = [f"--{key}={_written(value)}" for key, value in given.items()]
    command = shlex.join(["vispeft", "train", str(config) if config is not None else TASKS[task], *tokens])
    quiet_libraries()
    if out is not None and os.path.isdir(out) and runs.begun(out):
        place = resume(out, source, tokens, command=command)
    else:
        place = train_config(source, tokens, out=out, command=command)
    return runs.Run.open(place)


def _written(value: Any) -> str:
    """Write a value as the command line takes it: words as they are, all else as JSON, which YAML reads."""
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{value!r} cannot stand in a config: numbers, texts, lists and mappings can.") from error


def _placed(name: str, tree: Mapping[str, Any]) -> str:
    """Return the path of a setting from its name alone.

    Raises:
        ConfigError: If several sections have it.
        UnknownNameError: If none has it.
    """
    if name in TOP_KEYS:
        return name
    known = {section: _settings(tree, section) for section in BASES}
    known["trainer"] = set(inspect.signature(Trainer).parameters)
    found = [section for section, names in known.items() if name in names]
    if len(found) > 1:
        told = " and ".join(f"{section}.{name}" for section in found)
        raise ConfigError(f"{name} is a setting of several sections: {told}. Give one by its path.")
    if not found:
        raise UnknownNameError("setting", name, sorted(set().union(*known.values())))
    return f"{found[0]}.{name}"


def _settings(tree: Mapping[str, Any], section: str) -> set[str]:
    """Names of the arguments of a section's class and its bases."""
    if section not in tree:
        return set()
    root, kind = BASES[section]
    named = class_node(tree[section], kind, section)["class_path"]
    names: set[str] = set()
    for base in import_class(find_class(str(named), root, kind=kind, place=section)).__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return names - {"self", "args", "kwargs", "settings"}
