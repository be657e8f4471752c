"""Kill jobs that write files before each of their file operations, and look at what is left.

    python benchmarks/kills.py                             # start again to go on
    python benchmarks/kills.py --only merge --minutes 10
    python benchmarks/kills.py --table                     # also puts the table into docs/benchmarks.md

A job runs in a process forked from this one, in which everything is imported already. First it runs to its end, and
its file operations are listed by an audit hook of Python (opening for writing, creating, renaming, linking, truncating,
removing). Then it is started again once for every operation of that list, and killed by SIGKILL just before it; and at
random moments. After each kill, every file that a reader may find is read. The job is then started again, as its user
would, and has to end with the files of the job that was not killed: bit for bit, and no file more.
One JSON per job in results/kills, written after each kill.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from resume_kill import differences
from safetensors.torch import load_file

from vispeft.cli.main import main as vispeft_main
from vispeft.cli.runs import Run, begun
from vispeft.errors import VispeftError
from vispeft.storage.files import JSON_FILE, read_adapter
from vispeft.tasks.checkpoints import read_checkpoint

FOLDER = "kills"
RANDOM = {"train": 16, "more": 8, "cache": 8, "merge": 4, "export": 4, "predict": 4}
"""Number of kills at random moments, by job: 44 together."""
SHORT = ("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1")
SSF = """
model:
  class_path: vispeft.tasks.Classification
  init_args:
    backbone: vit_tiny_patch16_224
    backbone_args: {pretrained: false, img_size: 16, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
    method: {class_path: vispeft.SSF}
    lr: 1e-2
data: {class_path: vispeft.data.DigitsData, init_args: {batch_size: 64}}
trainer: {max_epochs: 2}
"""
PROBE = SSF.replace("vispeft.SSF", "vispeft.LinearProbe")
LIMIT = 300
"""Seconds after which a job counts as hanging."""


@dataclass(frozen=True)
class Job:
    """A command whose process is killed."""

    name: str
    """Name of the job."""
    arguments: tuple[str, ...]
    """Arguments of ``vispeft``; paths are relative to the job's folder."""
    run: str | None = None
    """The run directory it trains in; None if it trains nothing."""
    reads_done: bool = False
    """Whether it needs the finished run ``done``."""

    def again(self, folder: Path) -> tuple[str, ...]:
        """Return the arguments by which a user starts it once more after a kill."""
        run = folder / self.run if self.run else None
        if run is None or "--resume" in self.arguments or not run.is_dir() or not begun(run):
            return self.arguments
        keys = [part for part in self.arguments if part.startswith("--cache_features")]
        return ("train", "--resume", str(self.run), *keys)


JOBS = (
    Job("merge", ("merge", "done", "--out", "out.safetensors"), reads_done=True),
    Job("export", ("export", "done", "--format", "export", "--out", "out.pt2"), reads_done=True),
    Job("predict", ("predict", "done", "images", "--out", "out", "--batch_size", "2"), reads_done=True),
    Job("train", ("train", "ssf.yaml", *SHORT, "--out", "run"), run="run"),
    Job("more", ("train", "--resume", "done", "--trainer.max_epochs", "3"), run="done", reads_done=True),
    Job("cache", ("train", "probe.yaml", *SHORT, "--cache_features=kept", "--out", "run"), run="run"),
)


# ------------------------------------------------------------------ one process


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    """Exit status; negative for a signal."""
    output: str
    """Text it printed."""
    seconds: float
    """Seconds it took."""
    operations: list[str]
    """File operations; empty if it was killed."""
    modules: list[str]
    """Modules it has imported; empty if it was killed."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that only this process removes; a forked one would remove a `TemporaryDirectory` at its exit."""
    place = Path(tempfile.mkdtemp())
    try:
        yield place
    finally:
        shutil.rmtree(place)


def run_job(folder: Path, arguments: tuple[str, ...], before: int | None = None, after: float | None = None) -> Ended:
    """Run a command in a forked process.

    Args:
        folder: Its working directory.
        arguments: Arguments of ``vispeft``.
        before: Number of the file operation before which it is killed.
        after: Seconds after which it is killed.
    """
    with temporary_folder() as place:
        output, listed = place / "output", place / "listed.json"
        output.touch()  # the process may be killed before its first step
        began = time.perf_counter()
        process = os.fork()
        if process == 0:
            _child(folder, arguments, output, listed, before)
        status = _wait(process, began, after)
        seconds = time.perf_counter() - began
        told = json.loads(listed.read_text()) if listed.is_file() else {"operations": [], "modules": []}
        return Ended(status, output.read_text(errors="replace"), seconds, **told)


def _wait(process: int, began: float, after: float | None) -> int:
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.perf_counter() - began
        if passed > LIMIT or (after is not None and passed >= after):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def _child(folder: Path, arguments: tuple[str, ...], output: Path, listed: Path, before: int | None) -> None:
    """Run the command, and end the process."""
    status = 70
    try:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        os.environ.update(TMPDIR=str(temporary), VISPEFT_CACHE=str(folder / "facts"))
        tempfile.tempdir = None
        os.chdir(folder)
        operations = _count(folder, before)
        status = vispeft_main(arguments)
        atexit._run_exitfuncs()
        listed.write_text(json.dumps({"operations": operations, "modules": sorted(sys.modules)}))
    except BaseException as error:  # the parent's code must not go on here
        with suppress(BaseException):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _count(folder: Path, before: int | None) -> list[str]:
    """List the process's file operations in a folder from now on, and kill it before one of them."""
    operations: list[str] = []
    home = os.path.realpath(folder)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        path = _changed(event, given, home)
        if path is None:
            return
        if len(operations) == before:
            os.kill(os.getpid(), signal.SIGKILL)
        operations.append(f"{event} {path}")

    sys.addaudithook(hook)
    return operations


CHANGES = ("rename", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "chmod")


def _changed(event: str, given: tuple[Any, ...], home: str) -> str | None:
    """Return the path below a folder that an audited event changes, if it does."""
    if event == "open":
        path, _, flags = given
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return None
    elif event.startswith("os.") and event.removeprefix("os.") in CHANGES:
        path = given[0]
    else:
        return None
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    whole = os.path.abspath(os.fsdecode(path))
    return os.path.relpath(whole, home) if whole.startswith(home + os.sep) else None


# ------------------------------------------------------------------ reading what is left


def unreadable(folder: Path) -> list[str]:
    """Read every file of a folder that has its final name, and list those that cannot be read.

    Args:
        folder: The folder.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or path.parent.name == "tmp":
            continue
        try:
            _read(path)
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


def _read(path: Path) -> None:
    if path.name == JSON_FILE:
        read_adapter(path.parent)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".ckpt":
        read_checkpoint(path)
    elif path.suffix == ".safetensors" and path.parent.name != "adapter":
        load_file(path)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".pt2":
        torch.export.load(path)


def names(folder: Path) -> set[str]:
    """List the files of a folder; those of TensorBoard have the time in their names and count as one.

    Args:
        folder: The folder.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(path.parent if path.name.startswith("events.out.tfevents") else path) for path in paths}


