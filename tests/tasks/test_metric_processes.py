"""Embeddings gathered from two processes train as those of one process with all images."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch import multiprocessing as mp

from vispeft.tasks.metric_criterion import MetricCriterion
from vispeft.tasks.metric_losses import metric_loss

SHARES = (slice(0, 3), slice(3, 10))
"""Images of each process, of different numbers."""


def train(share: slice) -> dict[str, Tensor]:
    """Compute losses and gradients of the weights, averaged over processes as data-parallel training does."""
    found: dict[str, Tensor] = {}
    for name in ("ContrastiveLoss", "ProxyAnchorLoss", "RecallAtK"):
        torch.manual_seed(0)
        layer, criterion = torch.nn.Linear(6, 4), MetricCriterion(metric_loss(name, 3, 4))
        images, labels = torch.randn(10, 6), torch.arange(10) % 3
        loss = criterion(layer(images[share]), labels[share])
        loss.backward()
        found[f"{name}/loss"] = loss.detach()
        for key, parameter in [*layer.named_parameters(), *criterion.named_parameters()]:
            gradient = parameter.grad
            if distributed.is_initialized():
                distributed.all_reduce(gradient)
                gradient /= distributed.get_world_size()
            found[f"{name}/{key}"] = gradient
    return found


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(train(SHARES[rank]), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])  # both processes share the time of the imports
    mp.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
    alone = train(slice(0, 10))
    assert len(alone) == 3 * 3 + 1
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, wanted in alone.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
