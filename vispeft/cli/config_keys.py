"""Checks of the keys of a config and its overrides, before Lightning's parser sees them.

An unknown key is refused with the nearest name instead of a list of types, and class names are expanded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer

import vispeft.data
import vispeft.methods
import vispeft.tasks  # noqa: F401 - all three, so that their classes are found by name
from vispeft.building.classes import argument_names, check_argument, find_class, import_class
from vispeft.building.config_files import Node
from vispeft.building.methods import method_node
from vispeft.core.method import Method
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.checkpoints import Cadence
from vispeft.tasks.migration import MOVED, without_moved
from vispeft.tasks.optimizers import optimizer_node

__all__ = ["Override", "check_config", "check_override", "check_tree", "split_overrides"]

TOP_KEYS = ("seed_everything", "init", "trainer", "model", "data", "checkpoints", "cache_features")
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
LINKED = {"model.num_classes": "the data", "data.seed": "seed_everything"}
"""Arguments determined by another part of the config, with that part."""
BASES: dict[str, tuple[type, str]] = {"model": (AdapterTask, "task"), "data": (LightningDataModule, "data module")}
"""Base class and noun for messages, per section that names a class."""
SETTINGS: dict[str, type] = {"trainer": Trainer, "checkpoints": Cadence}
"""Class that accepts the settings, per section with settings."""

Override = tuple[str, str | None]
"""A dotted key without leading dashes, and its value."""


def split_overrides(tokens: Sequence[str]) -> list[Override]:
    """Pair keys with their values.

    Args:
        tokens: Arguments such as ``["--model.lr", "1e-3", "--print_config"]``; ``--key=value`` works too.

    Returns:
        The overrides, in order.

    Raises:
        ConfigError: If a token is not part of an override.
    """
    pairs: list[Override] = []
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"{token!r} is out of place; overrides are written --section.key value.")
        key, equals, value = token[2:].partition("=")
        if equals:
            pairs.append((key, value))
        elif waiting and not waiting[0].startswith("--"):
            pairs.append((key, waiting.pop(0)))
        else:
            pairs.append((key, None))
    return pairs


def check_config(tree: Node, overrides: Sequence[Override], source: str) -> list[str]:
    """Check every key of a config and its overrides, and expand class names.

    Args:
        tree: The config; class names in it are expanded in place.
        overrides: The result of `split_overrides`.
        source: Origin of the config, for messages.

    Returns:
        The overrides for Lightning's parser.

    Raises:
        UnknownNameError: If a key or a class is unknown.
        ConfigError: If a key is determined elsewhere, or a section is missing.
    """
    check_tree(tree, source)
    checked = [check_override(tree, key, value) for key, value in overrides]
    tokens = [token for token in checked if token is not None]
    missing = [section for section in BASES if section not in tree]
    if missing:
        raise ConfigError(f"{source} has no section {' and '.join(missing)}; see configs/classification for examples.")
    return tokens


def check_tree(tree: Node, source: str) -> None:
    """Check every key of a config, or of some of its sections, and expand class names.

    Args:
        tree: The config; changed in place.
        source: Its origin, for messages.

    Raises:
        UnknownNameError: If a key or a class is unknown.
        ConfigError: If a key is determined elsewhere, or has a value instead of keys.
    """
    for key in tree:
        if key not in TOP_KEYS:
            raise UnknownNameError("key", str(key), TOP_KEYS, f"It stands in {source}.")
    _check_seed(tree.get("seed_everything", 0))
    for section, cls in SETTINGS.items():
        for key in _mapping(tree.get(section), section):
            _check_key(section, key, argument_names(cls))
    for section, (base, kind) in BASES.items():
        if section in tree:
            tree[section] = _check_node(section, tree[section], base, kind)


def check_override(tree: Node, key: str, value: str | None) -> str | None:
    """Check one override, and apply changes of classes to the tree.

    Args:
        tree: The config, checked; changed in place.
        key: The dotted key.
        value: The value as typed; None if there is none.

    Returns:
        The override for Lightning's parser; None if the tree already contains it.

    Raises:
        UnknownNameError: If the key or a class is unknown.
        ConfigError: If the key is determined elsewhere, or needs a value.
    """
    if key == "print_config" or key.endswith(".help"):
        return f"--{key}" if value is None else f"--{key}={value}"
    parts = key.removesuffix("+").split(".")
    if parts[0] not in TOP_KEYS:
        raise UnknownNameError("key", key, _all_keys(tree))
    if value is None:
        raise ConfigError(f"--{key} needs a value.")
    if parts[0] == "seed_everything":
        _check_seed(_parsed(value))
    elif parts[0] in SETTINGS and len(parts) > 1:
        _check_key(parts[0], parts[1], argument_names(SETTINGS[parts[0]]))
    elif parts[0] in BASES:
        checked = _check_class_override(tree, parts, value)
        return None if checked is None else f"--{key}={checked}"
    return f"--{key}={value}"


def _check_node(place: str, node: Any, base: type, kind: str) -> Node:
    """Check a class with its arguments, and expand its name."""
    if isinstance(node, str):
        node = {"class_path": node}
    node = _mapping(node, place)
    for key in node:
        if key not in CLASS_KEYS:
            raise UnknownNameError("key", f"{place}.{key}", [f"{place}.{k}" for k in CLASS_KEYS])
    if "class_path" not in node:
        raise ConfigError(f"The section {place} has no class_path; it names the class to use.")
    if base is Method:
        node = method_node(node)
    else:
        node = {**node, "class_path": find_class(str(node["class_path"]), base, kind=kind, place=place)}
    known = argument_names(import_class(node["class_path"]))
    arguments = dict(_mapping(node.get("init_args"), f"{place}.init_args"))
    if place == "model":
        arguments = without_moved(arguments)
    for key, value in arguments.items():
        _check_key(place, key, known)
        if key == "method":
            arguments[key] = _check_node(f"{place}.{key}", value, Method, "method")
        elif key == "optimizer":
            arguments[key] = optimizer_node(value)
    return {**node, "init_args": arguments}


def _check_class_override(tree: Node, parts: list[str], value: str) -> str | None:
    """Check an override inside the section of a class, and expand class names in its value.

    Returns:
        The value for the parser; None if the tree already contains it.
    """
    section, *path = (part for part in parts if part != "init_args")
    if path in ([], ["class_path"]):
        tree[section] = _check_node(section, _parsed(value), *BASES[section])
        return _dumped(tree[section], bare=path == ["class_path"])
    if section not in tree:
        raise ConfigError(f"--{'.'.join(parts)} was given, and the config has no section {section}.")
    _check_key(section, path[0], argument_names(import_class(tree[section]["class_path"])))
    if path[0] == "optimizer":
        _override_optimizer(tree[section]["init_args"], path[1:], parts[-1], _parsed(value))
        return None
    if path[0] != "method":
        return value
    return _check_method_override(tree[section]["init_args"], f"{section}.method", path[1:], value)


def _check_method_override(arguments: Node, place: str, path: list[str], value: str) -> str:
    """Check an override of a task's method or of one of its fields."""
    current = arguments.get("method")
    if path in ([], ["class_path"]):
        chosen = _check_node(place, _parsed(value), Method, "method")
        if current is None or chosen["class_path"] != current["class_path"]:
            # Fields in the config belong to its own method, so they are dropped along with it.
            arguments["method"] = chosen
        return _dumped(chosen, bare=path == ["class_path"])
    if current is None:
        raise ConfigError(f"--{place}.{'.'.join(path)} was given, and the config names no method.")
    _check_key(place, path[0], argument_names(import_class(current["class_path"])))
    return value


