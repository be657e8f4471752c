"""Classes by name: finding one, formatting its name as configs do, and listing its arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["argument_names", "check_argument", "class_path", "find_class", "import_class", "subclasses"]

T = TypeVar("T")


def class_path(cls: type) -> str:
    """Return a class's import path as configs write it, by the shortest package that exports it.

    Args:
        cls: The class.

    Returns:
        Its import path, such as ``vispeft.SSF``.
    """
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def import_class(path: str) -> Any:
    """Import a class.

    Args:
        path: Its import path.

    Returns:
        The class.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.
        ValueError: If the path has no module in it.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def find_class(name: str, base: type, *, kind: str, place: str, known: Iterable[str] = ()) -> str:
    """Find a class by its name or its import path.

    Args:
        name: Name of an already imported subclass of `base`, or the import path of any subclass.
        base: The required base class.
        kind: Noun for the class, for messages.
        place: The place in the config, for messages.
        known: Further names accepted there.

    Returns:
        The class's import path, as `class_path` writes it.

    Raises:
        UnknownNameError: If there is no such class.
        ConfigError: If it is not derived from `base`.
    """
    found: dict[str, type] = subclasses(base)
    if name in found:
        return class_path(found[name])
    try:
        cls = import_class(name)
    except (ImportError, AttributeError, ValueError):
        prefix = name.rpartition(".")[0]
        near = [f"{prefix}.{short}" for short in found] if prefix else [*known, *found]
        raise UnknownNameError(kind, name, near) from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{place} names {name}, which is no {kind} (no subclass of {base.__name__}).")
    return class_path(cls)


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """List the imported, instantiable subclasses of a class, except Lightning's.

    Args:
        base: The class.

    Returns:
        Subclasses of any depth, by name.
    """
    found: dict[str, type[T]] = {}
    for cls in base.__subclasses__():
        if not cls.__module__.startswith("lightning."):
            own = {} if inspect.isabstract(cls) else {cls.__name__: cls}
            found = {**own, **subclasses(cls), **found}
    return found


def argument_names(cls: type) -> list[str]:
    """List the arguments of a class, including those it passes on to its base.

    Args:
        cls: The class.

    Returns:
        The names; empty if any name is accepted.
    """
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


def check_argument(place: str, key: str, known: Sequence[str]) -> None:
    """Refuse an unknown argument.

    Args:
        place: The place in the config, or the class, for the message.
        key: The argument's name.
        known: The result of `argument_names`; if empty, every name is accepted.

    Raises:
        UnknownNameError: If the name is not among them.
    """
    if known and key not in known:
        raise UnknownNameError("key", f"{place}.{key}", [f"{place}.{name}" for name in known])
