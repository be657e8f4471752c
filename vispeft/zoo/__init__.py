"""Shipped models: small backbones and adapters, read from the packaged ``model_zoo`` folder, and those of others."""

import importlib
from typing import Any

from vispeft.zoo.adapters import ZooAdapter, find_adapter, find_zoo_adapter, list_zoo_adapters
from vispeft.zoo.backbones import ZooBackbone, list_zoo_backbones, read_zoo_backbone
from vispeft.zoo.folder import ZOO_VARIABLE, own_zoo, zoo_folder
from vispeft.zoo.index import ZooEntry

__all__ = [
    "ZOO_VARIABLE",
    "ZooAdapter",
    "ZooBackbone",
    "ZooEntry",
    "find_adapter",
    "find_zoo_adapter",
    "list_zoo_adapters",
    "list_zoo_backbones",
    "own_zoo",
    "read_zoo_backbone",
    "zoo_folder",
]

_ABOVE = {"create": "vispeft.cli.zoo_models", "ZooModel": "vispeft.cli.zoo_models"}
"""Names that need tasks and data, which stand above this package; they are imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name not in _ABOVE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ABOVE[name]), name)
