"""Time training steps of two processes that exchange gradients, and of two that do not, at the same time.

    python benchmarks/process_overhead.py
    python benchmarks/process_overhead.py --table     # only puts the table into docs/scale.md

Two processes with one thread each train a ViT-S/16 with a batch of 8 images. In turn they train together, as
`vispeft train --trainer.devices 2` does, and each by itself at the same time, so that they compete for memory and
caches in both. The overhead is what a step takes more of when they train together. Run it while nothing else runs.
Writes results/process_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write, write_section

import vispeft  # before Lightning, which imports torchvision
from vispeft.cli.processes import leave_group, make_strategy
from vispeft.cli.speed import QUIET, OneBatch
from vispeft.tasks import Classification

from lightning.pytorch import Callback, Trainer  # isort: skip

NAME = "process_overhead"
METHODS = {"lora": vispeft.LoRA, "ssf": vispeft.SSF}
LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BAR = 0.15
"""Largest overhead."""


class Clock(Callback):
    """Note when steps begin and end."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.begun: list[float] = []
        self.ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the beginning of a step."""
        self.begun.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        """Note the end of the last one."""
        self.ended = time.perf_counter()


def steps_of(task: Classification, batch: Any, steps: int, together: bool, launched: dict[str, str]) -> float:
    """Train some steps; returns the seconds of one, without the first."""
    clock, several = Clock(), {}
    for name in LAUNCHED:
        os.environ.pop(name, None)
    if together:
        os.environ.update(launched)
        several = {"strategy": make_strategy({}, task.skips_tensors)}
    trainer = Trainer(
        accelerator="cpu", devices=2 if together else 1, max_epochs=1, callbacks=[clock], **QUIET, **several
    )
    trainer.fit(task, train_dataloaders=OneBatch(batch, steps + 1))
    leave_group()
    return (clock.ended - clock.begun[1]) / steps


def meet(folder: Path, name: str, rank: int) -> None:
    """Wait until both processes are here."""
    (folder / f"{name}-{rank}").touch()
    while not (folder / f"{name}-{1 - rank}").exists():
        time.sleep(0.001)


def worker(folder: Path, rank: int, model: str, images: int, steps: int, rounds: int) -> None:
    """Be one of the two processes."""
    torch.set_num_threads(1)
    launched = {name: os.environ[name] for name in LAUNCHED}
    port = int(launched["MASTER_PORT"])
    found: dict[str, dict[str, list[float]]] = {}
    for method, make in METHODS.items():
        torch.manual_seed(0)
        task = Classification(backbone=model, backbone_args={"pretrained": False}, method=make(), num_classes=10)
        size = task.preprocessing.size
        batch = [torch.randn(images, 3, *size), torch.randint(10, (images,))]
        found[method] = {"together": [], "apart": []}
        for number in range(rounds):
            for kind, times in found[method].items():
                meet(folder, f"{method}-{number}-{kind}", rank)
                port += 1
                times.append(steps_of(task, batch, steps, kind == "together", {**launched, "MASTER_PORT": str(port)}))
    (folder / f"{rank}.json").write_text(json.dumps(found))


def measure(model: str, images: int, steps: int, rounds: int) -> dict[str, Any]:
    """Run both processes, and compare."""
    with tempfile.TemporaryDirectory() as place, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        options = ["--model", model, "--images", str(images), "--steps", str(steps), "--rounds", str(rounds)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", place, *options], env={**common, "LOCAL_RANK": str(rank)}
            )
            for rank in (0, 1)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit("A process has failed.")
        both = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {method: _compared([found[method] for found in both]) for method in METHODS}


def _compared(both: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Compare means of the two processes, round by round."""
    together, apart = ([(one + other) / 2 for one, other in zip(*(found[kind] for found in both), strict=True)]
                       for kind in ("together", "apart"))  # fmt: skip
    overheads = [one / other - 1 for one, other in zip(together, apart, strict=True)]
    return {
        "together": statistics.median(together),
        "apart": statistics.median(apart),
        "overhead": statistics.median(overheads),
        "overheads": overheads,
    }


def table() -> list[str]:
    """Lines of the table for the documentation."""
    record = json.loads((RESULTS / f"{NAME}.json").read_text())
    lines = ["| method | step together, s | step by itself, s | overhead |", "|---|--:|--:|--:|"]
    for method, found in record["methods"].items():
        figures = (f"{found['together']:.3f}", f"{found['apart']:.3f}", f"{100 * found['overhead']:.1f} %")
        lines.append(f"| `{method}` | {' | '.join(figures)} |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=8, help="images of a step of one process")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        rank = int(os.environ["LOCAL_RANK"])
        worker(given.worker, rank, given.model, given.images, given.steps, given.rounds)
        return
    if not given.table:
        found = measure(given.model, given.images, given.steps, given.rounds)
        settings = {name: getattr(given, name) for name in ("model", "images", "steps", "rounds")}
        write(NAME, {**settings, "bar": BAR, "methods": found})
        for method, values in found.items():
            print(method, f"{values['together']:.3f} s, {values['apart']:.3f} s, {100 * values['overhead']:.1f} %")
    write_section(NAME, table(), page="scale")


if __name__ == "__main__":
    main()
