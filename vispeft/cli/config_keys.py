"""Checks of the keys of a config and its overrides, before Lightning's parser sees them.

An unknown key is refused with the nearest name instead of a list of types, and class names are expanded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

import vispeft.data
import vispeft.methods
import vispeft.tasks  # noqa: F401 - all three, so that their classes are found by name
from vispeft.adapters.compiling import Compile
from vispeft.building.annotations import argument_type
from vispeft.building.arguments import (
    CLASS_KEYS,
    check_arguments,
    check_keys,
    check_value,
    class_node,
    classes_in,
)
from vispeft.building.classes import argument_names, check_argument, default_of, find_class, import_class
from vispeft.building.config_files import Node, dump_config, parse_text
from vispeft.building.methods import method_node
from vispeft.cli.trainer_settings import TrainerSettings
from vispeft.core.method import Method
from vispeft.core.origin import Memory
from vispeft.core.token_merging import TokenMerging
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.checkpoints import Cadence
from vispeft.tasks.migration import MOVED, without_moved

__all__ = [
    "Override",
    "as_list",
    "check_config",
    "check_override",
    "check_tree",
    "parse_override",
    "split_overrides",
    "take_overrides",
]

TOP_KEYS = (
    *("seed_everything", "init", "trainer", "model", "data", "checkpoints", "cache_features", "memory", "compile"),
    "token_merging",
)
CHOSEN: dict[str, Any] = {"memory": Memory, "compile": Compile}
"""Keys of the top level that take one of several choices."""
LINKED = {"model.num_classes": "the data", "model.targets": "the data", "data.seed": "seed_everything"}
"""Arguments determined by another part of the config, with that part."""
BASES: dict[str, tuple[type, str]] = {"model": (AdapterTask, "task"), "data": (LightningDataModule, "data module")}
"""Base class and noun for messages, per section that names a class."""
SETTINGS: dict[str, type] = {"trainer": TrainerSettings, "checkpoints": Cadence, "token_merging": TokenMerging}
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


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take what changes the data or the trainer of a run out of a command line, wherever it stands.

    A parser of the command's own arguments would take the value of such a key for one of them.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The other arguments, and the overrides, such as ``["--data.root", "photos"]``.
    """
    own: list[str] = []
    taken: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith(("--data.", "--trainer.", "--data=")):
            own.append(token)
            continue
        taken.append(token)
        if "=" not in token and waiting and not waiting[0].startswith("--"):
            taken.append(waiting.pop(0))
    return own, taken


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
    tokens: list[str] = []
    for key, value in overrides:
        token = check_override(tree, key, value)
        if key in SETTINGS and value is not None:
            tokens = _without(tokens, key, _mapping(parse_override(key, value), key))
        tokens += [] if token is None else [token]
    tokens = [_with_parts(token, tree) for token in tokens]
    missing = [section for section in BASES if section not in tree]
    if missing:
        raise ConfigError(f"{source} has no section {' and '.join(missing)}; see configs/classification for examples.")
    return tokens


def _without(tokens: list[str], section: str, settings: Mapping[str, Any]) -> list[str]:
    """Leave out earlier overrides of settings that a later one of the whole section, now in the tree, gives anew."""
    given = tuple(f"--{section}.{name}{end}" for name in settings for end in ("=", ".", "+"))
    return [token for token in tokens if not token.startswith(given)]


def _with_parts(token: str, tree: Node) -> str:
    """Put the parts that later overrides have changed in the tree into an override of a whole section."""
    section = token[2:].partition("=")[0]
    whole = section in BASES and tree[section]["init_args"]
    return f"--{section}={_dumped(tree[section], bare=False)}" if whole else token


