"""The modules that fill each registry, imported on the first lookup.

Importing the package thus stays cheap, and a registry in the core need not know the modules of higher layers. This
module imports nothing, not even torch.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

__all__ = ["extra_methods", "fill", "find_provided", "provide", "provide_extra"]

Registry = Literal["families", "methods", "zoo"]

_PROVIDERS: dict[Registry, list[str]] = {"families": [], "methods": [], "zoo": []}
_EXTRAS: dict[str, str] = {}
"""Modules that need an optional dependency, by the method they register."""


def provide(registry: Registry, module: str) -> None:
    """Announce a module that registers its entries when imported.

    Args:
        registry: The registry.
        module: The module's import path.
    """
    _PROVIDERS[registry].append(module)


def fill(registry: Registry) -> None:
    """Import the modules of a registry. Call this before every lookup and before adding an entry.

    Repeated calls take microseconds. A call from a module that is being imported does not deadlock.

    Args:
        registry: The registry.
    """
    # Always through the import system: another thread may be in the middle of the first import and hold its lock.
    for module in _PROVIDERS[registry]:
        importlib.import_module(module)


def find_provided(registry: Registry, name: str) -> Any:
    """Find a name in the modules of a registry, for a package that hands out names of higher layers.

    Args:
        registry: The registry.
        name: The name.

    Raises:
        AttributeError: If none of them exports it.
    """
    for path in _PROVIDERS[registry]:
        module = importlib.import_module(path)
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"no module of {registry!r} exports {name!r}")


def provide_extra(method: str, module: str) -> None:
    """Announce a module that registers one method and needs an optional dependency; imported when the method is used.

    Args:
        method: The method's name, which `list_methods` omits.
        module: The module's import path.
    """
    _EXTRAS[method] = module


def extra_methods() -> dict[str, str]:
    """List the methods that need an optional dependency, imported or not.

    Returns:
        Import paths of their modules, by name.
    """
    return dict(_EXTRAS)
