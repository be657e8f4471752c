"""Weights that units change as a whole: no copy is kept, and gradients are those of plain operations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.sites import Site
from vispeft.hosts.computed import computed_linear
from vispeft.hosts.layers import gained
from vispeft.methods.bone import BATUnit

WEIGHTS = ("bat", "dora", "mask", "sparse", "svfit")


def saved_shapes(model: nn.Module, images: Tensor) -> list[tuple[int, ...]]:
    """Run a model, and list the shapes of what autograd keeps, parameters and buffers left out."""
    known = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            found.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return found


@pytest.mark.parametrize("backbone", ["vit", "swin", "swinv2", "eva02"])
@pytest.mark.parametrize("method", ["bat", "sparse"])
def test_no_copy_of_a_weight_is_kept(method: str, backbone: str) -> None:
    cell = Cell(method, backbone, short=True)
    model = cell.model().train()
    bank = cell.attach(model)
    shapes = {tuple(model.get_submodule(item.site.path)._parameters["weight"].shape) for item in bank.plan()}
    both = shapes | {shape[::-1] for shape in shapes}
    assert both.isdisjoint(saved_shapes(model, cell.images(5)))
    bank.memory = "plain"
    assert not both.isdisjoint(saved_shapes(model, cell.images(5)))


def _fold(units: Sequence[BATUnit], weight: Tensor) -> Tensor:
    return units[0].fold_weight(weight)


def _fold_gained(units: Sequence[BATUnit], weight: Tensor) -> Tensor:
    return gained(units[0], weight, units[0].fold_weight(weight))


def unit_and_tensors(bias: bool = True) -> tuple[BATUnit, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    unit = BATUnit(Site("layer", "mlp.fc1", "linear", 4, 6), 2, 0.5, 32).double()
    unit.B.data.normal_(generator=generator)
    x, weight, shift = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 3, 4), (6, 4), (6,)))
    return unit, x.requires_grad_(), weight, shift if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives_are_those_of_plain_operations(bias: bool) -> None:
    unit, x, weight, shift = unit_and_tensors(bias)
    found: list[list[Tensor]] = []
    for again in (False, True):
        out = computed_linear(x, weight, shift, _fold, (unit,), again)
        first = torch.autograd.grad(out.square().sum(), [x, unit.B], create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), [x, unit.B])
        found.append([out.detach(), *(grad.detach() for grad in first), *second])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


def test_tensors_that_another_one_replaces_get_their_gradient() -> None:
    model = Cell("bat", "vit", short=True).model()
    bank = Cell("bat", "vit", short=True).attach(model)
    images = Cell("bat", "vit", short=True).images()
    names = [name for name, _ in model.named_parameters() if name.endswith(".B")]
    given = {name: model.get_parameter(name).detach().clone().requires_grad_() * 1 for name in names}
    torch.func.functional_call(model, given, images).sum().backward(inputs=list(given.values()))
    model(images).sum().backward()
    for name in names:
        assert torch.allclose(given[name].grad, model.get_parameter(name).grad, atol=1e-6)
    assert bank.names == ["default"]


def test_a_changed_tensor_is_noticed_before_the_backward_pass() -> None:
    unit, x, weight, shift = unit_and_tensors()
    out = computed_linear(x, weight, shift, _fold, (unit,), True)
    with torch.no_grad():
        unit.B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_backward_pass_has_the_gain_of_its_forward_pass() -> None:
    unit, x, weight, shift = unit_and_tensors()
    found: list[tuple[Tensor, ...]] = []
    for again in (False, True):
        unit.gain = torch.tensor(0.5, dtype=torch.float64)
        out = computed_linear(x, weight, shift, _fold_gained, (unit,), again)
        unit.gain = torch.tensor(2.0, dtype=torch.float64)
        found.append(torch.autograd.grad(out.square().sum(), [x, unit.B]))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_empty_batch_has_gradients(create_graph: bool) -> None:
    unit, _, weight, shift = unit_and_tensors()
    x = torch.zeros(0, 3, 4, dtype=torch.float64, requires_grad=True)
    out = computed_linear(x, weight, shift, _fold, (unit,), True)
    first, slope = torch.autograd.grad(out.sum(), [x, unit.B], create_graph=create_graph)
    assert first.shape == x.shape
    assert torch.equal(slope, torch.zeros_like(unit.B))


@pytest.mark.parametrize("backbone", ["vit", "swinv2"])
def test_the_backward_pass_has_the_units_of_its_forward_pass(backbone: str) -> None:
    cell = Cell("bat", backbone, short=True)
    model = cell.model().train()
    bank = cell.attach(model, "one")
    cell.attach(model, "two", moved=False)
    move(bank, "two", seed=11)
    bank.set_active("one")
    model(cell.images()).square().sum().backward()
    wanted = [tensor.grad.clone() for tensor in bank.named_tensors("one").values()]
    model.zero_grad()
    with bank.using("one"):
        loss = model(cell.images()).square().sum()
    bank.set_active("two")
    loss.backward()
    found = [tensor.grad for tensor in bank.named_tensors("one").values()]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_hooks_of_a_tensor_run_once_on_the_whole_gradient() -> None:
    unit, x, weight, shift = unit_and_tensors()
    seen: list[Tensor] = []
    unit.B.register_hook(seen.append)
    out = computed_linear(x, weight, shift, _fold, (unit,), True)
    (out.sum() + unit.B.square().sum()).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], unit.B.grad)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit", "swinv2"])
def test_a_term_and_a_scale_act_on_top(backbone: str) -> None:
    cell = Cell("bat", backbone, short=True)
    model, images = cell.model(), cell.images()
    bank = cell.attach(model, "bat")
    for name, method in (("lora", vispeft.LoRA(rank=2, roles=("attn.qkv", "mlp.fc1"))), ("ssf", vispeft.SSF())):
        vispeft.attach(model, method, name=name, verify=False)
        move(bank, name)
    bank.set_active(["bat", "lora", "ssf"])
    wanted = model(images)
    assert bank.merge().max_error <= 1e-5
    assert torch.allclose(model(images), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_copy_can_be_detached_alone(method: str) -> None:
    cell = Cell(method, "swinv2", short=True)
    model, images = cell.model(), cell.images()
    cell.attach(model)
    with torch.no_grad():
        wanted = model(images)
        twin = copy.deepcopy(model)
        bank: Any = vispeft.AdapterBank.of(twin)
        bank.detach("default")
        assert torch.equal(model(images), wanted)
        assert torch.equal(twin(images), cell.model()(images))
