"""Tensor names in the public SSF code (dongzelian/SSF at e94e0e7, MIT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import Site, View
from vispeft.interop.official import Source, register_source
from vispeft.methods.ssf import SSF

# By role, the module that holds the scale and shift, relative to the block (or the model), and their number there.
_PLACES = {
    "patch_embed": ("patch_embed", 1),
    "patch_embed.norm": ("patch_embed", 2),
    "norm1": ("{block}", 1),
    "norm2": ("{block}", 2),
    "attn.qkv": ("{block}.attn", 1),
    "attn.proj": ("{block}.attn", 2),
    "mlp.fc1": ("{block}.mlp", 1),
    "mlp.fc2": ("{block}.mlp", 2),
    "downsample.norm": ("{merging}", 1),
    "final_norm": ("", 1),
}


def _names(plan: Plan) -> dict[str, str]:
    names = {}
    for item in plan:
        for tensor in ("scale", "shift"):
            place, number = _PLACES[item.site.role]
            place = place.format(block=_block(item.site), merging=_merging(item.site))
            names[f"{item.key}.{tensor}"] = f"{place}{'.' if place else ''}ssf_{tensor}_{number}"
    return names


def _block(site: Site) -> str:
    parts = site.path.split(".")
    return ".".join(parts[: parts.index("blocks") + 2]) if "blocks" in parts else ""


def _merging(site: Site) -> str:
    """Return the public code's name of patch merging: it ends a stage there, while in timm it starts the next one."""
    parts = site.path.split(".")
    return f"layers.{int(parts[1]) - 1}.downsample" if parts[0] == "layers" else ""


def _method(hyper: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    return SSF(patch_merging=any(".downsample." in name for name in tensors))


register_source(Source("ssf", _method, _names))
