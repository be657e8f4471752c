"""Tensor names of LST (ylsung/Ladder-Side-Tuning at 1798e82, MIT), for this project's form of it for vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.official import Source, register_source
from vispeft.methods.lst import LST

_PLACES = {
    "first": "side_first_downsample",
    "down": "side_downsamples",
    "gates": "side_gate_params",
    "blocks": "side_block",
    "norm": "final_side_layer_norm",
    "up": "side_final_upsample",
    "merging": "side_merging",
}
"""The authors' name of each part; patch merging, which language models lack, is named in the same style."""


def _names(plan: Plan) -> dict[str, str]:
    names = {}
    for item in plan:
        for tensor in item.shapes():
            part, _, rest = tensor.partition(".")
            names[f"{item.key}.{tensor}"] = f"{_PLACES[part]}.{rest}"
    return names


def _method(hyper: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    first = tensors.get("side_first_downsample.weight")
    if first is None:
        raise FileError(
            f"LST's tensors hold 'side_first_downsample.weight'; found {', '.join(sorted(tensors)[:3]) or 'nothing'}."
        )
    blocks = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("side_gate_params.")})
    return LST(reduction=view.widths[0] // first.shape[0], blocks=tuple(blocks), start="random")


register_source(Source("lst", _method, _names))
