"""Shipped models: small backbones and adapters, read from the packaged ``model_zoo`` folder."""

from vispeft.zoo.adapters import find_adapter
from vispeft.zoo.backbones import ZooBackbone, list_zoo_backbones, read_zoo_backbone
from vispeft.zoo.folder import ZOO_VARIABLE, zoo_folder

__all__ = ["ZOO_VARIABLE", "ZooBackbone", "find_adapter", "list_zoo_backbones", "read_zoo_backbone", "zoo_folder"]
