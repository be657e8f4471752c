"""Which modules fill a registry; they are imported when something is first looked up in it.

So importing the package costs nothing, and a registry in the core needs to know none of the modules above it. This
module imports nothing, not even torch.
"""

from __future__ import annotations

import importlib
from typing import Literal

__all__ = ["extra_methods", "fill", "provide", "provide_extra"]

Registry = Literal["families", "methods"]

_PROVIDERS: dict[Registry, list[str]] = {"families": [], "methods": []}
_EXTRAS: dict[str, str] = {}
"""Modules by the method they register, which need an extra."""


def provide(registry: Registry, module: str) -> None:
    """Name a module that registers its own entries when it is imported.

    Args:
        registry: The registry.
        module: The module's import path.
    """
    _PROVIDERS[registry].append(module)


def fill(registry: Registry) -> None:
    """Import the modules of a registry. Call it before looking something up, and before adding an entry.

    It costs microseconds once they are imported; while one of them is being imported it does not wait for itself.

    Args:
        registry: The registry.
    """
    # Always through the import system: another thread may be in the middle of the first import, and has its lock.
    for module in _PROVIDERS[registry]:
        importlib.import_module(module)


def provide_extra(method: str, module: str) -> None:
    """Name a module that needs an extra and registers one method: it is imported when the method is asked for.

    Args:
        method: The method's name, which is never listed.
        module: The module's import path.
    """
    _EXTRAS[method] = module


def extra_methods() -> dict[str, str]:
    """List the methods that need an extra, whether they are imported or not.

    Returns:
        Import paths of their modules, by name.
    """
    return dict(_EXTRAS)
