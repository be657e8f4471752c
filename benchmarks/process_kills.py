"""Kill one of two processes of a training, or both, again and again, and compare what comes out with a run in one go.

    python benchmarks/process_kills.py              # start again to go on
    python benchmarks/process_kills.py --only group --kills 10
    python benchmarks/process_kills.py --table      # only puts the table into docs/benchmarks.md

Processes are killed by SIGKILL at random moments: while they start, while they train (some steps further on, and a part
of a second later), and behind the last step, while the first one measures, draws and saves. In `rank`, one of the two,
drawn at random, is killed, and the seconds until the other has ended as well are noted; in `group`, both at once. The
run is then gone on with, and killed again, until it ends; adapter, metrics, logs and every tensor of the last
checkpoints are then compared bit by bit with a run in one go, and another run is begun, until there were enough kills.
One JSON for each kind in results/process_kills, written after each kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import RESULTS, write, write_section
from resume_kill import CONFIG as ONE
from resume_kill import STARTED, checkpointed, differences

FOLDER = "process_kills"
KILLS = {"rank": 20, "group": 10}
EPOCHS, STEPS = 5, 5 * 34
_TWO = f"max_epochs: {EPOCHS}, accelerator: cpu, devices: 2"
CONFIG = ONE.replace("batch_size: 32", "batch_size: 16").replace("max_epochs: 12", _TWO)
"""That of `resume_kill`, with the same batch shared by two processes."""
SHARES = {"training": 0.7, "starting": 0.15, "finishing": 0.15}
"""Share of the kills in each part of a run's life."""
FURTHER = 2 * STEPS // 10
"""Most steps that a run may take until it is killed."""
GONE = 300.0
"""Seconds after which the others count as going on for ever. A process that was still importing ends behind that."""


