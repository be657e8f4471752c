"""A schedule over blocks in two real processes trains as one process with all images."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing as mp
from torch.utils.data import DataLoader

from tests.tasks.test_hooks import tensors_of, trainer
from tests.tasks.test_layer_schedules import Watch, make
from vispeft.tasks import ProgressiveLayers, SampledLayers

IMAGES = 4
"""Images of a step on each of two processes; one process sees twice as many."""
SCHEDULES = {
    "sampled": lambda: SampledLayers(share=0.5, every_n_steps=1, rate=1e3),
    "progressive": lambda: ProgressiveLayers(until=0.7),
}
"""The high rate lets scores decide the draws after few steps."""


def train(kind: str, images: int, first: int = 0, every: int = 1, **settings: Any) -> dict[str, Any]:
    """Train six steps, and return what each of them chose, what had gradients and state, and the trained tensors.

    Lightning would shuffle the images of several processes; here they are every second one, in their order.
    """
    task, data = make()
    data.train_dataloader = lambda: DataLoader(data.pairs[first::every], batch_size=images)
    settings["use_distributed_sampler"] = False
    schedule, watch, chosen = SCHEDULES[kind](), Watch(), []
    choose = schedule.choose
    schedule.choose = lambda *given: chosen.append(choose(*given)) or chosen[-1]
    trainer(callbacks=[schedule, watch], max_epochs=3, **settings).fit(task, datamodule=data)
    return {
        "chosen": chosen,
        "gradients": watch.gradients,
        "states": watch.states,
        "tensors": tensors_of(task),
        "score": getattr(schedule, "score", torch.zeros(0)),
    }


def one_of_two(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    # Lightning finds the processes as a launcher such as torchrun leaves them.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for kind in SCHEDULES:
        torch.save(train(kind, IMAGES, rank, 2, devices=2, strategy="ddp"), folder / f"{kind}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_choose_alike_and_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])  # both processes share the time of the imports
    mp.start_processes(one_of_two, (tmp_path, port), nprocs=2, start_method="forkserver")
    for kind in SCHEDULES:
        first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
        alone = train(kind, 2 * IMAGES)
        assert len(alone["chosen"]) == 6
        assert len(set(alone["chosen"])) > 2
        for found in (first, second):
            # The schedule left nothing but its blocks to the optimiser, in each process.
            assert found["gradients"] == [set(blocks) for blocks in found["chosen"]]
            assert found["states"][0] == set(found["chosen"][0])
            for name in ("chosen", "gradients", "states"):
                assert found[name] == alone[name], (kind, name)
            torch.testing.assert_close(found["score"], alone["score"], rtol=1e-4, atol=1e-5)
            assert found["tensors"].keys() == alone["tensors"].keys()
            for name, tensor in alone["tensors"].items():
                torch.testing.assert_close(found["tensors"][name], tensor, rtol=0, atol=1e-5, msg=f"{kind}, {name}")
        assert torch.equal(first["score"], second["score"])
        assert all(torch.equal(tensor, second["tensors"][name]) for name, tensor in first["tensors"].items())
