"""MTLoRA and MTLoRA+ of reference part C: the layer in all its modes, backbones, and the whole public model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import vispeft
from tests.parity.test_parity import FILES, below, read
from vispeft.core.route import Route, Routing, acting
from vispeft.core.sites import Site
from vispeft.core.units import Unit
from vispeft.hosts.base import ensure_host
from vispeft.hosts.layers import LinearHost
from vispeft.hosts.streams import Streams
from vispeft.interop import load_official, to_official
from vispeft.methods.lora import Factors
from vispeft.methods.mtlora import SharedPair, TaskPair, TaskSum

CLAIMED = {path.stem: path for path in FILES if path.stem.startswith("mtlora_")}
SWINS = [name for name in CLAIMED if name.startswith("mtlora_swin")]
CASES = ("shared_only", "matrix_from_shared", "matrix", "matrixv2", "addition", "trainable_scales")


def assert_all_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare tensors, entry by entry in float64, and in float32 relative to a tensor's largest entry.

    Entries of gradients are sums of thousands of terms of either sign, of which float32 keeps seven digits each.
    """
    assert set(found) == set(wanted)
    assert wanted
    for name, tensor in wanted.items():
        tensor = tensor.to(found[name])
        scale = tensor.abs() if tensor.dtype == torch.float64 else tensor.abs().max()
        error = (found[name] - tensor).abs()
        assert (error <= tolerance * (1 + scale)).all(), f"{name}: {error.max():.1e}"


# ---------------------------------------------------------------------- the layer


def units_of(meta: dict[str, Any], case: str) -> dict[str, Unit]:
    """Make the units of a case, by the authors' names without the tensors'."""
    options = meta["cases"][case]
    site = Site("layer", "mlp.fc1", "linear", meta["in_features"], meta["out_features"])
    factors = Factors(rank=meta["rank_shared"], scale=meta["scales"]["shared"], bits=32, freeze_a=False, lr_ratio=1.0)
    shared_trains, task_trains = options["trainable_scale_shared"], options["trainable_scale_per_task"]
    mode, tasks = options["shared_mode"], options["tasks"] or []
    units: dict[str, Unit] = {}
    if mode != "addition":
        units["shared"] = SharedPair(site, factors, 0.0, shared_trains, False)
    for task in tasks:
        own = replace(factors, rank=meta["rank_tasks"][task], scale=meta["scales"][task])
        units[task] = TaskPair(site, own, 0.0, task_trains, task, mode == "matrixv2")
    if mode == "addition":
        units["norm"] = TaskSum(site.out_features, tasks, False)
    return units


def official(label: str, tensor: str) -> str:
    if label == "norm":
        return f"lora_norm.{tensor}"
    kind = "scale" if tensor == "multiplier" else tensor
    if label == "shared":
        return f"lora_shared_{kind}"
    return f"lora_task_scale.{label}" if kind == "scale" else f"lora_tasks_{kind}.{label}"


@pytest.mark.skipif("mtlora_linear" not in CLAIMED, reason="the folder has no such file")
@pytest.mark.parametrize("case", CASES)
def test_the_layer_in_every_mode(case: str) -> None:
    meta, tensors = read(CLAIMED["mtlora_linear"])
    assert set(meta["cases"]) == set(CASES)
    units = units_of(meta, case)
    named = {official(label, name): t for label, unit in units.items() for name, t in unit.named_parameters()}
    given = below(tensors, f"{case}.adapter.")
    assert set(named) == set(given)
    layer: Any = nn.Linear(meta["in_features"], meta["out_features"])
    with torch.no_grad():
        layer.weight.copy_(tensors["weight"])
        layer.bias.copy_(tensors["bias"])
        for name, tensor in given.items():
            named[name].copy_(tensor)
    routing = Routing()
    host: Any = ensure_host(layer, LinearHost, routing=routing)
    routing.set(Route(("a",), None, {host.slot: acting(units.values())}))
    x = tensors["input.x"].clone().requires_grad_()
    options = meta["cases"][case]
    own = below(tensors, "input.x_tasks.") if options["x_tasks_given"] else {}
    own = {task: tensor.clone().requires_grad_() for task, tensor in own.items()}
    out = host.split(Streams(x, own))
    found = {"shared": out.tokens, **{f"task.{task}": tensor for task, tensor in out.beside.items()}}
    assert_all_close(found, below(tensors, f"{case}.out."), 1e-5)
    loss = sum((tensor * tensors[f"w.{name}"]).sum() for name, tensor in found.items())
    loss.backward()
    gradients = {f"adapter.{name}": t.grad for name, t in named.items()}
    gradients |= {"weight": layer.weight.grad, "bias": layer.bias.grad, "input.x": x.grad}
    gradients |= {f"input.x_tasks.{task}": tensor.grad for task, tensor in own.items()}
    assert_all_close(gradients, below(tensors, f"{case}.grad."), 1e-5)


# ---------------------------------------------------------------------- backbones