class Group:
    """A training in two processes: the first one, and the other that it starts."""

    def __init__(self, folder: Path, run: Path) -> None:
        """Begin a run, or go on with it."""
        begun = (run / "config.yaml").is_file()
        what = ["--resume", str(run)] if begun else [str(folder / "config.yaml"), "--out", str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.first = subprocess.Popen(
                [sys.executable, "-m", "vispeft", "train", *what],
                stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def others(self) -> list[int]:
        """The processes of the group but the first one."""
        return [pid for pid in _session(self.first.pid) if pid != self.first.pid]

    def wait_for(self, told: str) -> None:
        """Wait until the first process has printed something, or has ended."""
        while told not in self.output.read_text() and self.first.poll() is None:
            time.sleep(0.02)

    def gone(self) -> float:
        """Wait until all processes have ended; returns the seconds that it took."""
        began = time.perf_counter()
        while self.first.poll() is None or self.others():
            time.sleep(0.02)
            if time.perf_counter() - began > GONE:
                os.killpg(self.first.pid, signal.SIGKILL)
                raise SystemExit(f"A process went on for more than {GONE:.0f} s:\n{self.output.read_text()}")
        return time.perf_counter() - began


def _session(leader: int) -> list[int]:
    """List the processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    found.append(int(entry.name))
    return found


def kill(group: Group, kind: str, drawn: random.Random, run: Path, longest: dict[str, float]) -> dict[str, Any]:
    """Kill at a random moment; tells what was killed, and how long the rest lived."""
    phase = drawn.choices(list(SHARES), list(SHARES.values()))[0]
    rank = drawn.choice((0, 1))
    if phase == "training":
        group.wait_for(STARTED)
        target = checkpointed(run) + drawn.uniform(0, FURTHER)
        while checkpointed(run) < target and group.first.poll() is None:
            time.sleep(0.02)
        later = drawn.uniform(0, longest["step"])
    elif phase == "finishing":
        while checkpointed(run) < STEPS and group.first.poll() is None:
            time.sleep(0.02)
        later = drawn.uniform(0, longest["finishing"])
    else:
        if kind == "rank" and rank == 1:  # the first one starts the other when it has checked everything
            while not group.others() and group.first.poll() is None:
                time.sleep(0.02)
        later = drawn.uniform(0, longest["starting"])
    time.sleep(later)
    fact = {"phase": phase, "rank": rank, "killed": False, "checkpoint": checkpointed(run), "gone": 0.0}
    if group.first.poll() is not None:
        return {**fact, "rank": None}
    if kind == "group":
        os.killpg(group.first.pid, signal.SIGKILL)
        return {**fact, "rank": "both", "killed": True, "gone": group.gone()}
    others = group.others()
    victim = others[0] if rank == 1 and others else group.first.pid
    os.kill(victim, signal.SIGKILL)
    return {**fact, "rank": int(victim != group.first.pid), "killed": True, "gone": group.gone()}


def whole_run(folder: Path, state: dict[str, Any]) -> Path:
    """Make the run in one go, and measure how long its parts take."""
    whole = folder / "whole"
    if "longest" in state and (whole / "metrics.json").is_file():
        return whole
    shutil.rmtree(whole, ignore_errors=True)
    began = time.perf_counter()
    group = Group(folder, whole)
    group.wait_for(STARTED)
    started = time.perf_counter()
    while checkpointed(whole) < STEPS and group.first.poll() is None:
        time.sleep(0.02)
    trained = time.perf_counter()
    if group.first.wait() != 0:
        raise SystemExit(group.output.read_text())
    state["longest"] = {
        "starting": started - began,
        "step": 7 * (trained - started) / STEPS,
        "finishing": (time.perf_counter() - trained) / 2,
    }
    return whole


def trial(kind: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs of one kind until there were enough kills, and finish and compare them."""
    path = RESULTS / FOLDER / f"{kind}.json"
    state: dict[str, Any] = {"seed": seed, "config": CONFIG, "attempts": [], "runs": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and (kept := json.loads(path.read_text()))["config"] == CONFIG and kept["seed"] == seed:
        state = {key: kept[key] for key in (*state, "longest")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    whole, run = whole_run(folder, state), folder / "run"
    while True:
        done = sum(attempt["killed"] for attempt in state["attempts"])
        group = Group(folder, run)
        if done < kills:
            drawn = random.Random(f"{seed} {kind} {len(state['attempts'])}")
            state["attempts"].append(kill(group, kind, drawn, run, state["longest"]))
            print(kind, done + 1, state["attempts"][-1], flush=True)
        else:
            group.first.wait()
        if group.first.returncode == 0:
            state["runs"].append({"attempts": len(state["attempts"]), "differences": differences(run, whole)})
            print(kind, state["runs"][-1], flush=True)
            shutil.rmtree(run)
        elif group.first.returncode != -signal.SIGKILL and not (state["attempts"] and state["attempts"][-1]["killed"]):
            raise SystemExit(group.output.read_text())
        write(f"{FOLDER}/{kind}", state)
        if done >= kills:
            return state


def table() -> list[str]:
    """Lines of the table for the documentation."""
    lines = [
        "| killed | kills | while training, starting, finishing | runs | equal bit for bit | all ended within |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    names = {"rank": "one of two processes", "group": "both processes"}
    for kind, name in names.items():
        state = json.loads((RESULTS / FOLDER / f"{kind}.json").read_text())
        kills = [attempt for attempt in state["attempts"] if attempt["killed"]]
        phases = ", ".join(str(sum(kill["phase"] == phase for kill in kills)) for phase in SHARES)
        equal = sum(not run["differences"] for run in state["runs"])
        gone = max(kill["gone"] for kill in kills)
        lines.append(f"| {name} | {len(kills)} | {phases} | {len(state['runs'])} | {equal} | {gone:.1f} s |")
    return lines


def main() -> None:
    """Kill, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KILLS)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs") / FOLDER, help="where the runs are kept")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.table:
        found = [
            trial(kind, given.kills or number, given.seed, (given.folder / kind).resolve())
            for kind, number in KILLS.items()
            if given.only in (None, kind)
        ]
        if any(run["differences"] for state in found for run in state["runs"]):
            raise SystemExit("A resumed run differs from the one in one go.")
    write_section(FOLDER, table())


if __name__ == "__main__":
    main()