def check_tree(tree: Node, source: str) -> None:
    """Check every key of a config, or of some of its sections, and expand class names.

    Afterwards, nothing in it names a class that is not on the closed list, wherever it stands.

    Args:
        tree: The config; changed in place.
        source: Its origin, for messages.

    Raises:
        UnknownNameError: If a key or a class is unknown.
        ConfigError: If a key is determined elsewhere, has a value instead of keys, or makes an object where only plain
            values are taken.
    """
    for key, value in tree.items():
        if key not in TOP_KEYS:
            raise UnknownNameError("key", str(key), TOP_KEYS, f"It stands in {source}.")
        if key not in (*SETTINGS, *BASES):
            tree[key] = check_value(value, CHOSEN.get(key, Any), str(key))
    _check_seed(tree.get("seed_everything", 0))
    for section, cls in SETTINGS.items():
        if section in tree:
            tree[section] = _check_settings(cls, _mapping(tree[section], section), section)
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
    if key == "print_config":
        return f"--{key}" if value is None else f"--{key}={value}"
    if key.endswith(".help"):
        return _check_help(key, value)
    parts = key.removesuffix("+").split(".")
    if parts[0] not in TOP_KEYS:
        raise UnknownNameError("key", key, _all_keys(tree))
    if value is None:
        raise ConfigError(f"--{key} needs a value.")
    if parts[0] == "seed_everything":
        _check_seed(parse_override(key, value))
    elif parts[0] in SETTINGS:
        checked = _check_setting(tree, parts, value, append=key.endswith("+"))
        return None if checked is None else f"--{key}={checked}"
    elif parts[0] in BASES:
        checked = _check_class_override(tree, parts, value)
        return None if checked is None else f"--{key}={checked}"
    check_value(value, CHOSEN.get(key, Any), f"--{key}")
    return f"--{key}={value}"


def parse_override(key: str, value: str) -> Any:
    """Read the value of an override.

    Args:
        key: Its key, for messages.
        value: The value as typed.

    Returns:
        Plain values.

    Raises:
        ConfigError: If it is no valid YAML, or has values that no config has.
    """
    try:
        return parse_text(value, f"--{key}")
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key} {value!r} is no valid YAML: {' '.join(str(error).split())}") from error


def _check_help(key: str, value: str | None) -> str:
    """Check a question for help, which names a class of the section."""
    section = key.removesuffix(".help")
    if value is None:
        return f"--{key}"
    if section not in BASES:
        raise ConfigError(f"--{key} has the value {value!r}; leave it out. With a class: --model.help, --data.help.")
    base, kind = BASES[section]
    return f"--{key}={find_class(value, base, kind=kind, place=section)}"


def _check_settings(cls: type, settings: Mapping[str, Any], section: str) -> Node:
    """Check the settings of a section that names no class itself."""
    for key in settings:
        _check_key(section, str(key), argument_names(cls))
    if settings.get("plugins"):
        raise ConfigError(
            f"{section}.plugins takes objects, which a config cannot name. For a precision there is trainer.precision."
        )
    return check_arguments(cls, settings, section)


def _check_setting(tree: Node, parts: list[str], value: str, *, append: bool) -> str | None:
    """Check an override of a setting, or of all settings of a section.

    Returns:
        The value for the parser; None if the tree contains it, as it does where an object is taken.
    """
    (section, *path), cls = parts, SETTINGS[parts[0]]
    place, parsed = ".".join(parts), parse_override
    settings: Node = tree.setdefault(section, {})
    if not path:
        settings.update(_check_settings(cls, _mapping(parsed(place, value), section), section))
        return None
    name = path[0]
    _check_key(section, name, argument_names(cls))
    if not classes_in(argument_type(cls, name)):
        _check_data(path[1:], value, argument_type(cls, name) if len(path) == 1 else Any, place)
        return value
    if len(path) > 1:
        _set_in_last(settings.get(name), path[1:], parsed(place, value), place)
        given = settings[name]
    else:
        given = parsed(place, value)
        given = [*as_list(settings.get(name)), *as_list(given)] if append else given
    settings.update(_check_settings(cls, {name: given}, section))
    return None


def as_list(value: Any) -> list[Any]:
    """Convert a setting that may be a list, a single value or none to a list.

    Args:
        value: The setting; None and truth values stand for none.
    """
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _set_in_last(given: Any, path: Sequence[str], value: Any, place: str) -> None:
    """Set an argument of an object, of the last one of a list."""
    node = given[-1] if isinstance(given, list) and given else given
    if not isinstance(node, dict):
        raise ConfigError(f"--{place} was given, and nothing before it names the class that takes it.")
    name, *rest = (part for part in path if part != "init_args")
    if rest:
        raise ConfigError(f"--{place} goes too deep; give the whole value of {name}.")
    node.setdefault("init_args", {})[name] = value


def _check_data(path: Sequence[str], value: str, annotation: Any, place: str) -> None:
    """Check an override of a plain value, or of a part of one."""
    inside = [part for part in path if part in CLASS_KEYS]
    if inside:
        raise ConfigError(f"--{place} names {inside[0]}, and only plain values are taken there. Leave it out.")
    check_value(value, annotation, f"--{place}")


