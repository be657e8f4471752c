"""Tensor names in the public code of the unified view (jxhe/unify-parameter-efficient-tuning at 3222ce2, Apache-2.0).

The authors have language models only; the places in a ViT block are those of the reference values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.interop.blocks import block_of, ending_in, hyper_of, layer_names
from vispeft.interop.official import Source, register_source
from vispeft.methods.mam import MAM

_NETWORK = {
    "embedding": "prefix.wte.weight",
    "inner.weight": "prefix.control_trans.0.weight",
    "inner.bias": "prefix.control_trans.0.bias",
    "outer.weight": "prefix.control_trans.2.weight",
    "outer.bias": "prefix.control_trans.2.bias",
}
_BOTTLENECK = layer_names(down="down_proj", up="up_proj")


def _names(plan: Plan) -> dict[str, str]:
    names = {}
    for item in plan:
        for tensor in item.shapes():
            network = _NETWORK.get(tensor)
            own = network or f"{block_of(item.site)}.ef_ffn_adapter.{_BOTTLENECK[tensor]}"
            names[f"{item.key}.{tensor}"] = own
    return names


def _method(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "unified_mam", "scale")
    return MAM(
        length=ending_in(tensors, "prefix.wte.weight").shape[0],
        mid_dim=ending_in(tensors, "prefix.control_trans.0.weight").shape[0],
        bottleneck=ending_in(tensors, "ef_ffn_adapter.down_proj.weight").shape[0],
        scale=hyper["scale"],
    )


register_source(Source("unified_mam", _method, _names))
