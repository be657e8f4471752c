"""Bridges to other code: checkpoints of the methods' authors, Hugging Face peft, and export."""

import importlib
from typing import Any

from vispeft.interop import beyond, blocks, lst, mtlora, polyhistor, shared, ssf, unified, vpt, vqt
from vispeft.interop.binary import load_binary
from vispeft.interop.official import Source, list_sources, load_official, register_source, to_official
from vispeft.interop.one_task import export_task

_PEFT = ("PeftMethod", "from_peft", "to_peft")
"""Names that need the extra `peft`; their module is imported on first access."""

__all__ = [  # noqa: PLE0604  (the names of the extra are added by unpacking)
    *_PEFT,
    "Source",
    "beyond",
    "blocks",
    "export_task",
    "list_sources",
    "load_binary",
    "load_official",
    "lst",
    "mtlora",
    "polyhistor",
    "register_source",
    "shared",
    "ssf",
    "to_official",
    "unified",
    "vpt",
    "vqt",
]


_LATE = ("export", "peft")
"""Modules that are imported on first access: they need much, or an extra."""


def __getattr__(name: str) -> Any:
    if name in _PEFT:
        return getattr(importlib.import_module("vispeft.interop.peft"), name)
    if name in _LATE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LATE])