def public(name: str) -> str:
    """Name a tensor of timm's Swin as the public backbone does, where patch merging ends a stage."""
    return re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)


def adapted(file: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor], Any, Any]:
    """Make a file's backbone and load the adapter, with the tensors of the backbone that the method trains."""
    meta, tensors = read(CLAIMED[file])
    model: Any = SwinTransformer(**meta["timm_config"]).eval()
    weights = below(tensors, "backbone.")
    model.load_state_dict(weights)
    trained = {name for key in tensors for name in re.findall(r"^grad(?:_loss)?\.backbone\.(.*)", key)}
    given = below(tensors, "adapter.") | {public(name): weights[name] for name in trained}
    bank = load_official(model.to(dtype), "mtlora", given, meta)
    assert bank.tasks() == meta["tasks"]
    assert set(to_official(bank, "mtlora")) == set(given)
    return meta, tensors, model, bank


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("file", SWINS)
def test_maps_and_gradients_of_a_backbone(file: str, dtype: torch.dtype) -> None:
    meta, tensors, model, bank = adapted(file, dtype)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]
    images = tensors["input"].to(dtype, copy=True).requires_grad_()
    result = model.run(images)
    found = {}
    for stage, bundle in enumerate([*result.entries[1:], result.streams]):
        found[f"stage{stage}.shared"] = bundle.tokens.flatten(1, 2)
        found |= {f"stage{stage}.task.{task}": bundle.beside[task].flatten(1, 2) for task in meta["tasks"]}
    assert_all_close(found, below(tensors, "out."), tolerance)
    maps = vispeft.forward_tasks(model, images)
    for task, levels in maps.items():
        for stage, level in enumerate(levels):
            assert torch.equal(level.flatten(2).mT, found[f"stage{stage}.task.{task}"])
    loss = sum((out * tensors[f"w.{name}"].to(dtype)).sum() for name, out in found.items())
    loss.backward()
    gradients = {f"adapter.{name}": t for name, t in to_official(bank, "mtlora", grad=True).items() if "lora" in name}
    wanted = below(tensors, "grad.")
    base = {name for name in wanted if name.startswith("backbone.")}
    trained = to_official(bank, "mtlora", grad=True)
    gradients |= {name: trained[public(name.removeprefix("backbone."))] for name in base}
    assert set(meta["trainable"]) == set(gradients)
    assert_all_close({**gradients, "input": images.grad}, wanted, tolerance)
    values = to_official(bank, "mtlora")
    assert all(torch.equal(values[name], tensor.to(dtype)) for name, tensor in below(tensors, "adapter.").items())


# ---------------------------------------------------------------------- the whole model


def logits_of(maps: list[Tensor], decoder: dict[str, Tensor], task: str, size: tuple[int, int]) -> Tensor:
    """Run the public head: reduce each map, join them at the finest size, and classify (section 6 of the README)."""
    reduced = [
        F.conv2d(level, decoder[f"downsampler.{task}.downsample_{index}.weight"]) for index, level in enumerate(maps)
    ]
    fine = reduced[0].shape[-2:]
    joined = torch.cat([F.interpolate(level, fine, mode="bilinear", align_corners=False) for level in reduced], 1)
    own = below(decoder, f"decoders.decoders.{task}.last_layer.")
    hidden = F.conv2d(joined, own["0.weight"], own["0.bias"])
    hidden = F.batch_norm(hidden, own["1.running_mean"], own["1.running_var"], own["1.weight"], own["1.bias"])
    out = F.conv2d(hidden.relu(), own["3.weight"], own["3.bias"])
    return F.interpolate(out, size, mode="bilinear", align_corners=False)


@pytest.mark.skipif("mtlora_full_model" not in CLAIMED, reason="the folder has no such file")
def test_the_whole_public_model() -> None:
    meta, tensors, model, bank = adapted("mtlora_full_model", torch.float32)
    images = tensors["input"]
    maps, decoder = vispeft.forward_tasks(model, images), below(tensors, "decoder.")
    found = {task: logits_of(levels, decoder, task, tuple(images.shape[-2:])) for task, levels in maps.items()}
    assert_all_close(found, below(tensors, "out."), 1e-4)
    sum((found[task] * tensors[f"w.{task}"]).sum() for task in found).backward()
    ours = {f"adapter.{name}": t for name, t in zip(to_official(bank, "mtlora"), parameters(bank), strict=True)}
    gradients = {name: t.grad for name, t in ours.items() if t.grad is not None and "lora" in name}
    assert_all_close(gradients, below(tensors, "grad_w."), 1e-4)
    unused = {name for name, t in ours.items() if t.grad is None}
    assert unused == set(meta["trainable_without_gradient"])
    exempt = [e.tensor for e in bank._entries["default"].tensors() if e.name in e.unit.zero_gradient]
    assert {id(tensor) for tensor in exempt} == {id(ours[name]) for name in unused}


def parameters(bank: Any) -> list[nn.Parameter]:
    return [tensor for name, tensor in bank.named_tensors().items() if not name.startswith("head/")]