def _check_node(place: str, node: Any, base: type, kind: str) -> Node:
    """Check a class with its arguments, and expand its name."""
    node = class_node(node, kind, place)
    if node.get("dict_kwargs"):
        raise ConfigError(f"{place}.dict_kwargs is given; give the arguments under {place}.init_args.")
    if base is Method:
        node = method_node(node)
    else:
        node = {**node, "class_path": find_class(str(node["class_path"]), base, kind=kind, place=place)}
    cls = import_class(node["class_path"])
    arguments = dict(_mapping(node.get("init_args"), f"{place}.init_args"))
    if place == "model":
        arguments = without_moved(arguments)
    for key in arguments:
        _check_key(place, str(key), argument_names(cls))
    return {"class_path": node["class_path"], "init_args": _check_node_arguments(cls, arguments, place, base)}


def _check_node_arguments(cls: type, arguments: Node, place: str, base: type) -> Node:
    """Check the arguments of a class; those of a task that name a method or a part have forms of their own."""
    special: Node = {}
    if base is AdapterTask:
        if "method" in arguments:
            special["method"] = _check_node(f"{place}.method", arguments["method"], Method, "method")
        special |= {key: form(arguments[key]) for key, form in cls.part_forms.items() if key in arguments}
    others = {key: value for key, value in arguments.items() if key not in special}
    checked = {**check_arguments(cls, others, place), **special}
    return {key: checked[key] for key in arguments}


def _check_class_override(tree: Node, parts: list[str], value: str) -> str | None:
    """Check an override inside the section of a class, and expand class names in its value.

    Returns:
        The value for the parser; None if the tree already contains it.
    """
    section, *path = (part for part in parts if part != "init_args")
    place = ".".join(parts)
    if path in ([], ["class_path"]):
        tree[section] = _check_node(section, parse_override(place, value), *BASES[section])
        return _dumped(tree[section], bare=path == ["class_path"])
    if section not in tree:
        raise ConfigError(f"--{place} was given, and the config has no section {section}.")
    cls, arguments = import_class(tree[section]["class_path"]), tree[section]["init_args"]
    _check_key(section, path[0], argument_names(cls))
    if section == "model" and path[0] in cls.part_forms:
        _override_part(cls, arguments, path, parts[-1], parse_override(place, value))
        return None
    if section == "model" and path[0] == "method":
        return _check_method_override(arguments, f"{section}.method", path[1:], value)
    annotation = argument_type(cls, path[0])
    if len(path) == 1:
        check_keys(cls, path[0], value, section)
    if not classes_in(annotation) or len(path) > 1:
        _check_data(path[1:], value, annotation if len(path) == 1 else Any, place)
        return value
    arguments[path[0]] = check_value(parse_override(place, value), annotation, place)
    return None


def _check_method_override(arguments: Node, place: str, path: list[str], value: str) -> str:
    """Check an override of a task's method or of one of its fields."""
    current = arguments.get("method")
    if path in ([], ["class_path"]):
        chosen = _check_node(place, parse_override(place, value), Method, "method")
        if current is None or chosen["class_path"] != current["class_path"]:
            # Fields in the config belong to its own method, so they are dropped along with it.
            arguments["method"] = chosen
        return _dumped(chosen, bare=path == ["class_path"])
    if current is None:
        raise ConfigError(f"--{place}.{'.'.join(path)} was given, and the config names no method.")
    cls = import_class(current["class_path"])
    _check_key(place, path[0], argument_names(cls))
    whole = argument_type(cls, path[0]) if len(path) == 1 else Any
    _check_data(path[1:], value, whole, f"{place}.{'.'.join(path)}")
    return value


def _override_part(cls: type[AdapterTask], settings: Node, path: list[str], last: str, value: Any) -> None:
    """Change a part in the config itself, as the parser does not support closed lists of classes."""
    name, *path = path
    form = cls.part_forms[name]
    node = form(settings[name] if name in settings else default_of(cls, name))
    whole = path in ([], ["class_path"], ["name"])
    if node is None and not whole:
        raise ConfigError(f"--model.{name}.{'.'.join(path)} was given, and no {name} is named before it.")
    if last == "init_args":
        node = {**node, "init_args": value}
    elif whole:
        node = {"class_path": value} if path else value
    else:
        node["init_args"][".".join(path)] = value
    settings[name] = form(node)


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


def _dumped(node: Node, bare: bool) -> str:
    if bare or not node["init_args"]:
        return str(node["class_path"])
    return dump_config(node, one_line=True)
