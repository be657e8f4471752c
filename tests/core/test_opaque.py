"""Low-rank terms in compiled graphs on a CPU: the operator equals the plain formula, and stands only where it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vispeft
from tests.tiny import TINY
from vispeft.core.low_rank import NO_DROPOUT, Branch, Dropout
from vispeft.errors import ConfigError
from vispeft.hosts.low_rank import low_rank_linear

OPERATOR = torch.ops.vispeft.low_rank_product.default
TERMS = {
    "whole": [(0, 5)],
    "slices": [(0, 2), (3, 5)],
}


def tensors(rows: int, terms: list[tuple[int, int]], frozen: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Make an input, a frozen weight (5, 6) and both factors of each term."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, 6, generator=generator, requires_grad=True)
    weight = torch.randn(5, 6, generator=generator)
    factors = []
    for start, stop in terms:
        factors.append(torch.randn(3, 6, generator=generator, requires_grad=not frozen))
        factors.append(torch.randn(stop - start, 3, generator=generator, requires_grad=True))
    return x, weight, factors


def layer(terms: list[tuple[int, int]], dropout: Dropout = NO_DROPOUT) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor, factors: list[Tensor]) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], terms, strict=True)
        return low_rank_linear(x, weight, bias, [Branch(a, b, -1.5, *at, dropout) for a, b, at in pairs])

    return run


def operators(run: Any, *inputs: Any) -> set[Any]:
    """Compile a function, run it, and list the operations of its graphs."""
    found: set[Any] = set()

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        found.update(node.target for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend, fullgraph=True)(*inputs)
    return found


@pytest.mark.parametrize(
    ("form", "rows", "frozen"),
    [
        ("slices", 9, False),
        pytest.param("slices", 2, False, marks=pytest.mark.slow),
        pytest.param("whole", 9, True, marks=pytest.mark.slow),
        pytest.param("whole", 2, True, marks=pytest.mark.slow),
    ],
)
def test_operator_equals_the_formula(form: str, rows: int, frozen: bool) -> None:
    """With many rows terms are added to a copy of the weight."""
    x, weight, factors = tensors(rows, TERMS[form], frozen)
    bias, trained = torch.randn(5), [x, *(factor for factor in factors if factor.requires_grad)]
    wanted = F.linear(x, weight, bias)
    for a, b, (start, stop) in zip(factors[::2], factors[1::2], TERMS[form], strict=True):
        wanted = wanted + F.pad(-1.5 * x @ a.t() @ b.t(), (start, 5 - stop))
    torch._dynamo.reset()
    found = torch.compile(layer(TERMS[form]), backend="aot_eager", fullgraph=True)(x, weight, bias, factors)
    slope = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, trained, slope), torch.autograd.grad(wanted, trained, slope), strict=True)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("place", ["input", "hidden"])
@pytest.mark.parametrize("rows", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_operator_drops_the_same_entries_in_both_passes(rows: int, place: Any) -> None:
    """The term is linear in the input and in each factor: the product of each with its gradient is the term's share."""
    x, weight, factors = tensors(rows, TERMS["slices"])
    run = layer(TERMS["slices"], Dropout(0.5, place))
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    out = compiled(x, weight, None, factors)
    slope, frozen = torch.randn_like(out), F.linear(x, weight)
    grad_x, *grads = torch.autograd.grad(out, [x, *factors], slope)
    assert torch.allclose((grad_x * x).sum(), (slope * out).sum(), rtol=1e-4)
    for index, (start, stop) in enumerate(TERMS["slices"]):
        share = (slope * (out - frozen))[..., start:stop].sum()
        for number in (2 * index, 2 * index + 1):
            assert torch.allclose((grads[number] * factors[number]).sum(), share, rtol=1e-4)
    torch.manual_seed(0)
    assert compiled(x, weight, None, factors).equal(out)
    assert not compiled(x, weight, None, factors).equal(out)


@pytest.mark.slow
@pytest.mark.parametrize("form", TERMS)
def test_operator_keeps_the_rules_of_operators(form: str) -> None:
    x, weight, factors = tensors(4, TERMS[form])
    starts, stops = ([place[i] for place in TERMS[form]] for i in (0, 1))
    rows = x.detach().flatten(0, 1).requires_grad_()
    hidden = [(rows @ a.t()).detach() for a in factors[::2]]
    others = [0.5] * len(starts), starts, stops, [0.5] * len(starts), ["hidden"] * len(starts)
    seeds = [torch.rand((), dtype=torch.float64) for _ in starts]
    torch.library.opcheck(OPERATOR, (rows, None, weight, factors, hidden, seeds, *others))


def test_a_second_derivative_of_the_operator_is_refused() -> None:
    x, weight, factors = tensors(9, TERMS["whole"])
    torch._dynamo.reset()
    out = torch.compile(layer(TERMS["whole"]), backend="eager", fullgraph=True)(x, weight, None, factors)
    slope = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    with pytest.raises(ConfigError, match="second derivative"):
        slope.sum().backward()


def test_operator_stands_in_graphs_of_frozen_layers_alone() -> None:
    x, weight, factors = tensors(2, TERMS["whole"])
    assert OPERATOR in operators(layer(TERMS["whole"]), x, weight, None, factors)
    assert OPERATOR not in operators(layer(TERMS["whole"]), x, weight.requires_grad_(), None, factors)


def test_transforms_inside_of_a_graph_see_plain_operations() -> None:
    x, weight, factors = tensors(2, TERMS["whole"])

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(TERMS["whole"])(x, weight, None, factors).square().sum())(x)

    wanted = slope(x.detach())
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(slope, backend="eager", fullgraph=True)(x.detach()), wanted, atol=1e-4)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_graphs_hold_operations_of_pytorch_alone(strict: bool) -> None:
    model: nn.Module = vispeft.create_model("vit_tiny_patch16_224", **TINY).eval()
    vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 16),), strict=strict)
    assert not any("vispeft" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