def unequal(job: Job, folder: Path, whole: Path) -> list[str]:
    """List the files of a job's folder that differ from those of the job that was not killed."""
    ours, theirs = names(folder), names(whole)
    found = [f"left behind: {name}" for name in sorted(ours - theirs)]
    found += [f"missing: {name}" for name in sorted(theirs - ours)]
    if job.run and not found:
        found += [f"{job.run}/{name}" for name in differences(folder / job.run, whole / job.run)]
    others = [name for name in sorted(ours & theirs) if not job.run or not name.startswith(f"{job.run}/")]
    return found + [name for name in others if not _same(folder / name, whole / name)]


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() or one.read_bytes() == other.read_bytes():
        return True
    if one.suffix != ".pt2":
        return False
    first, second = (torch.export.load(path) for path in (one, other))  # an archive holds the time of its writing
    states = (first.state_dict, second.state_dict)
    return first.graph_module.code == second.graph_module.code and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0].keys() | states[1].keys()
    )


# ------------------------------------------------------------------ trials


@dataclass
class Trial:
    """One kill, and its consequences."""

    moment: str
    """Number of the file operation before which the process was killed, or the share of its time."""
    operation: str | None
    """The file operation."""
    killed: bool
    """Whether the process was still there."""
    unreadable: list[str]
    """Files that could not be read after the kill."""
    unequal: list[str]
    """Differences from the job that was not killed, after the job was started again."""

    @property
    def faulty(self) -> bool:
        """Whether the kill had a consequence it must not have."""
        return bool(self.unreadable or self.unequal)


