"""Choices of entries against the public codes of GPS (reference part F), and LIFT and LT-SFT (part E), whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, Case, differs
from tests.parity.test_adapter_plus import planned
from tests.parity.test_delta_modules import assert_close, site
from tests.parity.test_parity import below
from vispeft.adapters.bank import AdapterBank
from vispeft.methods.gps import contrastive_loss
from vispeft.methods.sparse import SparseUnit
from vispeft.methods.sparse_schedules import Refresh, SparseAdamW
from vispeft.methods.sparse_start import contrast_gradients

LOSS = {"float64": 1e-9, "float32": 2e-5}
"""Tolerances of the file, relative."""


def trained(bank: AdapterBank, name: str, like: Tensor) -> Tensor:
    """Say of each entry of a parameter of the model whether it trains."""
    path, _, own = name.rpartition(".")
    units = bank.units()
    flags = torch.zeros(like.numel(), dtype=torch.uint8)
    if name.startswith("head.") or f"{path}/whole.{own}" in bank.named_tensors():
        flags.fill_(1)
    elif own == "weight" and f"{path}/sparse" in units:
        unit = units[f"{path}/sparse"]
        assert isinstance(unit, SparseUnit)
        flags[unit.positions.long()] = 1
    return flags.view(like.shape)


@pytest.mark.parametrize("precision", DTYPES)
def test_gps(precision: str) -> None:
    case, dtype = Case.of("gps_vit"), DTYPES[precision]
    tensors, model = case.tensors, case.model(dtype)
    method = vispeft.Sparse(budget=f"row:{case.meta['config']['per_row']}", support="gps", everywhere=True)
    bank = vispeft.attach(model, method, verify=False)
    views = [
        (tensors[f"input.view1.{i}"].to(dtype), tensors[f"input.view2.{i}"].to(dtype), tensors[f"input.labels.{i}"])
        for i in range(case.meta["config"]["batches"])
    ]
    losses: list[Tensor] = []
    found = contrast_gradients(bank, "default", views, lambda loss: losses.append(loss.detach()))
    for i, loss in enumerate(losses):
        assert differs(loss, tensors[f"out.loss.{i}"]) <= LOSS[precision]
    for unit, grad in zip([u for u in bank.units().values() if isinstance(u, SparseUnit)], found, strict=True):
        unit.positions.copy_(unit.chosen(grad.abs()))
        wanted = tensors.get(f"grad.backbone.{unit.site.path}.weight")
        if wanted is not None:
            assert differs(grad.view(wanted.shape), wanted) <= GRADIENT[precision], unit.site.path
    for name, wanted in below(tensors, "out.trainable.").items():
        assert torch.equal(trained(bank, name, wanted), wanted), name
    # Biases train as a whole; their gradients are those of the same loss.
    for first, second, labels in views:
        tokens = model.forward_features(torch.cat([first, second]))
        contrastive_loss(model.forward_head(tokens, pre_logits=True), labels).backward()
    for name in ("blocks.0.attn.proj", "blocks.0.attn.qkv"):
        grad = bank.named_tensors()[f"{name}/whole.bias"].grad
        assert grad is not None
        assert differs(grad, tensors[f"grad.backbone.{name}.bias"]) <= GRADIENT[precision]


def test_counts_of_gps() -> None:
    models = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224")
    found = [planned(name, vispeft.Sparse(budget="row:1", support="gps", everywhere=True)) for name in models]
    assert found == [167_424, 104_346, 282_168]
    assert planned(models[0], vispeft.Sparse(budget="row:2", support="gps", everywhere=True)) == 251_136


def test_refreshed_principal_weights() -> None:
    """In float64 alone: wrong variants of an optimiser may differ by 5e-6."""
    case = Case.of("sparse_lift_steps")
    config, t = case.meta["config"], case.tensors
    limit, weight = float(case.meta["tolerance"]["float64_relative_to_max"]), t["weight"].double()
    unit = SparseUnit(site("layer", *weight.shape), config["k"], "lift", config["q"], "lift").double()
    with torch.no_grad():
        unit.prepare(weight)
        unit.values.zero_()
    optimizer = SparseAdamW([unit.values], lr=config["lr"], betas=config["betas"], eps=config["eps"])
    rule, changed = Refresh(config["update_interval"], config["q"]), [0]

    def mask() -> Tensor:
        return (
            torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, unit.positions.long(), True).view(weight.shape)
        )

    assert torch.equal(mask(), t["mid.mask.0"])
    for step in range(1, config["steps"] + 1):
        unit.values.grad = t[f"input.grad.{step}"].flatten()[unit.positions.long()]
        optimizer.step()
        before = mask()
        rule.after_step([unit], [weight], optimizer)
        optimizer.state[unit.values]["age"].fill_(step + 1)  # the public code has one counter for all entries
        changed.append(int((before & ~mask()).sum()))
        assert torch.equal(mask(), t[f"mid.mask.{step}"])
        assert_close("weight", unit.fold_weight(weight).detach(), t[f"out.weight.{step}"], limit)
        for name in ("exp_avg", "exp_avg_sq"):
            dense = torch.zeros(weight.numel(), dtype=torch.float64)
            dense[unit.positions.long()] = optimizer.state[unit.values][name]
            assert_close(name, dense.view(weight.shape), t[f"out.{name}.{step}"], limit)
    assert changed[1:] == config["replaced_after_step"]
    assert len(unit.left_positions) == max(changed)
