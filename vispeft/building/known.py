"""The closed list of classes that a config may name.

It holds the classes of this package, Lightning's callbacks and loggers, and the methods of the registry. Nothing is
imported because a config names it. A class of one's own gets onto the list by `register_class`, in a script or in the
module that ``vispeft train --code MODULE`` imports.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

from vispeft.core.method import registered_methods
from vispeft.core.providers import fill
from vispeft.errors import ConfigError

__all__ = ["REFUSED", "import_paths", "known_classes", "register_class", "register_module"]

C = TypeVar("C", bound=type)

OWN = "vispeft"
REFUSED = {
    "BackboneFinetuning": "it wakes the whole backbone, for which there is the method Full",
    "BatchSizeFinder": "it changes data.batch_size, so that the run's config would state another one",
    "LearningRateFinder": "it changes model.lr, so that the run's config would state another one",
    "LambdaCallback": "it calls functions, which a config cannot name",
    "ModelCheckpoint": "a run keeps its own checkpoints, see the keys under checkpoints",
    "OnExceptionCheckpoint": "a run keeps its own checkpoints, see the keys under checkpoints",
}
"""Callbacks of Lightning that are not on the list, and the reason."""

_CLASSES: set[type] = set()
_MODULES: set[str] = set()


def register_class(cls: C) -> C:
    """Put a class of one's own onto the list, as a decorator or a function.

    A config may then name it, by its name or its import path, wherever an argument of that kind is taken: a task, a
    data module, a callback, a logger, an augmentation, or what an argument of such a class is annotated with. A method
    needs `vispeft.register` alone.

    Args:
        cls: The class. Its arguments come from configs, so it must do no harm whatever they are.

    Returns:
        The same class.

    Raises:
        ConfigError: If it is no class, or stands inside of a function or of another class.
    """
    if not isinstance(cls, type) or "." in cls.__qualname__:
        raise ConfigError(f"register_class was given {cls!r}; a class that stands at the top of a module is needed.")
    _CLASSES.add(cls)
    return cls


def register_module(name: str) -> None:
    """Put all classes of a module, and of the modules below it, onto the list.

    Args:
        name: Its import path; the module is imported already.
    """
    _MODULES.add(name)


def known_classes(base: type, *, itself: bool = False) -> list[type]:
    """List the classes that a config may name where an object of a base class is taken.

    Args:
        base: The base class.
        itself: Whether objects of the base class itself are taken.

    Returns:
        Imported subclasses, as far as they are on the list and can be made; a class before its subclasses.
    """
    fill("methods")  # or the first look would find none of them
    found: dict[type, None] = {}
    waiting = [base] if itself else type.__subclasses__(base)
    while waiting:
        cls = waiting.pop(0)
        if not getattr(cls, "__abstractmethods__", None) and _is_known(cls):
            found[cls] = None
        waiting += type.__subclasses__(cls)
    return list(found)


def _is_known(cls: type) -> bool:
    if "." in cls.__qualname__:
        return False  # a parser could not import it
    callbacks, others = _lightnings()
    if cls in _CLASSES or cls in callbacks or cls in registered_methods():
        return True
    if issubclass(cls, others) and cls.__module__.startswith(f"{OWN}."):
        return False  # those of this package are made by the commands themselves, but for registered ones
    return any(cls.__module__ == name or cls.__module__.startswith(f"{name}.") for name in (OWN, *_MODULES))


@cache
def _lightnings() -> tuple[frozenset[type], tuple[type, ...]]:
    """Return Lightning's callbacks and loggers, and their base classes."""
    from lightning.pytorch import callbacks, loggers

    named = [(name, module) for module in (callbacks, loggers) for name in module.__all__]
    found = frozenset(getattr(module, name) for name, module in named if name not in REFUSED)
    return found, (callbacks.Callback, loggers.Logger)


def import_paths(cls: type) -> Iterator[str]:
    """List the import paths of a class, without importing anything.

    Args:
        cls: The class.

    Yields:
        The paths, shortest first: those of the packages that export it, and that of its module.
    """
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), cls.__name__, None) is cls:
            yield f"{package}.{cls.__name__}"