def prepare(place: Path) -> tuple[Path, Path]:
    """Make folders as they are before a job: with configs alone, and with a finished run.

    Args:
        place: Folder for both.

    Returns:
        The folder without a finished run, and the one with it.
    """
    bare, finished = place / "bare", place / "finished"
    bare.mkdir()
    (bare / "ssf.yaml").write_text(SSF)
    (bare / "probe.yaml").write_text(PROBE)
    (bare / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (20, 20), (50 * number, 90, 200)).save(bare / "images" / f"{number}.png")
    shutil.copytree(bare, finished)
    ended = run_job(finished, ("train", "ssf.yaml", *SHORT, "--out", "done"))
    if ended.status:
        raise SystemExit(ended.output)
    return bare, finished


class Scene:
    """A job, the folder it starts from, and the folder it ends with if nothing kills it."""

    def __init__(self, job: Job, place: Path, before: Path) -> None:
        """Run the job once, and list its file operations.

        Args:
            job: The job.
            place: Folder for what it writes.
            before: The folder it starts from, which is copied.
        """
        self.job, self.before, self.place = job, before, place
        self.whole = place / f"{job.name}-whole"
        for name in self._run(self.whole).modules:  # later processes have them from the start
            with suppress(Exception):
                importlib.import_module(name)
        other = place / f"{job.name}-other"
        self.ended = self._run(other)
        found = unequal(job, other, self.whole)
        if found:
            raise SystemExit(f"Two runs of {job.name} differ although neither was killed: {found}")

    def _run(self, folder: Path) -> Ended:
        shutil.copytree(self.before, folder)
        ended = run_job(folder, self.job.arguments)
        if ended.status:
            raise SystemExit(ended.output)
        return ended

    def trial(self, moment: str) -> Trial:
        """Kill the job once, read what is left, start it again, and compare.

        Args:
            moment: Number of a file operation, or ``NUMBER%`` of the job's time.
        """
        folder = self.place / f"{self.job.name}-killed"
        shutil.copytree(self.before, folder)
        try:
            return self._trial(moment, folder)
        finally:
            shutil.rmtree(folder)

    def _trial(self, moment: str, folder: Path) -> Trial:
        operation, before, after = None, None, None
        if moment.endswith("%"):
            after = float(moment[:-1]) / 100 * self.ended.seconds
        else:
            before = int(moment)
            operation = self.ended.operations[before]
        killed = run_job(folder, self.job.arguments, before, after)
        broken = unreadable(folder)
        if self.job.reads_done:
            try:
                Run.open(folder / "done")
            except VispeftError as error:
                broken.append(str(error))
        again = run_job(folder, self.job.again(folder))
        complete = again.status == 2 and "exists already" in again.output  # killed after its last file was in place
        wrong = unequal(self.job, folder, self.whole)
        if again.status and not complete:
            wrong.insert(0, f"started again, it ended with {again.status}: {again.output[-300:]}")
        return Trial(moment, operation, killed.status == -signal.SIGKILL, broken, wrong)


