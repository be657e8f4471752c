"""Tensor names in public codes whose layers share tensors.

FacT (JieShibo/PETL-ViT at 026e4f1, MIT), Compacter (rabeehk/compacter at e123daa; facts only, it has no licence; the
places in a ViT block are this project's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from vispeft.core.method import Method, PlanItem
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.blocks import block_of, ending_in, hyper_of
from vispeft.interop.official import Source, register_source
from vispeft.methods.compacter import Compacter
from vispeft.methods.fact import FacT

_FACTORS = {"U": "FacTu.weight", "V": "FacTv.weight", "C": "FacTc", "P": "FacTp"}


def _fact(variant: Literal["tt", "tk"]) -> Callable[[Mapping[str, Any], Mapping[str, Tensor], View], Method]:
    def method(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
        source = f"fact_{variant}"
        hyper = hyper_of(metadata, source, "scale")
        if len(view.stages) > 1:
            raise FileError(f"{source!r} has one set of factors for a model; {view.family} needs one a stage.")
        rank = ending_in(tensors, _FACTORS["U"]).shape[0]
        return FacT(rank=rank, scale=hyper["scale"], variant=variant, dropout=hyper.get("dropout", 0.1))

    return method


def _fact_name(item: PlanItem, tensor: str) -> str:
    if tensor in _FACTORS:
        return _FACTORS[tensor]
    branch, layer = item.site.role.split(".")
    return f"{block_of(item.site)}.{branch}.{layer}_FacTs.weight"


def _compacter(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    shared = "phm_rule" in tensors
    rule = ending_in(tensors, "phm_rule")
    left = [tensor for name, tensor in tensors.items() if name.endswith("down_sampler.W_left")]
    return Compacter(
        bottleneck=ending_in(tensors, "down_sampler.b").shape[0],
        phm_dim=rule.shape[0],
        rank=left[0].shape[-1] if left else None,
        shared_rule=shared,
        roles=None if any(".compacter_attn." in name for name in tensors) else ("mlp",),
    )


def _compacter_name(item: PlanItem, tensor: str) -> str:
    if tensor == "rule":
        return "phm_rule"
    layer, _, part = tensor.partition("_")
    own = {"": "W", "left": "W_left", "right": "W_right", "bias": "b", "rule": "phm_rule"}[part]
    return f"{block_of(item.site)}.compacter_{item.site.role.split('.')[0]}.{layer}_sampler.{own}"


def _names(name: Callable[[PlanItem, str], str]) -> Callable[[Plan], dict[str, str]]:
    return lambda plan: {f"{item.key}.{tensor}": name(item, tensor) for item in plan for tensor in item.shapes()}


register_source(Source("fact_tt", _fact("tt"), _names(_fact_name)))
register_source(Source("fact_tk", _fact("tk"), _names(_fact_name)))
register_source(Source("compacter", _compacter, _names(_compacter_name)))
