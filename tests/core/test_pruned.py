"""Bases of which PyTorch computes tensors: pruning sets them on every call, a parametrisation replaces the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.errors import MergeError, SiteError

CELL = Cell("lora", "vit")
METHODS = {"lora": vispeft.LoRA(rank=2), "ssf": vispeft.SSF(), "bitfit": vispeft.BitFit()}


def pruned(model: Any) -> list[tuple[nn.Module, str]]:
    block = model.blocks[1]
    tensors = [(layer, "weight") for layer in (model.patch_embed.proj, block.attn.qkv, block.norm1, block.mlp.fc2)]
    for layer, name in tensors:
        prune.l1_unstructured(layer, name, 0.5)
    return tensors


def step(model: nn.Module, bank: vispeft.AdapterBank) -> dict[str, Tensor]:
    out = model(CELL.images())
    out.square().sum().backward()
    return {"out": out, **{name: p.grad for name, p in bank.trainable_parameters() if p.grad is not None}}


def adapted(model: nn.Module, method: vispeft.Method) -> vispeft.AdapterBank:
    torch.manual_seed(0)
    bank = vispeft.attach(model, method, verify=False)
    move(bank, "default")
    return bank


@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_base_is_adapted_as_its_permanent_form(name: str) -> None:
    found = {}
    for permanent in (False, True):
        model: Any = CELL.model()
        tensors = pruned(model)
        for layer, tensor in tensors if permanent else ():
            prune.remove(layer, tensor)
        found[permanent] = step(model, adapted(model, METHODS[name]))
    torch.testing.assert_close(found[False], found[True], rtol=0, atol=0)


def test_layers_may_be_pruned_behind_their_adapter_and_merged_once_that_is_permanent() -> None:
    model, other = CELL.model(), CELL.model()
    bank = adapted(model, METHODS["lora"])
    tensors = pruned(model)
    pruned(other)
    wanted = step(other, adapted(other, METHODS["lora"]))
    torch.testing.assert_close(step(model, bank), wanted, rtol=0, atol=0)
    with pytest.raises(MergeError, match=r"prune\.remove"):
        bank.merge()
    for layer, name in tensors:
        prune.remove(layer, name)
    bank.merge()
    torch.testing.assert_close(model(CELL.images()), wanted["out"])


def test_pruning_of_what_units_compute_is_made_permanent() -> None:
    """The weights of a norm and a convolution are properties there."""
    model: Any = CELL.model()
    tensors = pruned(model)
    bank = adapted(model, METHODS["ssf"])
    before = model(CELL.images())
    for layer, name in tensors:
        prune.remove(layer, name)
        assert isinstance(layer._parameters[name], nn.Parameter)
    assert torch.equal(model(CELL.images()), before)
    bank.detach("default")


@pytest.mark.parametrize("layer", [lambda model: model.blocks[0].attn.qkv, lambda model: model.blocks[1].norm1])
def test_a_parametrised_layer_is_refused(layer: Callable[[Any], nn.Module]) -> None:
    model: Any = CELL.model()
    classes = [type(module) for module in model.modules()]
    if isinstance(layer(model), nn.Linear):
        parametrizations.weight_norm(layer(model))
    else:
        parametrize.register_parametrization(layer(model), "weight", nn.Identity())
    with pytest.raises(SiteError, match="parametrises the weight of 'blocks"):
        vispeft.attach(model, vispeft.LoRA(rank=2))
    parametrize.remove_parametrizations(layer(model), "weight")
    assert [type(module) for module in model.modules()] == classes
    bank = adapted(model, METHODS["lora"])
    parametrizations.weight_norm(bank.head())
    vispeft.attach(model, METHODS["ssf"], name="other", verify=False)  # a classifier may be of that kind
    bank.set_active("default")

    def parametrise_and_run() -> None:
        parametrize.register_parametrization(layer(model), "weight", nn.Identity())  # refused if a unit computes it
        model(CELL.images())

    with pytest.raises(SiteError, match=r"parametrises the (weight|tensors) of the place of an adapter"):
        parametrise_and_run()
