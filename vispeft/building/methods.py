"""Methods from the names and fields of configs: the registry's, presets of ``configs/method``, files and classes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import vispeft.methods  # noqa: F401 - so that their classes are found by name
from vispeft.building.arguments import check_arguments
from vispeft.building.classes import class_path, find_class, import_class
from vispeft.building.config_files import Node, read_config
from vispeft.building.parsing import MODE, parser_errors
from vispeft.core.method import Method, registered_methods
from vispeft.core.providers import extra_methods
from vispeft.errors import ConfigError
from vispeft.resources import resource_folder

__all__ = ["build_method", "method_node", "method_presets"]


def method_presets() -> dict[str, Path]:
    """List the presets: methods with chosen fields in ``configs/method``.

    Returns:
        Their files, by name.
    """
    return {path.stem: path for path in sorted((resource_folder("configs") / "method").glob("*.yaml"))}


def method_node(node: str | Mapping[str, Any]) -> Node:
    """Resolve a method to a class with its fields.

    Args:
        node: A name in the registry or in ``configs/method``, a YAML file, a class name, or a class with fields.

    Returns:
        ``class_path`` and ``init_args``.

    Raises:
        UnknownNameError: If there is no such method.
        ConfigError: If a preset describes no method.
    """
    return _resolved(node, ())


def _resolved(node: str | Mapping[str, Any], files: tuple[Path, ...]) -> Node:
    """Resolve a method, which files of presets led to."""
    given: Node = {"class_path": node} if isinstance(node, str) else dict(node)
    name, fields = str(given.get("class_path")), _fields(given)
    presets = method_presets()
    file = presets.get(name) or (Path(name) if name.endswith((".yaml", ".yml")) else None)
    if file is not None:
        if file in files:
            raise ConfigError(f"The presets {' and '.join(map(str, files))} name each other, and no method.")
        preset = read_config(file)
        if "class_path" not in preset:
            raise ConfigError(f"{file} has no class_path, so it describes no method.")
        return _resolved({**preset, "init_args": {**_fields(preset), **fields}}, (*files, file))
    if name in extra_methods():
        importlib.import_module(extra_methods()[name])
    registered = {cls.name: cls for cls in registered_methods()}
    if name in registered:
        path = class_path(registered[name])
    else:
        path = find_class(name, Method, kind="method", place="method", known=[*presets, *registered])
    return {"class_path": path, "init_args": fields}


def _fields(node: Mapping[str, Any]) -> Node:
    fields = node.get("init_args") or {}
    if not isinstance(fields, Mapping):
        raise ConfigError(f"init_args of a method is {fields!r}; fields with values are needed there.")
    return dict(fields)


def build_method(node: Mapping[str, Any]) -> Method:
    """Build a method from its class and its fields.

    Args:
        node: The result of `method_node`.

    Returns:
        The method.

    Raises:
        UnknownNameError: If the class or a field does not exist.
        ConfigError: If a field has a value that cannot work.
    """
    cls = import_class(find_class(node["class_path"], Method, kind="method", place="method"))
    fields = check_arguments(cls, node["init_args"], cls.__name__)
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_class_arguments(cls, "method")
    with parser_errors(cls.__name__):
        return parser.instantiate(parser.parse_object({"method": fields})).method
