"""Shipped models: small backbones and adapters, read from the packaged ``model_zoo`` folder, and those of others."""

from typing import Any

from vispeft.core.providers import find_provided
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

_ABOVE = ("ZooModel", "create")
"""Names that need tasks and data, which stand above this package; they are imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name not in _ABOVE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return find_provided("zoo", name)
