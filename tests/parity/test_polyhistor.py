"""Polyhistor-Lite against reference values of part C: generated weights and norms, outputs, loss, all gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import vispeft
from tests.parity.test_parity import FILES, below, read
from vispeft.adapters.bank import AdapterBank
from vispeft.interop import load_official, to_official

HYPERNETS = [path for path in FILES if path.stem.startswith("polyhistor_hypernet")]
"""The files checked here."""
TOLERANCE = 1e-5
"""Relative to a tensor's largest entry; the files suggest 1e-4, and their values are those of float64."""


def adapted(meta: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[nn.Module, AdapterBank]:
    """Load the adapter into a Swin of as many blocks as the file has layers."""
    depths, width = meta["depths"], meta["base_dim"]
    heads = tuple(2 * scale for scale in meta["stage_scales"])
    model = SwinTransformer(
        img_size=16, patch_size=2, embed_dim=width, depths=depths, num_heads=heads, window_size=4, num_classes=0
    )
    return model, load_official(model, "polyhistor", below(tensors, "adapter."), meta)


def assert_close(name: str, found: Tensor, wanted: Tensor) -> None:
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("path", HYPERNETS, ids=[path.stem for path in HYPERNETS])
def test_generated_adapters(path: Path, tmp_path: Path) -> None:
    meta, tensors = read(path)
    _, bank = adapted(meta, tensors)
    units = [unit for key, unit in bank.units().items() if key.endswith("/polyhistor")]
    names = {"down.weight": "down", "down.bias": "down_bias", "up.weight": "up", "up.bias": "up_bias"}
    names |= {"post_norm.weight": "norm_weight", "post_norm.bias": "norm_bias"}
    losses = []
    for task in meta["tasks"]:
        terms = [unit for key, unit in bank.units().items() if key.endswith(f"/polyhistor_term@{task}")]
        for layer, (unit, term) in enumerate(zip(units, terms, strict=True)):
            group = below(tensors, f"{task}.layer{layer}.")
            made = unit.weights(task)
            for theirs, ours in names.items():
                assert_close(f"{task} {layer} {theirs}", getattr(made, ours), group[theirs])
            out = group["input"] + term.branch(group["input"], None, 0)
            assert_close(f"{task} {layer} out", out, group["out"])
            losses.append((out * group["w"]).sum())
    loss = torch.stack(losses).sum()
    assert_close("loss", loss, tensors["loss"].squeeze())
    loss.backward()
    found, wanted = to_official(bank, "polyhistor", grad=True), below(tensors, "grad.adapter.")
    assert set(found) == set(wanted) == set(below(tensors, "adapter."))
    for name, gradient in wanted.items():
        assert_close(f"grad.{name}", found[name], gradient)
    values = to_official(bank, "polyhistor")
    assert all(torch.equal(values[name], tensor) for name, tensor in below(tensors, "adapter.").items())
    bank.save(tmp_path)
    again = vispeft.load(adapted(meta, tensors)[0], tmp_path, name="again", allow_base_mismatch=True)
    assert all(torch.equal(bank.state_dict()[key], t) for key, t in again.state_dict().items())
