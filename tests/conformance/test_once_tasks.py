"""Rows of the grid for steps that are more than one call of the model: maps of several tasks, and VPTSP's criterion.

Compiled by block they equal eager ones, and ``lean`` and ``leaner`` give the gradients of ``plain``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import METHODS, REFUSED, Cell, move
from vispeft.core.method import Method, registered_methods
from vispeft.core.origin import MEMORY

TASKS = ["seg", "parts", "sal", "depth"]
CLASSES, DIM = 3, 6
LABELS = torch.tensor([1, 0])

Step = Callable[[nn.Module, Tensor], list[Tensor]]


def task_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute the maps of all tasks."""
    return [level for levels in vispeft.forward_tasks(model, images).values() for level in levels]


def batched_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute them in one batch."""
    return [level for levels in vispeft.forward_tasks(model, images, batched=True).values() for level in levels]


def against_proxies(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute the embeddings and the loss of a criterion with a pass of its own."""
    torch.manual_seed(5)
    width = int(model.embed_dim)  # type: ignore[arg-type]
    bank = vispeft.AdapterBank.of(model)
    assert bank is not None
    criterion = bank.plan().method.criterion(model, nn.Linear(width, DIM), CLASSES, DIM)  # type: ignore[attr-defined]
    embeddings = nn.Linear(width, DIM)(model(images))
    return [embeddings, criterion(embeddings, LABELS, images)]


def of_tasks(cell: Cell) -> bool:
    """Whether a method's file says that it is for several tasks."""
    return hasattr(METHODS[cell.method], "tasks")


def rows() -> list[Any]:
    """Make the rows: methods for tasks, and those with a criterion, enter by themselves."""
    found: list[tuple[Cell, Step]] = []
    for name, method in METHODS.items():
        cells = [Cell(name, backbone, short=method.one_pass) for backbone in ("vit", "swin")]
        for cell in cells:
            if cell.key in REFUSED:
                continue
            if of_tasks(cell):
                found.append((cell, task_maps))
                if not method.one_pass:
                    found.append((cell, batched_maps))
            if type(method).criterion is not Method.criterion:
                found.append((cell, against_proxies))
    return [pytest.param(cell, step, id=f"{cell}-{step.__name__}", marks=_left(cell, step)) for cell, step in found]


def _left(cell: Cell, step: Step) -> list[pytest.MarkDecorator]:
    return [] if cell.key in (("mtlora", "vit"), ("vptsp", "vit")) else [pytest.mark.slow]


by_row = pytest.mark.parametrize(("cell", "step"), rows())


def made(cell: Cell) -> tuple[nn.Module, vispeft.AdapterBank, Tensor]:
    options = {"num_classes": 0}
    if cell.backbone == "swin" and METHODS[cell.method].one_pass:
        options |= {"depths": (2, 1)}  # with a shifted window, and a block in which the tasks branch
    model = Cell(cell.method, cell.backbone).model(**options)
    method: Any = METHODS[cell.method]
    if not of_tasks(cell):
        return model, cell.attach(model), cell.images()
    bank = vispeft.attach(model, dataclasses.replace(method, tasks=()), tasks=TASKS, verify=False)
    move(bank, "default")
    return model, bank, cell.images()


def run(model: nn.Module, bank: vispeft.AdapterBank, step: Step, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Take a step; return its outputs, and the gradients of all that trains."""
    model.zero_grad()
    outputs = step(model, images)
    torch.stack([(i + 1) * out.square().mean() for i, out in enumerate(outputs)]).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in bank.trainable_parameters()]
    return [out.detach() for out in outputs], gradients


@by_row
def test_compiled_by_block_equals_eager(cell: Cell, step: Step, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, bank, images = made(cell)
    wanted, gradients = run(model, bank, step, images)
    assert any(gradient.any() for gradient in gradients)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    bank.compile(backend=count)
    found, compiled = run(model, bank, step, images)
    # Kinds of blocks, or of rows in front of them; a method that runs once per task may have a graph for each task.
    assert 0 < graphs <= 4 * (len(TASKS) if step is task_maps and not METHODS[cell.method].one_pass else 1)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(compiled, gradients, strict=True))
    before = graphs
    run(model, bank, step, images)
    assert graphs == before
    assert not [record for record in caplog.records if record.name.startswith("vispeft")]  # no block runs as it is


@by_row
def test_lean_and_leaner_give_the_gradients_of_plain(cell: Cell, step: Step) -> None:
    model, bank, images = made(cell)
    model.train()
    results = []
    for memory in MEMORY:
        bank.memory = memory
        torch.manual_seed(4)
        outputs, gradients = run(model, bank, step, images)
        results.append([*outputs, *gradients])
    for result in results[1:]:
        pairs = zip(result, results[0], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())) for a, b in pairs)


def test_every_registered_method_is_in_the_grid() -> None:
    """So that a method that comes later enters these rows, those of one call, and the benchmark of a GPU."""
    shipped = {cls for cls in registered_methods() if cls.__module__.startswith("vispeft.methods.")}
    assert {type(method) for method in METHODS.values()} >= shipped
