"""One file per timm family: its view and, where needed, its own forward."""

from vispeft.backbones import vit
from vispeft.backbones.registry import Family, describe, family_of, register_family, unwrap

__all__ = ["Family", "describe", "family_of", "register_family", "unwrap", "vit"]
