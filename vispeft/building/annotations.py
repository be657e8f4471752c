"""The annotations of a class's arguments, as objects."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

__all__ = ["argument_type"]


def argument_type(cls: type, name: str) -> Any:
    """Return the annotation of an argument of a class, as an object.

    Names that a module imports for type checkers alone (``if TYPE_CHECKING:``) are imported, as the parser does.

    Args:
        cls: The class.
        name: One of its arguments, or of those it passes on to its base.

    Returns:
        The annotation; ``Any``, so plain data, if there is none or it cannot be resolved.
    """
    for part in inspect.getmro(cls):
        if "__init__" in vars(part) and name in (found := _types(part)):
            return found[name]
    return Any


@cache
def _types(cls: type) -> dict[str, Any]:
    """Return the annotations of the arguments that a class's own ``__init__`` names."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    found = {p.name: Any if p.annotation is p.empty else p.annotation for p in parameters}
    # A data class inherits arguments from modules with other names in them, and so is looked at as a whole.
    with contextlib.suppress(Exception):  # an annotation is code, which may raise anything
        hints = get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
        return {**found, **{name: hints[name] for name in found if name in hints}}
    return {name: _resolved(annotation, _owner(cls, name)) for name, annotation in found.items()}


def _owner(cls: type, name: str) -> type:
    """Return the class whose module has the names in an annotation."""
    fields = inspect.getmro(cls) if dataclasses.is_dataclass(cls) else ()
    return next((part for part in fields if name in vars(part).get("__annotations__", {})), cls)


def _resolved(annotation: Any, owner: type) -> Any:
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(owner.__module__)
    names = {**_for_checkers(owner.__module__), **(vars(module) if module is not None else {})}
    with contextlib.suppress(Exception):
        return get_type_hints(type("", (), {"__annotations__": {"it": annotation}}), names, dict(vars(owner)))["it"]
    return Any


@cache
def _for_checkers(name: str) -> dict[str, Any]:
    """Import the names that a module imports behind ``if TYPE_CHECKING``, as far as they are there."""
    found: dict[str, Any] = {}
    module = sys.modules.get(name)
    try:
        body = ast.parse(inspect.getsource(module)).body if module is not None else []
    except (OSError, TypeError, SyntaxError):
        return found
    for block in body:
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for line in block.body:
                with contextlib.suppress(Exception):  # whatever an import of the module's own raises
                    found.update(_imported(line, module))
    return found


def _imported(line: ast.stmt, module: ModuleType | None) -> dict[str, Any]:
    if isinstance(line, ast.Import):
        loaded = {alias.name: importlib.import_module(alias.name) for alias in line.names}
        return {
            alias.asname or alias.name.partition(".")[0]: loaded[alias.name]
            if alias.asname
            else sys.modules[alias.name.partition(".")[0]]
            for alias in line.names
        }
    if not isinstance(line, ast.ImportFrom):
        return {}
    path = "." * line.level + (line.module or "")
    source = importlib.import_module(importlib.util.resolve_name(path, getattr(module, "__package__", None)))
    return {alias.asname or alias.name: getattr(source, alias.name) for alias in line.names}
