"""Configs: YAML files read by Lightning's CLI, with overrides from the command line.

Every key is checked before Lightning's parser sees it, so that an unknown one is refused with the nearest name instead
of a listing of types; types and values are then checked by that parser.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import vispeft.data
import vispeft.methods
import vispeft.tasks  # noqa: F401 - all three, so that their classes are found by name
from vispeft.cli.evaluation import evaluation_trainer
from vispeft.core.method import Method
from vispeft.errors import ConfigError, FileError, UnknownNameError, VispeftError
from vispeft.resources import resource_folder
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.checkpoints import Cadence
from vispeft.tasks.supervised import check_target

__all__ = [
    "ConfigCLI",
    "build_data",
    "build_method",
    "build_task",
    "class_path",
    "method_node",
    "method_presets",
    "read_config",
    "split_overrides",
]

TOP_KEYS = ("seed_everything", "init", "trainer", "model", "data", "checkpoints", "cache_features")
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
LINKED = {"model.num_classes": "the data", "data.seed": "seed_everything"}
"""Arguments that another part of the config decides, and which."""

T = TypeVar("T")
Node = dict[str, Any]
Override = tuple[str, str | None]
"""A dotted key without its dashes, and its value."""


class ConfigCLI(LightningCLI):
    """Lightning's CLI without subcommands: reads a config, then makes data, task and trainer.

    The class count goes from the data to the task, and the one seed of the config also fixes the order of the data.
    """

    def __init__(self, config: Path, overrides: Sequence[str]) -> None:
        """Read a config and make everything in it.

        The trainer it makes only evaluates; the settings of the training's trainer are in `trainer_settings`.

        Args:
            config: The YAML file.
            overrides: Arguments such as ``--model.lr 1e-3`` or ``--print_config``.

        Raises:
            FileError: If the file is missing or no YAML.
            ConfigError: If a key is unknown, or a value has the wrong type or is out of range.
        """
        self.trainer_settings: dict[str, Any] = {}
        tree = read_config(config)
        tokens = check_config(tree, split_overrides(overrides), str(config))
        # A method is a dataclass, which jsonargparse would otherwise take for exactly that class and no other.
        set_parsing_settings(subclasses_enabled=[Method])
        try:
            super().__init__(
                AdapterTask,
                LightningDataModule,
                save_config_callback=None,
                trainer_defaults={"max_epochs": 20, "log_every_n_steps": 1, "devices": 1},
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=["--config", yaml.safe_dump(tree, sort_keys=False), *tokens],
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except (ArgumentError, argparse.ArgumentError, ValueError) as error:
            raise _as_ours(error, str(config)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what one part of a config decides for another."""
        parser.link_arguments("data", "model.init_args.num_classes", self._num_classes, apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument("--init", type=str | None, default=None, help="adapter to start from: zoo:NAME or a folder")
        parser.add_class_arguments(Cadence, "checkpoints")
        told = "compute what a frozen backbone makes of the images once: true, or the folder where it is kept"
        parser.add_argument("--cache_features", type=bool | str | None, default=False, help=told)

    def _num_classes(self, data: Any) -> int:
        """Take the number of outputs from the data, before a task is made that is for others."""
        check_target(_import(self.config["model"]["class_path"]), data)
        if not hasattr(data, "num_classes"):
            raise ConfigError(f"{type(data).__name__} has no num_classes, by which a task knows how wide its head is.")
        return int(data.num_classes)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; the process's own are not looked at."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Note the trainer's settings and make one that evaluates."""
        self.trainer_settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return evaluation_trainer(**self.trainer_settings)

    def resolved(self) -> str:
        """Give the whole config as YAML, defaults included; it reads back to the same."""
        return str(self.parser.dump(self.config, skip_unset=False))


# ------------------------------------------------------------------ reading


def read_config(path: Path) -> Node:
    """Read a config file.

    Args:
        path: A YAML or JSON file.

    Raises:
        FileError: If it is missing, or not of that format.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"The config {str(path)!r} is no YAML file; its name should end in .yaml.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileError(
            f"The config {str(path)!r} could not be read ({error.strerror}). "
            f"{'There are: ' + ', '.join(beside) + '.' if beside else 'There are no configs in that folder.'}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"The config {str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise FileError(f"The config {str(path)!r} has no keys; it needs the sections model and data.")
    return tree


def split_overrides(tokens: Sequence[str]) -> list[Override]:
    """Pair keys with their values.

    Args:
        tokens: Such as ``["--model.lr", "1e-3", "--print_config"]``; ``--key=value`` is understood too.

    Returns:
        The overrides, in order.

    Raises:
        ConfigError: If something is no override.
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


# ------------------------------------------------------------------ checking


def check_config(tree: Node, overrides: Sequence[Override], source: str) -> list[str]:
    """Check every key of a config and of its overrides, and write class names out in full.

    Args:
        tree: The config; names of classes in it are written out in place.
        overrides: What `split_overrides` made.
        source: Where the config came from, for messages.

    Returns:
        The overrides for Lightning's parser.

    Raises:
        UnknownNameError: If a key or a class is not known.
        ConfigError: If a key is decided elsewhere, or a section is missing.
    """
    _check_tree(tree, source)
    tokens: list[str] = []
    for key, value in overrides:
        tokens += _check_override(tree, key, value)
    missing = [section for section in ("model", "data") if section not in tree]
    if missing:
        raise ConfigError(f"{source} has no section {' and '.join(missing)}; see configs/classification for examples.")
    return tokens


def _check_tree(tree: Node, source: str) -> None:
    for key in tree:
        if key not in TOP_KEYS:
            raise UnknownNameError("key", str(key), TOP_KEYS, f"It stands in {source}.")
    _check_seed(tree.get("seed_everything", 0))
    for key in _mapping(tree.get("trainer"), "trainer"):
        _check_name("trainer", key, _arguments(Trainer))
    for key in _mapping(tree.get("checkpoints"), "checkpoints"):
        _check_name("checkpoints", key, _arguments(Cadence))
    for section, base in (("model", AdapterTask), ("data", LightningDataModule)):
        if section in tree:
            tree[section] = _check_node(section, tree[section], base)


def _check_node(path: str, node: Any, base: type) -> Node:
    """Check a class with its arguments; gives it back with its name written out."""
    if isinstance(node, str):
        node = {"class_path": node}
    node = _mapping(node, path)
    for key in node:
        if key not in CLASS_KEYS:
            raise UnknownNameError("key", f"{path}.{key}", [f"{path}.{k}" for k in CLASS_KEYS])
    if "class_path" not in node:
        raise ConfigError(f"The section {path} has no class_path; it names the class to use.")
    node = method_node(node) if base is Method else {**node, "class_path": _find(path, node["class_path"], base)}
    cls = _import(node["class_path"])
    arguments = dict(_mapping(node.get("init_args"), f"{path}.init_args"))
    for key, value in arguments.items():
        _check_name(path, key, _arguments(cls))
        if key == "method":
            arguments[key] = _check_node(f"{path}.{key}", value, Method)
    return {**node, "init_args": arguments}


def _check_override(tree: Node, key: str, value: str | None) -> list[str]:
    """Check one override and note in the tree what it changes about classes."""
    if key == "print_config" or key.endswith(".help"):
        return [f"--{key}"] if value is None else [f"--{key}", value]
    parts = key.removesuffix("+").split(".")
    if parts[0] not in TOP_KEYS:
        raise UnknownNameError("key", key, _all_keys(tree))
    if value is None:
        raise ConfigError(f"--{key} needs a value.")
    if parts[0] == "seed_everything":
        _check_seed(_parsed(value))
    elif parts[0] == "trainer" and len(parts) > 1:
        _check_name("trainer", parts[1], _arguments(Trainer))
    elif parts[0] == "checkpoints" and len(parts) > 1:
        _check_name("checkpoints", parts[1], _arguments(Cadence))
    elif parts[0] in ("model", "data"):
        value = _check_class_override(tree, parts, value)
    return [f"--{key}={value}"]


def _check_class_override(tree: Node, parts: list[str], value: str) -> str:
    base = AdapterTask if parts[0] == "model" else LightningDataModule
    path = [part for part in parts if part != "init_args"]
    label = path[0]
    if path[1:] in ([], ["class_path"]):
        tree[label] = _check_node(label, _parsed(value), base)
        return _dumped(tree[label], bare=path[1:] == ["class_path"])
    if label not in tree:
        raise ConfigError(f"--{'.'.join(parts)} was given, and the config has no section {label}.")
    node = tree[label]
    cls = _import(node["class_path"])
    _check_name(label, path[1], _arguments(cls))
    if path[1] != "method":
        return value
    label = f"{label}.method"
    current = node["init_args"].get("method")
    if path[2:] in ([], ["class_path"]):
        chosen = _check_node(label, _parsed(value), Method)
        if current is None or chosen["class_path"] != current["class_path"]:
            # The fields of the method in the file belong to that method.
            node["init_args"]["method"] = chosen
        return _dumped(chosen, bare=path[2:] == ["class_path"])
    if current is None:
        raise ConfigError(f"--{'.'.join(parts)} was given, and the config names no method.")
    _check_name(label, path[2], _arguments(_import(current["class_path"])))
    return value


def _check_name(path: str, key: str, known: Sequence[str]) -> None:
    full = f"{path}.{key}"
    if full in LINKED:
        raise ConfigError(f"{full} is decided by {LINKED[full]}; leave it out.")
    if known and key not in known:
        raise UnknownNameError("key", full, [f"{path}.{name}" for name in known if f"{path}.{name}" not in LINKED])


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed!r}; give a whole number from 0, so that the run can be repeated.")


def _all_keys(tree: Node) -> list[str]:
    keys = [*TOP_KEYS, *(f"trainer.{name}" for name in _arguments(Trainer))]
    keys += [f"checkpoints.{name}" for name in _arguments(Cadence)]
    for section in ("model", "data"):
        if section in tree:
            keys += [f"{section}.{name}" for name in _arguments(_import(tree[section]["class_path"]))]
    return [key for key in keys if key not in LINKED]


def _arguments(cls: type) -> list[str]:
    """List what a class takes, by itself and by handing further settings on to its base; empty for anything."""
    names: list[str] = []
    for part in inspect.getmro(cls):
        if "__init__" not in vars(part):
            continue
        parameters = list(inspect.signature(part.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        names += [name for name in named if name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return []


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} is {value!r}; keys with values are needed there.")
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


# ------------------------------------------------------------------ classes by name


def class_path(cls: type) -> str:
    """Write a class the way configs do, by the shortest package that hands it on.

    Args:
        cls: The class.
    """
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def method_presets() -> dict[str, Path]:
    """List the methods with chosen fields in ``configs/method``, by name."""
    return {path.stem: path for path in sorted((resource_folder("configs") / "method").glob("*.yaml"))}


def method_node(node: str | Mapping[str, Any]) -> Node:
    """Write a method out as a class with its fields.

    Args:
        node: A name in the registry or in ``configs/method``, a YAML file, a class name, or a class with fields.

    Returns:
        ``class_path`` and ``init_args``.

    Raises:
        UnknownNameError: If there is no such method.
    """
    given: Node = {"class_path": node} if isinstance(node, str) else dict(node)
    name = str(given.get("class_path"))
    presets = method_presets()
    file = presets.get(name) or (Path(name) if name.endswith((".yaml", ".yml")) else None)
    if file is not None:
        preset = read_config(file)
        if "class_path" not in preset:
            raise ConfigError(f"{file} has no class_path, so it describes no method.")
        merged = {**(preset.get("init_args") or {}), **(given.get("init_args") or {})}
        return method_node({**preset, "init_args": merged})
    registered = {cls.name: cls for cls in _subclasses(Method).values() if "name" in vars(cls)}
    known = [*presets, *registered, *_subclasses(Method)]
    cls = registered.get(name) or _import(_find("method", name, Method, known))
    return {"class_path": class_path(cls), "init_args": dict(given.get("init_args") or {})}


def build_method(node: Mapping[str, Any]) -> Method:
    """Build a method from its class and its fields.

    Args:
        node: What `method_node` gives.

    Raises:
        UnknownNameError: If a field does not exist.
        ConfigError: If a field has a value that cannot work.
    """
    cls = _import(node["class_path"])
    for key in node["init_args"]:
        _check_name(cls.__name__, key, _arguments(cls))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "method")
    try:
        return parser.instantiate(parser.parse_object({"method": dict(node["init_args"])})).method
    except (ArgumentError, argparse.ArgumentError, ValueError) as error:
        raise _as_ours(error, cls.__name__) from error


def build_data(node: str | Mapping[str, Any], overrides: Sequence[Override], source: str) -> LightningDataModule:
    """Make the data module of a config, without its model.

    Args:
        node: The section ``data``.
        overrides: What `split_overrides` made, all of them beginning with ``data.``.
        source: Where the config came from, for messages.

    Raises:
        UnknownNameError: If a key or a class is not known.
        ConfigError: If a value has the wrong type or is out of range.
    """
    tree: Node = {"data": node}
    _check_tree(tree, source)
    tokens = [token for key, value in overrides for token in _check_override(tree, key, value)]
    return cast(LightningDataModule, _build("data", LightningDataModule, tree, tokens, source))


def build_task(node: Mapping[str, Any], num_classes: int, source: str) -> AdapterTask:
    """Make the task of a config, without its data.

    Args:
        node: The section ``model``.
        num_classes: How many outputs the data of the config asked for.
        source: Where the config came from, for messages.

    Raises:
        UnknownNameError: If a key or a class is not known.
        ConfigError: If a value has the wrong type or is out of range.
    """
    tree: Node = {"model": node}
    _check_tree(tree, source)
    tree["model"]["init_args"]["num_classes"] = num_classes
    return cast(AdapterTask, _build("model", AdapterTask, tree, [], source))


def _build(section: str, base: type, tree: Node, tokens: Sequence[str], source: str) -> Any:
    """Make the object of one section alone."""
    set_parsing_settings(subclasses_enabled=[Method])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(base, section, required=True)
    try:
        config = parser.parse_args([f"--config={yaml.safe_dump(tree, sort_keys=False)}", *tokens])
        return parser.instantiate(config)[section]
    except (ArgumentError, argparse.ArgumentError, ValueError) as error:
        raise _as_ours(error, source) from error


def _find(path: str, name: Any, base: type, known: Sequence[str] = ()) -> str:
    """Find a class by its name or its import path."""
    what = {"model": "task", "data": "data module"}.get(path, path.rpartition(".")[2])
    found = _subclasses(base)
    if name in found:
        return class_path(found[name])
    try:
        cls = _import(str(name))
    except (ImportError, AttributeError, ValueError):
        prefix = str(name).rpartition(".")[0]
        names = [f"{prefix}.{short}" for short in found] if prefix else known or found
        raise UnknownNameError(what, str(name), names) from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{path} names {name}, which is no {what} (no subclass of {base.__name__}).")
    return class_path(cls)


def _subclasses(base: type[T]) -> dict[str, type[T]]:
    found: dict[str, type[T]] = {}
    for cls in base.__subclasses__():
        if not cls.__module__.startswith("lightning."):
            own = {} if inspect.isabstract(cls) else {cls.__name__: cls}
            found = {**own, **_subclasses(cls), **found}
    return found


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------ errors of the parser


def _as_ours(error: Exception, source: str) -> Exception:
    """Turn an error of the parser into one of ours: the one behind it, or what it says about a type."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, VispeftError):
            return behind
        behind = behind.__cause__ or behind.__context__
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(_NOISE)) or str(error)
    text = re.sub(r"(?<!^)(?<!: )Expected an? ", "or ", text).replace("Expected a ", "expected ")
    keys = ".".join(re.findall(_KEY, text))
    told = re.sub(_TYPE, r"\1", re.sub(_KEY, "", text)).replace("typing.", "").strip()
    return ConfigError(f"{source}: {keys + ': ' if keys else ''}{told}")


_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value", "Problem with")
_KEY = r'Parser key "([^"]+)":\s*'
_TYPE = r"<class '([^']+)'>"
