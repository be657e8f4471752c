"""Losses and metrics of dense tasks in two processes equal those of one process with all data."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch import multiprocessing as mp

from tests.dense import KINDS, batch, target
from vispeft.data.dense_targets import IGNORE, TargetKind
from vispeft.metrics import dense_metric
from vispeft.tasks.dense_losses import dense_loss

SHARES = (slice(0, 1), slice(1, 5))
"""Images of each process: the first has one, which lacks labels of some tasks."""

Found = dict[str, Tensor]


def images_of(kind: TargetKind) -> tuple[Tensor, Tensor]:
    outputs, labels = batch(kind, images=5, seed=3)
    if kind in ("classes", "depth", "saliency"):
        labels[0] = IGNORE
    return outputs.float(), labels


def measure(share: slice) -> Found:
    """Compute losses, gradients and figures of some images, as one of several processes where there are several."""
    found: Found = {}
    for kind in KINDS:
        outputs, labels = (values[share] for values in images_of(kind))
        outputs.requires_grad_()
        loss = dense_loss(target(kind), kind)
        numerator, denominator = loss.parts(outputs, labels)
        metric = dense_metric(target(kind), kind)
        metric.update(outputs.detach(), labels)
        together = numerator.detach().clone()
        if distributed.is_initialized():
            distributed.all_reduce(denominator)
            distributed.all_reduce(together)
        loss.combine(numerator, denominator).backward()
        found[f"{kind}/loss"] = loss.combine(together, denominator)
        found[f"{kind}/gradient"] = outputs.grad
        found |= {f"{kind}/{name}": value for name, value in metric.compute().items()}
    return found


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(measure(SHARES[rank]), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])  # both processes share the time of the imports
    mp.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = measure(slice(0, 5))
    assert set(alone) == set(first) == set(second)
    assert len(alone) >= 3 * len(KINDS)
    for name, wanted in alone.items():
        if name.endswith("/gradient"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), wanted, rtol=0, atol=1e-6)
        else:
            assert torch.isfinite(wanted), name
            for found in (first, second):
                torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
