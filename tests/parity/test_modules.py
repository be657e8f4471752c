"""Single modules of reference part B against the project's public units and functions: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.test_networks import GRADIENT, MERGED, OUTPUT
from tests.parity.test_parity import FILES, below, read
from vispeft.adapters.heads import LowBitHead
from vispeft.core.sites import Site
from vispeft.core.units import Unit
from vispeft.methods import Bottleneck, BottleneckUnit, HydraUnit, PrefixMLP, PrefixSlot, phm_linear, phm_matrix
from vispeft.methods.compacter import CompacterUnit, PHMRule, UnitShape
from vispeft.storage.quantize import codebook, decode, quantize

Run = Callable[[Tensor], Tensor]
Leaves = dict[str, nn.Parameter]
"""Trainable tensors under the authors' names."""


def filled(unit: Unit, names: dict[str, str], given: dict[str, Tensor]) -> Leaves:
    """Copy the authors' tensors into a unit; every one of them, and every tensor of the unit, must be used."""
    own = dict(unit.named_parameters())
    assert {names[name] for name in own} == set(given)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[names[name]])
    return {names[name]: tensor for name, tensor in own.items()}


def assert_equal_module(tensors: dict[str, Tensor], run: Run, leaves: Leaves) -> None:
    x = tensors["input"].clone().requires_grad_()
    out = run(x)
    assert (out - tensors["output"]).abs().max() <= OUTPUT
    (out * tensors["loss_weight"]).sum().backward()
    wanted = {**below(tensors, "grad."), "input": tensors["grad_input"]}
    found = {**leaves, "input": x}
    assert set(wanted) == set(found)
    for name, gradient in wanted.items():
        error = (found[name].grad - gradient).abs().max() / gradient.abs().max()
        assert error <= GRADIENT, f"{name}: {error:.1e}"


def layers(*names: str) -> dict[str, str]:
    """Name weight and bias of linear layers that the authors call ``*_proj``."""
    return {ours: theirs for n in names for ours, theirs in ((n, f"{n}_proj.weight"), (f"{n}_bias", f"{n}_proj.bias"))}


