"""Bridges to what others have: the authors' checkpoints."""

from vispeft.interop import blocks, lst, shared, ssf, unified, vpt, vqt
from vispeft.interop.binary import load_binary
from vispeft.interop.official import Source, list_sources, load_official, register_source, to_official

__all__ = [
    "Source",
    "blocks",
    "list_sources",
    "load_binary",
    "load_official",
    "lst",
    "register_source",
    "shared",
    "ssf",
    "to_official",
    "unified",
    "vpt",
    "vqt",
]
