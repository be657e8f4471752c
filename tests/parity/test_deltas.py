"""Changes of weights (reference part E, and what is like them in F): outputs and all gradients of the authors' code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.parity.test_parity import FILES, PRECISIONS, backbone, below, read
from vispeft.adapters.bank import AdapterBank
from vispeft.core.sites import Site
from vispeft.methods.svfit import decompose

BY_STEM = {path.stem: path for path in FILES}
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def tolerance(meta: Mapping[str, Any], precision: str) -> float:
    """Read the tolerance, relative to a tensor's largest entry, out of the file."""
    return float(meta["tolerance"][f"{precision}_relative_to_max"])


def assert_close(name: str, found: Tensor, wanted: Tensor, limit: float) -> None:
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
    assert error <= limit, f"{name}: relative error {error:.1e}"


def site(name: str, rows: int, columns: int, role: str = "mlp.fc1") -> Site:
    """Describe a linear layer that stands alone."""
    return Site(name, role, "linear", columns, rows)


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file become those of a method."""

    method: Callable[[dict[str, Any]], vispeft.Method]
    """Makes the method from the file's configuration."""
    names: Mapping[str, str]
    """Our name of each of the authors' tensors, behind the path of the layer."""
    value: Callable[[str, Tensor, nn.Module], Tensor] = lambda path, tensor, model: tensor
    """Our value of a tensor, from the layer's path, theirs, and the plain model."""


def bone(meta: dict[str, Any]) -> vispeft.Method:
    config = meta["config"]
    mini = config["mini_r"] if config["variant"] == "mini" else None
    return vispeft.Bone(rank=config["r"], variant="bat" if config["variant"] == "bat" else "miss", mini=mini)


def mask(meta: dict[str, Any]) -> vispeft.Method:
    roles = tuple(target.replace("patch_embed.proj", "patch_embed") for target in meta["config"]["targets"])
    return vispeft.Mask(roles=roles, penalty=1.0)


def shifted(path: str, sigma: Tensor, model: nn.Module) -> Tensor:
    """Subtract the frozen singular values."""
    return sigma - decompose(model.get_submodule(path).weight, path)[1].to(model.get_submodule(path).weight.dtype)


def flat_entries(path: str, tensor: Tensor, model: nn.Module) -> Tensor:
    """Turn rows and columns into positions."""
    columns = model.get_submodule(path).weight.shape[1]
    return tensor if tensor.ndim == 1 else (tensor[0].long() * columns + tensor[1]).int()


def split(meta: dict[str, Any]) -> vispeft.Method:
    return vispeft.Sparse(budget=meta["config"]["budget"])


MISS, BAT = Fit(bone, {"miss_block": "D"}), Fit(bone, {"miss_block": "B"})
MASK = Fit(mask, {"mask_real": "M"}, lambda path, tensor, model: tensor.flatten(1))
SHIRA = Fit(
    lambda meta: vispeft.Sparse(budget=f"lora:{meta['config']['r']}"),
    {"shira_weight": "values", "shira_indices": "positions"},
    flat_entries,
)
SFT = Fit(split, {"sft_delta.values": "values", "sft_delta.indices": "positions"})
NETWORKS: dict[str, Fit] = {
    **dict.fromkeys(("miss_vit", "miss_vit_r10", "miss_mini_vit", "miss_swin", "miss_swin_r6", "miss_mini_swin"), MISS),
    **dict.fromkeys(("bat_vit", "bat_swin"), BAT),
    "svfit_vit": Fit(lambda meta: vispeft.SVFit(rank=meta["config"]["r"]), {"sigma": "shift"}, shifted),
    **dict.fromkeys(("mask_vit", "mask_clip_vit"), MASK),
    "sparse_shira_swin": SHIRA,
    "sparse_sft_swin": SFT,
}


def base(stem: str, meta: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model = backbone(meta, tensors, dtype)
    for module in model.modules() if stem == "mask_clip_vit" else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = meta["config"]["norm_eps"]
    return model


def adapted(
    stem: str, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module, AdapterBank, dict[str, str]]:
    """Make a network of a file with its adapter; also return our name of each of the authors' tensors."""
    meta, tensors = read(BY_STEM[stem])
    fit, model = NETWORKS[stem], base(stem, meta, tensors, dtype)
    limit = tolerance(meta, PRECISIONS[dtype])
    assert_close("base_logits", model(tensors["input.images"].to(dtype)), tensors["out.base_logits"], limit)
    ours, values = {}, {}
    for theirs, tensor in below(tensors, "adapter.").items():
        last = next(name for name in fit.names if theirs.endswith(f".{name}"))
        path = theirs.removesuffix(f".{last}")
        given = tensor.to(dtype) if tensor.is_floating_point() else tensor
        ours[theirs] = (path, fit.names[last])
        values[theirs] = fit.value(path, given, model)
    bank = vispeft.attach(model, fit.method(meta), verify=False)
    state = bank.state_dict()
    for theirs, (path, name) in ours.items():
        ours[theirs] = next(key for key in state if re.fullmatch(rf"{re.escape(path)}/\w+\.{name}", key))
    head = {key: t for key, t in state.items() if key.startswith("head/")}
    assert set(ours.values()) | set(head) == set(state), "a tensor of the adapter is not in the file"
    bank.load_state_dict({**{ours[theirs]: value for theirs, value in values.items()}, **head})
    return meta, tensors, model, bank, ours


@pytest.mark.parametrize("dtype", list(PRECISIONS), ids=list(PRECISIONS.values()))
@pytest.mark.parametrize("stem", [stem for stem in NETWORKS if stem in BY_STEM])
def test_networks(stem: str, dtype: torch.dtype, tmp_path: Path) -> None:
    meta, tensors, model, bank, ours = adapted(stem, dtype)
    limit = tolerance(meta, PRECISIONS[dtype])
    images = tensors["input.images"].to(dtype)
    out = model(images)
    assert_close("logits", out, tensors["out.logits"], limit)
    if "out.features" in tensors:
        assert_close(
            "features", model.forward_head(model.forward_features(images), True), tensors["out.features"], limit
        )
    (out * tensors["input.w"].to(dtype)).sum().backward()
    found = bank.named_tensors()
    gradients = below(tensors, "grad.adapter.")
    assert {ours[name] for name in gradients} == {key for key in found if not key.startswith("head/")}
    for name, wanted in gradients.items():
        loose = max(limit, 1e-6) if wanted.dtype == torch.float32 else limit
        assert_close(f"grad.{name}", found[ours[name]].grad.view(wanted.shape), wanted, loose)
    if "out.norm_penalty" in tensors:
        penalty = bank.loss_terms((images, None), out)
        assert penalty is not None
        assert_close("norm_penalty", penalty, tensors["out.norm_penalty"], limit)
    if "n_params" in meta["config"]:
        assert meta["config"]["n_params"] == bank.report().trainable
    bank.save(tmp_path)
    again = base(stem, meta, tensors, dtype)
    vispeft.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    bank.merge()
    weights = model.state_dict()
    for name, wanted in below(tensors, "merged.").items():
        assert_close(f"merged.{name}", weights[name if name in weights else f"{name}.weight"], wanted, limit)
    if "out.merged_logits" in tensors:
        assert_close("merged_logits", model(images), tensors["out.merged_logits"], limit)
