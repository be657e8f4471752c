"""One file per timm family, with its view and, if needed, a forward pass of its own."""

from vispeft.backbones import eva, features, swin, swinv2, vit
from vispeft.core.families import Family, describe, family_of, register_family, unwrap

__all__ = ["Family", "describe", "eva", "family_of", "features", "register_family", "swin", "swinv2", "unwrap", "vit"]
