"""Tensor names of Adapter+ (visinf/adapter_plus at 191c4ab) and Mona (Leiyi-Hu/mona at 5deeac9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.sites import View
from vispeft.interop.blocks import ending_in, hyper_of, layer_names, placed
from vispeft.interop.official import Source, register_source
from vispeft.methods.adapter_plus import AdapterPlus
from vispeft.methods.mona import KERNELS, Mona

__all__ = ["MONA"]


def _adapter_plus(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    config = metadata.get("config", metadata)
    hyper = hyper_of(config, "adapter_plus", "config", "scaling")
    pfeiffer, own = hyper["config"] == "pfeiffer", {"channel": "channel", "learned": None}
    return AdapterPlus(
        bottleneck=ending_in(tensors, "bottleneck.1.weight").shape[0],
        position="post" if pfeiffer else hyper["config"],
        layernorm=any(name.endswith("norm_a.weight") for name in tensors),
        scale=own.get(hyper["scaling"], hyper["scaling"]),
        bias=any(name.endswith("bottleneck.1.bias") for name in tensors),
        activation="gelu" if hyper.get("act_layer", True) else "none",
        unit_drop=hyper.get("drop_path", 0.1),
        drop_path=max(_backbone_drops(hyper), default=0.0),
    )


def _backbone_drops(hyper: Mapping[str, Any]) -> list[float]:
    """List the rates of the backbone's own stochastic depth, where the file states those of a training pass."""
    return [rate for name, rate in hyper.get("vit_drop_path", {}).items() if ".adapter" not in name]


_PLUS = {
    **layer_names(down="bottleneck.1", up="bottleneck.4"),
    "norm_weight": "norm_a.weight",
    "norm_bias": "norm_a.bias",
    "scale": "scaling",
}


def _mona(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    return Mona(bottleneck=ending_in(tensors, "project1.weight").shape[0])


def _mona_place(role: str) -> str:
    return {"mona_attn": "my_module_1", "mona_mlp": "my_module_2"}[role]


MONA = {
    **layer_names(down="project1", up="project2", mix="adapter_conv.projector"),
    **layer_names(**{f"conv{side}": f"adapter_conv.conv{i}" for i, side in enumerate(KERNELS, 1)}),
    "norm_weight": "norm.weight",
    "norm_bias": "norm.bias",
    "gamma": "gamma",
    "gamma_x": "gammax",
}
"""The authors' name of each tensor of `vispeft.methods.mona.MonaUnit`, within its module."""

register_source(Source("adapter_plus", _adapter_plus, placed(lambda _, unit: unit, _PLUS)))
register_source(Source("mona", _mona, placed(lambda _, unit: _mona_place(unit), MONA)))
