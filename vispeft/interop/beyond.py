"""Tensor names of public codes of 2024 and 2025.

Adapter+ (visinf/adapter_plus at 191c4ab), Mona (Leiyi-Hu/mona at 5deeac9), MLAE (jie040109/MLAE at 7452aa4), Rein
(w1oves/Rein at 7da85bc), conformer adapters (umbertocappellazzo/PETL_AST at 1fe23af), DyT
(NUS-HPC-AI-Lab/Dynamic-Tuning at d1744f0), the visual part of MMRL and MMRL++ (yunncheng/MMRL at 27d8821).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.blocks import ending_in, hyper_of, layer_names, placed
from vispeft.interop.official import Source, register_source
from vispeft.methods.adapter_plus import AdapterPlus
from vispeft.methods.conformer_adapter import ConformerAdapter
from vispeft.methods.dyt import DyT
from vispeft.methods.mlae import MLAE
from vispeft.methods.mmrl import MMRL
from vispeft.methods.mona import KERNELS, Mona
from vispeft.methods.rein import Rein

__all__ = ["CONFORMER", "MONA"]


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


def _mlae(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata.get("config", metadata), "mlae", "sites")
    return MLAE(
        rank=ending_in(tensors, "lora_A").shape[0],
        expert_dropout=hyper.get("expert_dropout", 0.5),
        roles=tuple(hyper["sites"]),
    )


def _named_by_layer(plan: Plan, tensors: Mapping[str, str]) -> dict[str, str]:
    return {f"{item.key}.{name}": f"{item.site.path}.{tensors[name]}" for item in plan for name in item.shapes()}


def _dyt(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata.get("config", metadata), "dyt", "scale")
    return DyT(
        bottleneck=ending_in(tensors, "down_proj.weight").shape[0],
        scale=hyper["scale"],
        dropout=hyper.get("dropout", 0.1),
    )


_DYT = layer_names(down="adaptmlp.down_proj", up="adaptmlp.up_proj", gate="mlp_token_select.mlp_head")
_MLAE = {"A": "lora_A", "B": "lora_B", "coefficients": "lora_lamda"}


def _rein(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    low_rank = tensors.get("learnable_tokens_a")
    tokens = ending_in(tensors, "learnable_tokens") if low_rank is None else low_rank
    return Rein(
        num_tokens=tokens.shape[1],
        rank=None if low_rank is None else low_rank.shape[2],
        query=tensors["merge.bias"].shape[0] if "merge.bias" in tensors else None,
        softmax=metadata.get("config", metadata).get("use_softmax", True),
    )


_REIN = {
    "scale": "scale",
    "tokens": "learnable_tokens",
    "tokens_a": "learnable_tokens_a",
    "tokens_b": "learnable_tokens_b",
    **layer_names(value="mlp_token2feat", output="mlp_delta_f", transform="transform", merge="merge"),
}


def _rein_names(plan: Plan) -> dict[str, str]:
    return {f"{item.key}.{name}": _REIN[name] for item in plan for name in item.shapes()}


def _conformer(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata.get("config", metadata), "conformer", "type", "placement", "reduction_rate")
    return ConformerAdapter(
        variant=hyper["type"].lower(),
        mode=hyper["placement"],
        residual=hyper.get("apply_residual", False),
        reduction=hyper["reduction_rate"],
        kernel=ending_in(tensors, "dwise_conv.weight").shape[-1],
        train_norms=any("layernorm" in name for name in tensors),
    )


CONFORMER = {
    **layer_names(down="pwise_conv1", depthwise="dwise_conv", up="pwise_conv2"),
    "norm_weight": "bnorm.weight",
    "norm_bias": "bnorm.bias",
    "mean": "bnorm.running_mean",
    "variance": "bnorm.running_var",
}
_CONFORMER_PLACES = {"conformer_mlp": "adapter_module_FFN", "conformer_attn": "adapter_module_MHSA"}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}


def _conformer_names(plan: Plan) -> dict[str, str]:
    names = {}
    for item in plan:
        if item.unit != "norm":
            place = f"encoder.layer.{item.site.block}.{_CONFORMER_PLACES[item.unit]}"
            names |= {f"{item.key}.{ours}": f"{place}.{theirs}" for ours, theirs in CONFORMER.items()}
            continue
        inside = item.site.block is not None
        place = f"encoder.layer.{item.site.block}.{_NORMS[item.site.role]}" if inside else "layernorm"
        names |= {f"{item.key}.{tensor}": f"{place}.{tensor}" for tensor in item.shapes()}
    return names


_LEARNER = "representation_learner."
_MMRL = {
    "mmrl": {
        "weight": f"{_LEARNER}compound_rep_tokens_r2vproj.{{}}.weight",
        "bias": f"{_LEARNER}compound_rep_tokens_r2vproj.{{}}.bias",
        "read": "image_encoder.proj_rep",
    },
    "mmrl++": {
        "weight": f"{_LEARNER}srra_r2vproj.weight",
        **{name: f"{_LEARNER}srra_r2vproj.srra.{{}}.{name}" for name in ("A", "B", "bias")},
        "read_A": "image_encoder.A",
        "read_B": "image_encoder.B",
    },
}
"""The authors' names by variant; those of blocks are numbered from the first one with tokens."""


def _mmrl(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    wide = "image_encoder.A" in tensors
    variant: Literal["mmrl", "mmrl++"] = "mmrl++" if wide else "mmrl"
    hyper = hyper_of(metadata, "mmrl", "classes", "alpha", *(("beta",) if wide else ()))
    tokens, bias = ending_in(tensors, "compound_rep_tokens"), _MMRL[variant]["bias"]
    blocks = next(number for number in range(len(tensors) + 1) if bias.format(number) not in tensors)
    if not 0 < blocks <= view.depth:
        raise FileError(f"There are {blocks} tensors named {bias.format('N')}, and the model has {view.depth} blocks.")
    ranks = {}
    if wide:
        ranks = {"rank": ending_in(tensors, ".srra.0.B").shape[0], "read_rank": tensors["image_encoder.A"].shape[1]}
    return MMRL(
        classes=hyper["classes"],
        variant=variant,
        num_tokens=tokens.shape[0],
        token_dim=tokens.shape[1],
        first_block=view.depth - blocks,
        beta=hyper.get("beta"),
        alpha=hyper["alpha"],
        reg_weight=hyper.get("reg_weight", 1.0),
        **ranks,
    )


def _mmrl_names(plan: Plan) -> dict[str, str]:
    method: Any = plan.method
    names = {"tokens": f"{_LEARNER}compound_rep_tokens", **_MMRL[method.variant]}
    return {f"{item.key}.{tensor}": names[tensor] for item in plan for tensor in item.shapes()}


register_source(Source("adapter_plus", _adapter_plus, placed(lambda _, unit: unit, _PLUS)))
register_source(Source("mona", _mona, placed(lambda _, unit: _mona_place(unit), MONA)))
register_source(Source("mlae", _mlae, lambda plan: _named_by_layer(plan, _MLAE)))
register_source(Source("dyt", _dyt, lambda plan: _named_by_layer(plan, _DYT)))
register_source(Source("rein", _rein, _rein_names))
register_source(
    Source(
        "conformer",
        _conformer,
        _conformer_names,
        trailing=("pwise_conv1.weight", "pwise_conv2.weight"),
        ignored=(".lnorm.",),
    )
)
# The text tower's layers are not run here.
register_source(Source("mmrl", _mmrl, _mmrl_names, ignored=("_r2tproj.",)))
