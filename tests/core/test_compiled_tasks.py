"""Maps of several tasks from a model whose blocks are compiled by torch one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vispeft
from tests.conformance.cells import Cell, move

TASKS = ["parts", "depth"]
POLYHISTOR = vispeft.Polyhistor(task_dim=5, hidden_dim=8, embed_dim=6, reduction=2)
MTLORA = vispeft.MTLoRA(rank=3, task_rank=2, dropout=0.0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "backbone", "backend", "batched"),
    [
        (MTLORA, "swin", "aot_eager", False),
        (MTLORA, "swinv2", "eager", False),  # the capture of the graph alone
        (POLYHISTOR, "vit", "aot_eager", True),
    ],
    ids=["mtlora-swin", "mtlora-swinv2", "polyhistor-vit-batched"],
)
def test_maps_of_compiled_blocks_are_those_of_plain_ones(
    method: vispeft.Method, backbone: str, backend: str, batched: bool
) -> None:
    cell = Cell("lora", backbone, short=True)
    model: Any = cell.model().double()
    images = cell.images(batch=1).double()
    bank = vispeft.attach(model, method, tasks=TASKS, verify=False)
    move(bank, "default")
    wanted = vispeft.forward_tasks(model, images, batched=batched)
    for module in list(model.modules()):
        if type(module).__name__.endswith("Block") and hasattr(module, "drop_path1"):
            module.compile(backend=backend, fullgraph=True)
    found = vispeft.forward_tasks(model, images, batched=batched)
    for task in TASKS:
        for a, b in zip(found[task], wanted[task], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
