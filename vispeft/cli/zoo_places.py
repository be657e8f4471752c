"""Files of a pulled adapter's config: what it may name, and what is read only where the user names it.

A config of others could name any file or folder of this machine. So those of its data are read only if the user names
them anew, and what it names inside of such a folder stays inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from vispeft.adapters.fitting import FILE_FIELDS
from vispeft.building.config_files import Node
from vispeft.cli.config_keys import split_overrides
from vispeft.errors import ConfigError, DataError
from vispeft.storage.form import shown

__all__ = ["INSIDE", "PLACES", "check_named", "check_places"]

PLACES = (
    *("root", "train_list", "validation_list", "test_list", "query_list", "gallery_list"),
    *("train_shards", "validation_shards", "test_shards"),
)
"""Arguments of data modules that name files or folders of this machine."""
INSIDE = ("images", "masks", "image_suffix", "mask_suffix", "folder")
"""Arguments of data modules that name something inside of `root`; likewise the names of the tasks in `labels`."""


def check_places(tree: Node) -> None:
    """Refuse a config of others that names a file for its method, or leaves the folder of its data.

    Args:
        tree: The config, before any of its keys is checked or followed.

    Raises:
        ConfigError: If it does.
    """
    model, data = _settings(tree, "model"), _settings(tree, "data")
    method = model.get("method")
    name = method.get("class_path") if isinstance(method, Mapping) else method
    if isinstance(name, str) and (name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name):
        raise ConfigError(f"model.method is the file {shown(name)}; a pulled adapter names a method.")
    fields = method.get("init_args") if isinstance(method, Mapping) else None
    for field in FILE_FIELDS:
        if isinstance(fields, Mapping) and fields.get(field) is not None:
            raise ConfigError(
                f"model.method.{field} is the file {shown(fields[field])}, and a pulled adapter may name none."
            )
    _check_inside(data, "data")


def _settings(tree: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    node = tree.get(section)
    found = node.get("init_args") if isinstance(node, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _check_inside(settings: Mapping[str, Any], place: str) -> None:
    """Refuse names that lead out of the folder they are in, at any depth."""
    for key, value in settings.items():
        if key in INSIDE and isinstance(value, str):
            _check_name(value, f"{place}.{key}")
        elif isinstance(value, Mapping):
            for name in value if key == "labels" else ():
                _check_name(str(name), f"{place}.{key}")
            _check_inside(value, f"{place}.{key}")


def _check_name(name: str, place: str) -> None:
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise ConfigError(f"{place} is {shown(name)}, and what a pulled adapter names is inside of data.root.")


def check_named(tree: Node, overrides: Sequence[str]) -> None:
    """Refuse to read data from files that the config of a pulled adapter names and the user does not.

    Args:
        tree: The config.
        overrides: What the user gives.

    Raises:
        DataError: If there are some; the message says how they are named.
    """
    given = {key.replace(".init_args", "").removesuffix("+") for key, _ in split_overrides(overrides)}
    if given & {"data", "data.class_path"}:  # other data, which have nothing of the config's
        return
    settings = _settings(tree, "data")
    unnamed = [key for key in PLACES if settings.get(key) is not None and f"data.{key}" not in given]
    if unnamed:
        there = ", ".join(f"{key} {shown(settings[key])}" for key in unnamed)
        how = " ".join(f"--data.{key} {'DIR' if key == 'root' else 'FILE'}" for key in unnamed)
        raise DataError(
            f"The adapter is of others, and its config names files of this machine ({there}), which are read only "
            f"where you name them: {how}."
        )
