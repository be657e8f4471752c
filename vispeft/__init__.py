"""vispeft: parameter-efficient adaptation of frozen timm backbones.

Importing it costs next to nothing: names and subpackages are imported, and torch with them, when they are first used.
It changes one thing, how torchvision is imported from then on (`vispeft._compat`).
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from vispeft._compat import install_hook
from vispeft.core.providers import provide, provide_extra

if TYPE_CHECKING:
    __version__: str
    from vispeft.adapters.attach import attach as attach
    from vispeft.adapters.attach import load as load
    from vispeft.adapters.bank import AdapterBank as AdapterBank
    from vispeft.adapters.task_maps import forward_tasks as forward_tasks
    from vispeft.backbones.create import create_model as create_model
    from vispeft.cli.api import train as train
    from vispeft.cli.embed import embed as embed
    from vispeft.cli.search import search as search
    from vispeft.core.method import Method as Method
    from vispeft.core.method import list_methods as list_methods
    from vispeft.core.method import method as method
    from vispeft.core.method import register as register
    from vispeft.core.plan import Plan as Plan
    from vispeft.core.plan import plan as plan
    from vispeft.errors import VispeftError as VispeftError
    from vispeft.methods import *  # noqa: F403
    from vispeft.serving.server import serve as serve

install_hook()
provide("families", "vispeft.backbones")
provide("methods", "vispeft.methods")
provide("zoo", "vispeft.cli.zoo_models")
provide_extra("peft", "vispeft.interop.peft")

_HOMES = {
    "AdapterBank": "vispeft.adapters.bank",
    "Method": "vispeft.core.method",
    "Plan": "vispeft.core.plan",
    "VispeftError": "vispeft.errors",
    "attach": "vispeft.adapters.attach",
    "create_model": "vispeft.backbones.create",
    "embed": "vispeft.cli.embed",
    "forward_tasks": "vispeft.adapters.task_maps",
    "list_methods": "vispeft.core.method",
    "load": "vispeft.adapters.attach",
    "method": "vispeft.core.method",
    "plan": "vispeft.core.plan",
    "register": "vispeft.core.method",
    "search": "vispeft.cli.search",
    "serve": "vispeft.serving.server",
    "train": "vispeft.cli.api",
}
"""Where the public names are, but for the classes of methods, which `vispeft.methods` finds by itself."""

_LOCK = threading.RLock()
"""One thread imports at a time: two imports that need each other would find half-made modules."""


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name not in ("__all__", "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _LOCK:
        return _find(name)


def _find(name: str) -> Any:
    if name == "__all__":
        return sorted([*_HOMES, *_configurations()])
    if name == "__version__":
        value = importlib.import_module("vispeft.resources").package_version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _modules():
        value = importlib.import_module(f"{__name__}.{name}")
    elif name in _configurations():
        value = getattr(importlib.import_module("vispeft.methods"), name)
    else:
        from vispeft.errors import near_names

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {near_names(name, __dir__())}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    without_extra = {"mmseg"} if PathFinder.find_spec("mmseg") is None else set()
    special = {name for name in globals() if name.startswith("__")}
    return sorted((special | {"__version__"} | set(__getattr__("__all__")) | _modules()) - without_extra)


def _configurations() -> list[str]:
    return list(importlib.import_module("vispeft.methods").CONFIGURATIONS)


def _modules() -> set[str]:
    """List the modules and subpackages by their names in the package."""
    names = (module.name for module in pkgutil.iter_modules(__path__))  # noqa: F405
    return {name for name in names if not name.startswith("_")}
