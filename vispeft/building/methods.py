"""Methods from the names and fields of configs: the registry's, presets of ``configs/method``, files and classes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import vispeft.methods  # noqa: F401 - so that their classes are found by name
from vispeft.building.classes import argument_names, check_argument, class_path, find_class, import_class, subclasses
from vispeft.building.config_files import Node, read_config
from vispeft.building.parsing import parser_errors
from vispeft.core.method import Method
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
    if name in extra_methods():
        importlib.import_module(extra_methods()[name])
    registered = {cls.name: cls for cls in subclasses(Method).values() if "name" in vars(cls)}
    if name in registered:
        path = class_path(registered[name])
    else:
        path = find_class(name, Method, kind="method", place="method", known=[*presets, *registered])
    return {"class_path": path, "init_args": dict(given.get("init_args") or {})}


def build_method(node: Mapping[str, Any]) -> Method:
    """Build a method from its class and its fields.

    Args:
        node: The result of `method_node`.

    Returns:
        The method.

    Raises:
        UnknownNameError: If a field does not exist.
        ConfigError: If a field has a value that cannot work.
    """
    cls = import_class(node["class_path"])
    for key in node["init_args"]:
        check_argument(cls.__name__, key, argument_names(cls))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "method")
    with parser_errors(cls.__name__):
        return parser.instantiate(parser.parse_object({"method": dict(node["init_args"])})).method
