"""Classes by name: finding one on the closed list, formatting its name as configs do, and listing its arguments."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from vispeft.building.known import OWN, REFUSED, import_paths, known_classes
from vispeft.core.fields import field_hint
from vispeft.core.providers import extra_methods
from vispeft.errors import ConfigError, UnknownNameError, is_misspelt

__all__ = ["argument_names", "check_argument", "class_path", "default_of", "find_class", "import_class"]

HOW = (
    "A class of your own is known to `vispeft train ... --code MODULE`. The other commands run no such code; a script "
    "does: it imports MODULE, where vispeft.building.known.register_class stands before the class, and calls "
    "vispeft.cli.main.run_command with the command and a list of its arguments (docs/data.md, A reader of your own)."
)


def class_path(cls: type) -> str:
    """Return a class's import path as configs write it, by the shortest package that exports it.

    Args:
        cls: The class.

    Returns:
        Its import path, such as ``vispeft.SSF``.
    """
    return next(import_paths(cls), f"{cls.__module__}.{cls.__qualname__}")


def import_class(path: str) -> Any:
    """Return a class that `find_class` found. Nothing is imported.

    Args:
        path: Its import path.

    Returns:
        The class.

    Raises:
        ConfigError: If no imported module has it.
    """
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not isinstance(cls, type):
        raise ConfigError(f"{path} is no class that was imported. {HOW}")
    return cls


def find_class(name: str, base: type, *, kind: str, place: str, known: Iterable[str] = (), itself: bool = False) -> str:
    """Find a class by its name or its import path, on the closed list. Nothing is imported.

    Args:
        name: Name or import path of a class on the list.
        base: The required base class.
        kind: Noun for the class, for messages.
        place: The place in the config, for messages.
        known: Further names accepted there, for messages.
        itself: Whether the base class may be named itself.

    Returns:
        The class's import path, as `class_path` writes it.

    Raises:
        UnknownNameError: If the list has no such class.
        ConfigError: If there is such a class, and it is not on the list or not derived from `base`.
    """
    _import_extras(name)
    found = known_classes(base, itself=itself)
    for cls in found:
        if name == cls.__name__ or name in import_paths(cls):
            return class_path(cls)
    short = name.rpartition(".")[2]
    if short in REFUSED:
        raise ConfigError(f"{place} names {name}, which a config cannot use: {REFUSED[short]}. Leave it out.")
    there = getattr(sys.modules.get(name.rpartition(".")[0]), short, None)  # None stands there for a blocked module
    if isinstance(there, type) and not issubclass(there, base):
        raise ConfigError(f"{place} names {name}, which is no {kind} (no subclass of {base.__name__}).")
    own = name.partition(".")[0] in (OWN, name)
    near = [class_path(cls) for cls in found] if "." in name else [*known, *(cls.__name__ for cls in found)]
    clear = own if "." in name else is_misspelt(name, near)
    raise UnknownNameError(kind, name, near, "" if clear else HOW)


def _import_extras(name: str) -> None:
    """Import the module of a method of this package that needs an optional dependency."""
    for method, module in extra_methods().items():
        if name == method or name.rpartition(".")[0] in (module, module.rpartition(".")[0]):
            importlib.import_module(module)


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


def default_of(cls: type, name: str) -> Any:
    """Return the default of an argument of a class, or of the base it is passed on to.

    Args:
        cls: The class.
        name: The argument, one of `argument_names`.

    Returns:
        The default; `inspect.Parameter.empty` for an argument that is needed.
    """
    owners = (part for part in inspect.getmro(cls) if "__init__" in vars(part))
    found = (inspect.signature(part.__init__).parameters.get(name) for part in owners)  # type: ignore[misc]
    return next(parameter.default for parameter in found if parameter is not None)


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
        raise UnknownNameError("key", f"{place}.{key}", [f"{place}.{name}" for name in known], field_hint(key, known))
