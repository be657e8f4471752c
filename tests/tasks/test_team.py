"""Two processes train as one with the same batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tasks.team import CELLS, STRATEGIES, TOGETHER, Found, run
from vispeft.data.base import EpochSampler
from vispeft.data.shares import EvaluationShare, TrainingShare, part_of_batch
from vispeft.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("images", [3, 22, 24, 25])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_together_are_the_batches_of_one_process(images: int, processes: int, drop_last: bool) -> None:
    each = 4
    together = each * processes
    for start in ((0, 0), (1, together)):
        whole = EpochSampler(images, 5, start)
        whole.set_epoch(start[0])
        order = list(whole)
        shares = [TrainingShare(whole, each, rank, processes, drop_last) for rank in range(processes)]
        found = [list(share) for share in shares]
        assert len({len(part) for part in found}) == 1
        if start == (0, 0):
            assert [len(share) for share in shares] == [len(part) for part in found]
        for batch in range(images // together - (start[1] > 0)):
            joined = [index for part in found for index in part[batch * each : (batch + 1) * each]]
            assert joined == order[batch * together : (batch + 1) * together]
        if not drop_last:
            served = [index for part in found for index in part]
            assert set(served) == set(order) or len(order) % processes
            assert set(order) <= set(served)
            assert len(served) - len(order) < processes


def test_an_evaluation_shows_each_image_once_in_the_order_of_the_split() -> None:
    shares = [EvaluationShare(10, rank, 4, "test") for rank in range(4)]
    assert [index for share in shares for index in share] == list(range(10))
    assert [len(share) for share in shares] == [2, 3, 2, 3]
    with pytest.raises(DataError, match=r"The test split has 2 images for 4 processes"):
        EvaluationShare(2, 0, 4, "test")


def test_batches_are_divided() -> None:
    assert part_of_batch(64, 4) == 16
    with pytest.raises(ConfigError, match="64 images in all, which 3 processes cannot divide"):
        part_of_batch(64, 3)


def start_pair(folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tasks.team", str(folder)]
    return [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **common, "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one_with_the_same_batches(tmp_path: Path) -> None:
    pair = start_pair(tmp_path)
    alone = {"/".join(cell): run(cell, 1) for cell in CELLS}
    assert [process.wait(900) for process in pair] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for way in STRATEGIES:
        for cell, wanted in alone.items():
            compare(f"{way} {cell}", wanted, first[way][cell], second[way][cell])


def compare(cell: str, wanted: Found, first: Found, second: Found) -> None:
    """Compare what one process found with what two did."""
    assert any(name.startswith("gradient") for name in wanted)
    assert set(wanted) == set(first)
    # Sums over many positions are rounded relative to what is summed: 1e-6 of the largest gradient.
    largest = max(float(value.abs().max()) for name, value in wanted.items() if name.startswith("gradient"))
    for name, value in wanted.items():
        # Figures amplify the rounding of the weights, such as counts of pixels above a threshold.
        tolerance = {"gradient": 1e-6 * max(1, largest), "tensor": 1e-5, "figure": 1e-4}[name.split()[0]]
        told = f"{cell} {name} of {TOGETHER} images: "
        torch.testing.assert_close(
            first[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, told=told: told + text
        )
        if name.startswith("tensor"):
            assert torch.equal(first[name], second[name]), told
