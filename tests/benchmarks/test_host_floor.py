"""Tests of benchmarks/host_floor.py."""

from __future__ import annotations

import host_floor
import host_time
import pytest
import torch
from host_time import SIZE, base
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "DEPTH", 2)


@pytest.mark.parametrize("kind", ["ssf", "adaptformer", "in_one"])
def test_operations_alone_start_as_the_frozen_model_and_train(kind: str) -> None:
    block = host_floor.BesideInOne if kind == "in_one" else host_floor.Beside
    model: nn.Module = host_floor.ssf() if kind == "ssf" else host_floor.adaptformer(block)
    images: Tensor = torch.randn(1, 3, SIZE, SIZE)
    out = model(images)
    assert torch.allclose(out, base()(images), atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_node_has_the_gradients_of_the_operations() -> None:
    torch.manual_seed(0)
    x, down, up = torch.randn(2, 5, 8), torch.randn(64, 8), torch.randn(8, 64)
    inputs = [t.requires_grad_() for t in (x, down, torch.randn(64), up, torch.randn(8))]
    found = []
    for drawn in (host_floor.Bottleneck.apply, None):
        torch.manual_seed(1)
        if drawn is not None:
            out = drawn(*inputs)
        else:
            mask = torch.empty(10, 64, dtype=torch.bfloat16).bernoulli_(1 - host_floor.DROPOUT).float().view(2, 5, 64)
            hidden = torch.relu(x @ down.t() + inputs[2]) * mask / (1 - host_floor.DROPOUT)
            out = (hidden @ up.t() + inputs[4]) * host_floor.SCALE
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 0.05 * other.abs().max()


def test_queries_reach_the_classifier() -> None:
    model = host_floor.Queries()
    model(torch.randn(1, 3, SIZE, SIZE)).square().sum().backward()
    assert all(query.grad is not None and query.grad.any() for query in model.queries)