def unified_adapter(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    scale = hyper["adapter_scalar"]
    unit = BottleneckUnit(
        Bottleneck(
            width=hyper["dim"],
            middle=hyper["bottleneck"],
            scale=None if scale == "learnable_scalar" else float(scale),
            layernorm=hyper["adapter_layernorm_option"],
            start=hyper["init_option"],
        )
    )
    norm = {f"norm_{part}": f"adapter_layer_norm_before.{part}" for part in ("weight", "bias")}
    leaves = filled(unit, {**layers("down", "up"), **norm, "scale": "scale"}, below(tensors, "adapter."))
    assert_equal_module(tensors, lambda x: unit.change(x) + x if hyper["add_residual"] else unit.change(x), leaves)


def unified_prefix(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    width, depth = hyper["dim"], hyper["depth"]
    network = PrefixMLP(hyper["prefix_len"], width, hyper["mid_dim"], 2 * depth * width, 0.0)
    names = {
        f"{ours}.{part}": f"control_trans.{number}.{part}"
        for ours, number in (("inner", 0), ("outer", 2))
        for part in ("weight", "bias")
    }
    filled(network, {**names, "embedding": "wte.weight"}, below(tensors, "adapter."))
    for layer in range(depth):
        slot = PrefixSlot(width, 2 * layer * width)
        slot.borrow(network)
        for kind, table in zip(("key", "value"), slot.keys_values(), strict=True):
            heads = table.unflatten(1, (hyper["heads"], -1)).transpose(0, 1)
            assert (heads - tensors[f"prefix_{kind}.{layer}"]).abs().max() <= OUTPUT, f"{kind} {layer}"


def hydra_module(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    site = Site("layer", "mlp.fc2", "linear", hyper["in_features"], hyper["out_features"])
    unit = HydraUnit(site, hyper["rank"], hyper["scale"], 0.0, 32)
    names = {
        f"{branch}_{ours}": f"{branch[:3]}.{theirs}"
        for branch in ("parallel", "sequential")
        for ours, theirs in layers("down", "up").items()
    }
    leaves = filled(unit, names, below(tensors, "adapter."))
    weight, bias = tensors["base.weight"], tensors["base.bias"]
    assert_equal_module(tensors, lambda x: unit.after(x, nn.functional.linear(x, weight, bias)), leaves)
    merged = unit.fold_weight(weight), unit.fold_bias(bias)
    for name, tensor in zip(("weight", "bias"), merged, strict=True):
        assert (tensor - tensors[f"merged.{name}"]).abs().max() <= MERGED, name
    assert (nn.functional.linear(tensors["input"], *merged) - tensors["merged_output"]).abs().max() <= MERGED


def compacter_phm(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    leaves = {name: nn.Parameter(tensor.clone()) for name, tensor in below(tensors, "adapter.").items()}
    rule, weight = (_whole_or_factors(leaves, name) for name in ("phm_rule", "W"))
    assert (phm_matrix(rule, weight) - tensors["H"]).abs().max() <= OUTPUT
    assert_equal_module(tensors, lambda x: phm_linear(x, rule, weight, leaves.get("b")), leaves)


def _whole_or_factors(leaves: Leaves, name: str) -> Tensor | tuple[Tensor, Tensor]:
    return leaves[name] if name in leaves else (leaves[f"{name}_left"], leaves[f"{name}_right"])


def compacter_adapter(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    n = hyper["phm_dim"]
    unit = CompacterUnit(UnitShape(width=hyper["dim"], middle=hyper["bottleneck"], n=n, rank=hyper["rank"]))
    rule, given = PHMRule(n, 1.0), below(tensors, "adapter.")
    unit.borrow(rule)
    shared = filled(rule, {"rule": "phm_rule"}, {"phm_rule": given.pop("phm_rule")})
    parts = {"left": "W_left", "right": "W_right", "bias": "b"}
    names = {f"{layer}_{p}": f"{layer}_sampler.{parts[p]}" for layer in ("down", "up") for p in parts}
    assert_equal_module(tensors, unit.change, {**filled(unit, names, given), **shared})


def binadapter_quantizer(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    bits = hyper["bits"]
    levels, thresholds = codebook(bits)
    # The authors' iteration rounds in another place of double precision, which shows in levels next to zero alone.
    for found, wanted in ((levels, "codebook"), (thresholds, "boundaries"), (levels.diff() / 2, "half_steps")):
        assert (found - tensors[wanted]).abs().max() <= 1e-12, wanted
    for index, shape in enumerate(hyper["shapes"]):
        _one_matrix(bits, shape, below(tensors, f"case{index}."))


def _one_matrix(bits: int, shape: list[int], case: dict[str, Tensor]) -> None:
    found = quantize(case["weight"], bits)
    differing = int((found.codes != case["code_index"]).sum())
    assert differing <= (1 if bits == 8 else 0)  # README-B: thresholds are as near as 3e-6 at 8 bits
    theirs = torch.cat([case["packed_bytes"], found.packed(bits)[-8:]])
    if not differing:
        assert torch.equal(found.packed(bits), theirs)
    # Mean and spread are sums, whose last digits depend on their order; with theirs the values are exact.
    for name in ("mean", "std"):
        assert torch.isclose(getattr(found, name), case[name], rtol=1e-6, atol=1e-8), name
    assert torch.equal(levels_of(case, bits), case["reloaded_weight"])
    layer = LowBitHead(shape[1], shape[0], bits)
    with torch.no_grad():
        layer.weight.copy_(case["weight"])
    if differing:
        return
    assert (layer.matrix("weight") - case["effective_weight"]).abs().max() <= OUTPUT
    assert_equal_module({**case, "grad.weight": case["grad_weight"]}, layer, {"weight": layer.weight})
    layer.weight.grad = None
    (layer.matrix("weight") * case["cotangent"]).sum().backward()
    wanted = case["grad_weight_for_cotangent"]
    assert (layer.weight.grad - wanted).abs().max() <= GRADIENT * wanted.abs().max()
    with torch.no_grad():
        layer.weight.copy_(levels_of(case, bits))
    layer.keep_encoded("weight", file_bytes(case))
    assert (layer(case["input"]) - case["reloaded_output"]).abs().max() <= OUTPUT


def file_bytes(case: dict[str, Tensor]) -> Tensor:
    """Give the authors' codes, mean and spread as our files hold them."""
    tail = torch.tensor([float(case["mean"]), float(case["std"])]).view(torch.uint8)
    return torch.cat([case["packed_bytes"], tail])


def levels_of(case: dict[str, Tensor], bits: int) -> Tensor:
    return decode(file_bytes(case), bits, tuple(case["code_index"].shape))


MODULES = {
    "unified_prefix_mlp": unified_prefix,
    "unified_adapter_": unified_adapter,
    "hydra_module_": hydra_module,
    "compacter_phm_": compacter_phm,
    "compacter_adapter": compacter_adapter,
    "binadapter_quantizer_": binadapter_quantizer,
}
"""The check of each kind of file, by the beginning of the file's name."""

CLAIMED = [path for path in FILES if path.stem.startswith(tuple(MODULES))]
"""The files checked here."""


@pytest.mark.parametrize("path", CLAIMED, ids=[path.stem for path in CLAIMED])
def test_module(path: Path) -> None:
    meta, tensors = read(path)
    check = next(check for prefix, check in MODULES.items() if path.stem.startswith(prefix))
    check(meta["hyper"], tensors)