def moments(job: Job, operations: int) -> list[str]:
    """Return all moments at which a job is killed: before each file operation, and at random shares of its time."""
    drawn = random.Random(f"kills of {job.name}")
    shares = [f"{drawn.uniform(0, 90):.2f}%" for _ in range(RANDOM[job.name])]
    return [*shares, *map(str, range(operations))]


# ------------------------------------------------------------------ results


def record(job: Job, operations: list[str], trials: list[Trial]) -> None:
    """Write the JSON of a job."""
    from common import RESULTS, write

    (RESULTS / FOLDER).mkdir(parents=True, exist_ok=True)
    write(
        f"{FOLDER}/{job.name}",
        {
            "arguments": ["vispeft", *job.arguments],
            "operations": len(operations),
            "moments": len(moments(job, len(operations))),
            "kills": [asdict(trial) for trial in trials],
        },
    )


def recorded(job: Job, operations: list[str]) -> list[Trial]:
    """Read the kills of an earlier start; those before an operation count only while the operation is the same."""
    from common import RESULTS

    path = RESULTS / FOLDER / f"{job.name}.json"
    if not path.is_file():
        return []
    earlier = [Trial(**kill) for kill in json.loads(path.read_text())["kills"]]
    return [
        kill
        for kill in earlier
        if kill.moment.endswith("%") or kill.operation in operations[int(kill.moment) : int(kill.moment) + 1]
    ]


def kill_all(job: Job, place: Path, before: Path, deadline: float) -> None:
    """Kill a job at all moments that are not recorded yet, until a deadline."""
    scene = Scene(job, place, before)
    operations = scene.ended.operations
    trials = recorded(job, operations)
    done = {trial.moment for trial in trials}
    left = [moment for moment in moments(job, len(operations)) if moment not in done]
    for number, moment in enumerate(left):
        if time.monotonic() > deadline:
            print(f"{job.name}: {len(left) - number} moments are left; start again to go on", flush=True)
            break
        trials.append(scene.trial(moment))
        record(job, operations, trials)
        if trials[-1].faulty:
            print(job.name, trials[-1], flush=True)
    faulty = sum(trial.faulty for trial in trials)
    print(f"{job.name}: {len(trials)} kills, {len(operations)} file operations, {faulty} with consequences", flush=True)


def table() -> Iterator[str]:
    """Format the results as a table of Markdown."""
    from common import RESULTS

    yield "| job | kills before a file operation | of operations | at random moments | with consequences |"
    yield "|---|---|---|---|---|"
    for job in JOBS:
        path = RESULTS / FOLDER / f"{job.name}.json"
        if not path.is_file():
            yield f"| `{job.name}` | not run yet | | | |"
            continue
        result = json.loads(path.read_text())
        kills = [Trial(**kill) for kill in result["kills"]]
        drawn = [kill for kill in kills if kill.killed and kill.moment.endswith("%")]
        before = sum(kill.killed and not kill.moment.endswith("%") for kill in kills)
        faulty = sum(kill.faulty for kill in kills)
        yield f"| `{job.name}` | {before} | {result['operations']} | {len(drawn)} | {faulty} |"


def main() -> None:
    """Kill, compare, and write."""
    from common import write_section

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="JOB", help="these jobs alone")
    parser.add_argument("--minutes", type=float, default=240, help="begin no kill after these")
    parser.add_argument("--table", action="store_true", help="print the table and put it into docs/benchmarks.md")
    given = parser.parse_args()
    if given.table:
        lines = list(table())
        print("\n".join(lines))
        write_section(FOLDER, lines)
        return
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # events of a killed process are read again
    torch.set_num_threads(1)  # a forked process has no pool of threads
    deadline = time.monotonic() + 60 * given.minutes
    with temporary_folder() as place:
        bare, finished = prepare(place)
        for job in JOBS:
            if not given.only or job.name in given.only:
                kill_all(job, place, finished if job.reads_done else bare, deadline)


if __name__ == "__main__":
    main()
