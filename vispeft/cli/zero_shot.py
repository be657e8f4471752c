"""The option of commands that let class embeddings classify in place of a trained classifier."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vispeft.building.config_files import read_config
from vispeft.cli.config import ConfigCLI
from vispeft.errors import ConfigError
from vispeft.resources import find_config
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.classification import Classification
from vispeft.zoo.adapters import PREFIX

__all__ = ["add_classes", "classified", "config_without_adapter", "is_run"]


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--classes``.

    Args:
        parser: A command's parser.
    """
    told = "class embeddings that classify instead of the run's classifier; RUN may then be a config: no adapter"
    parser.add_argument("--classes", metavar="FILE", help=told)


def is_run(place: str) -> bool:
    """Return whether a run is named, and not a config.

    Args:
        place: A run directory, ``zoo:NAME``, or a config.
    """
    return place.startswith(PREFIX) or Path(place).is_dir()


def classified(task: AdapterTask, classes: ClassEmbeddings) -> None:
    """Let class embeddings classify.

    Args:
        task: A task with its adapter.
        classes: The embeddings, in the order of the outputs.

    Raises:
        ConfigError: If the task has no classes, or the embeddings do not fit.
    """
    if not isinstance(task, Classification):
        raise ConfigError(
            f"--classes was given for the task {type(task).__name__}; class embeddings tell one class from others, as "
            "Classification does. Leave the option out."
        )
    task.classify_by(classes)


def config_without_adapter(place: str, overrides: Sequence[str]) -> ConfigCLI:
    """Create the objects of a config whose method is left out: the frozen backbone with a classifier.

    Args:
        place: The config.
        overrides: Changes of its values.

    Returns:
        The config's objects; its trainer only evaluates.

    Raises:
        ConfigError: If a key is unknown, or a value has the wrong type or is out of range.
    """
    config = find_config(place)
    tree = read_config(config)
    model = tree.get("model")
    settings = model.get("init_args") if isinstance(model, dict) else None
    if isinstance(settings, dict):
        settings["method"] = {"class_path": "vispeft.LinearProbe"}
        settings.pop("head_start", None)
    cli = ConfigCLI(config, overrides, tree=tree)
    cli.model.eval()
    return cli
