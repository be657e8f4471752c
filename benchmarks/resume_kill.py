"""Kill a training process again and again, resume it each time, and compare what comes out with a run in one go.

    python benchmarks/resume_kill.py

A process is killed by SIGKILL, so nothing in it can tidy up. Moments are drawn at random from the three parts of a
run's life: while it starts (imports, data, backbone), while it trains (some steps further on, and a part of a second
later), and after its last step, while it measures, draws and saves. Afterwards adapter, metrics, logs and every tensor
of the last checkpoints are compared bit by bit. Writes results/resume_kill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vispeft.tasks.checkpoints import read_checkpoint

TRAIN = Path(__file__).resolve().parents[1] / "tools" / "train.py"
CONFIG = """
model:
  class_path: vispeft.tasks.Classification
  init_args:
    backbone: vit_tiny_patch16_224
    backbone_args: {pretrained: false, img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
    method: {class_path: vispeft.LoRA, init_args: {rank: 4, dropout: 0.1}}
    lr: 1e-2
    ema: 0.99
data: {class_path: vispeft.data.DigitsData, init_args: {batch_size: 32}}
trainer: {max_epochs: 12}
checkpoints: {every_n_steps: 7}
"""
"""Dropout draws random numbers in every step; 34 steps an epoch and a checkpoint every 7 leave no step at rest."""
STEPS = 12 * 34
STARTED, TRAINED = "Run directory:", "epoch 12/12"
"""What a run prints when training begins, and when it ends."""


# ------------------------------------------------------------------ comparing two runs


def differences(run: Path, other: Path) -> list[str]:
    """List what differs between two finished runs, times and typed commands apart.

    Args:
        run: Directory of a run.
        other: Directory of another one.

    Returns:
        Names of what differs; empty when they are equal bit for bit.
    """
    found = [
        name
        for name in ("adapter/adapter.json", "adapter/adapter.safetensors", "adapter/head.safetensors")
        if (run / name).read_bytes() != (other / name).read_bytes()
    ]
    if (run / "logs/csv/metrics.csv").read_bytes() != (other / "logs/csv/metrics.csv").read_bytes():
        found.append("logs/csv/metrics.csv")
    if board(run) != board(other):
        found.append("logs/tensorboard")
    if figures(run) != figures(other):
        found.append("metrics.json")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    if names != {path.name for path in (other / "checkpoints").iterdir()}:
        return [*found, "names of the checkpoints"]
    for name in sorted(names):
        ours, theirs = (dict(_leaves(read_checkpoint(place / "checkpoints" / name))) for place in (run, other))
        found += [f"{name}{key}" for key in sorted(ours.keys() ^ theirs.keys())]
        found += [f"{name}{key}" for key in ours.keys() & theirs.keys() if not _equal(ours[key], theirs[key])]
    return found


def figures(run: Path) -> dict[str, Any]:
    """Read a run's metrics.json, without what may differ."""
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("seconds", "command")}


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what TensorBoard shows of a run: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    else:
        if path != "/vispeft/seconds":
            yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, f"{path}/{key}")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    return bool(one == other) or (one != one and other != other)


# ------------------------------------------------------------------ killing


class Process:
    """A training in a process of its own."""

    def __init__(self, folder: Path, run: Path, workers: int) -> None:
        """Begin a run, or go on with it."""
        begun = (run / "config.yaml").is_file()
        what = ["--resume", str(run)] if begun else [str(folder / "config.yaml"), "--out", str(run)]
        self.trained = (run / f"checkpoints/step-{STEPS:07d}.ckpt").is_file()
        self.output = folder / "output.txt"
        command = [sys.executable, str(TRAIN), *what, "--data.num_workers", str(workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def wait_for(self, text: str) -> bool:
        """Wait until the process has printed something, or has ended; tell which."""
        while text not in self.output.read_text():
            if self.process.poll() is not None:
                return text in self.output.read_text()
            time.sleep(0.02)
        return True

    def kill_after(self, seconds: float) -> bool:
        """Kill the process some time from now; tells whether it was still there."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            return True
        return False


def kill(process: Process, run: Path, phase: str, longest: dict[str, float]) -> bool:
    """Kill a process at a random moment of a phase of its life; tells whether it was still there."""
    if phase == "starting":
        return process.kill_after(random.uniform(0, longest["starting"]))
    if phase == "finishing":
        # A process that goes on after the last step prints no epoch.
        process.wait_for(STARTED if process.trained else TRAINED)
        return process.kill_after(random.uniform(0, longest["finishing"]))
    process.wait_for(STARTED)
    target = checkpointed(run) + random.uniform(0, longest["steps"])
    while checkpointed(run) < target and process.process.poll() is None:
        time.sleep(0.02)
    return process.kill_after(random.uniform(0, longest["step"]))


def checkpointed(run: Path) -> int:
    """Give the step of the last checkpoint."""
    return max((int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.ckpt")), default=0)


def trial(folder: Path, whole: Path, workers: int, phases: list[str], longest: dict[str, float]) -> dict[str, Any]:
    """Kill one run once in each of the given phases, finish it, and compare it."""
    run, kills = folder / "run", []
    for phase in phases:
        process = Process(folder, run, workers)
        began = time.perf_counter()
        killed = kill(process, run, phase, longest)
        seconds = time.perf_counter() - began
        kills.append({"phase": phase, "killed": killed, "seconds": seconds, "checkpoint": checkpointed(run)})
        print(kills[-1], flush=True)
        if process.process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(process.output.read_text())
    final = Process(folder, run, workers)
    if final.process.wait() != 0:
        raise SystemExit(final.output.read_text())
    return {"workers": workers, "kills": kills, "differences": differences(run, whole)}


def main() -> None:
    """Run, kill, compare and write."""
    from common import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 0])
    given = parser.parse_args()
    results = []
    for workers in given.workers:
        random.seed(given.seed + workers)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "config.yaml").write_text(CONFIG)
            began = time.perf_counter()
            whole = Process(folder, folder / "whole", workers)
            whole.wait_for(STARTED)
            started = time.perf_counter()
            whole.wait_for(TRAINED)
            trained = time.perf_counter()
            if whole.process.wait() != 0:
                raise SystemExit(whole.output.read_text())
            inside = given.kills * 7 // 10
            # Half of the time it took, since the machine may be less busy later and the process must still be there.
            # A process that goes on after the last step has less left to do than the first one had: a quarter.
            longest = {"starting": (started - began) / 2, "finishing": (time.perf_counter() - trained) / 4}
            longest |= {"steps": 1.5 * STEPS / (inside + 3), "step": 7 * (trained - started) / STEPS}
            early = given.kills * 3 // 20
            phases = ["training"] * inside + ["starting"] * early
            random.shuffle(phases)
            phases += ["finishing"] * (given.kills - len(phases))
            results.append({**trial(folder, folder / "whole", workers, phases, longest), "longest": longest})
            print({key: results[-1][key] for key in ("workers", "differences")}, flush=True)
    write("resume_kill", {"config": CONFIG, "seed": given.seed, "runs": results})
    if any(result["differences"] for result in results):
        raise SystemExit("A resumed run differs from the one in one go.")


if __name__ == "__main__":
    main()