def _override_optimizer(settings: Node, path: list[str], last: str, value: Any) -> None:
    """Change the optimiser in the config itself, as the parser does not support a closed list of classes."""
    node = optimizer_node(settings.get("optimizer", "AdamW"))
    if last == "init_args":
        node = {**node, "init_args": value}
    elif path in ([], ["class_path"]):
        node = {"class_path": value} if path else value
    else:
        node["init_args"][".".join(path)] = value
    settings["optimizer"] = optimizer_node(node)


def _check_key(place: str, key: str, known: Sequence[str]) -> None:
    full = f"{place}.{key}"
    if place == "model" and key in MOVED:
        raise ConfigError(MOVED[key])
    if full in LINKED:
        raise ConfigError(f"{full} is decided by {LINKED[full]}; leave it out.")
    check_argument(place, key, [name for name in known if f"{place}.{name}" not in LINKED])


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed!r}; give a whole number from 0, so that the run can be repeated.")


def _all_keys(tree: Node) -> list[str]:
    keys = list(TOP_KEYS)
    for section, cls in SETTINGS.items():
        keys += [f"{section}.{name}" for name in argument_names(cls)]
    for section in BASES:
        if section in tree:
            keys += [f"{section}.{name}" for name in argument_names(import_class(tree[section]["class_path"]))]
    return [key for key in keys if key not in LINKED]


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} is {value!r}; keys with values are needed there.")
    return value


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{value!r} is no valid YAML: {' '.join(str(error).split())}") from error


def _dumped(node: Node, bare: bool) -> str:
    if bare or not node["init_args"]:
        return str(node["class_path"])
    return str(yaml.safe_dump(node, default_flow_style=True, width=10**6)).strip()
