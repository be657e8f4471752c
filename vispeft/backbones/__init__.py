"""One file per timm family: its view and, where needed, its own forward."""

from vispeft.backbones import eva, features, swin, swinv2, vit
from vispeft.core.families import Family, describe, family_of, register_family, unwrap

__all__ = ["Family", "describe", "eva", "family_of", "features", "register_family", "swin", "swinv2", "unwrap", "vit"]
