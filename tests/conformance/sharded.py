"""Gradients of every method with whole and with sharded weights; the program of one of two processes.

LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m tests.conformance.sharded FILE [CELL ...]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.conformance.cells import MAIN, Cell
from tests.conformance.test_grid import outputs_of
from vispeft.adapters.bank import AdapterBank
from vispeft.core.modes import evaluating
from vispeft.core.origin import Memory
from vispeft.core.units import Unit


def results(model: nn.Module, bank: AdapterBank, images: Tensor) -> list[Tensor]:
    """Compute outputs and gradients of a step, and the outputs of an evaluation."""
    model.zero_grad()
    torch.manual_seed(4)  # methods with dropout draw alike
    outputs = outputs_of(model, images)
    torch.stack([out.square().sum() for out in outputs]).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in bank.trainable_parameters()]
    with torch.no_grad(), evaluating(model):
        for unit in (module for module in model.modules() if isinstance(module, Unit)):
            for name in unit.running:  # statistics of the batches of all steps so far
                unit.get_buffer(name).fill_(1)
        return [out.detach() for out in outputs] + gradients + outputs_of(model, images)


def compared(cell: Cell, memory: Memory, mesh: DeviceMesh) -> Iterator[str]:
    """Shard a model, and yield what differs from the whole one."""
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    bank.memory = memory
    model.train()
    wanted = results(model, bank, images)
    bank.shard(mesh)
    parts: dict[str, Any] = bank.sharded_parameters()
    if not parts or any(p.to_local().numel() == p.numel() for p in parts.values() if len(p) > 1):
        yield "weights are whole"
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        found = results(model, bank, images)
        if not all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(found, wanted, strict=True)):
            yield f"other values with memory {memory}{' and checkpointing' if checkpointing else ''}"
    if bank.sharded_parameters().keys() != parts.keys():
        yield "weights stay whole after a pass"


def main(file: Path, names: Sequence[str]) -> None:
    """Compare cells, and write what differs."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    found: dict[str, list[str]] = {}
    for number, cell in enumerate(cell for cell in MAIN if not names or str(cell) in names):
        told = found[str(cell)] = []
        try:
            told += compared(cell, ("lean", "leaner")[number % 2], mesh)
        except Exception as error:
            told.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    file.write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
