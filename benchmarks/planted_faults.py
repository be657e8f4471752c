"""Plant one-line faults in the library and record the test that finds each, in an earlier revision and in this one.

    python benchmarks/planted_faults.py --check             # does every fault apply, exactly once? runs no test
    python benchmarks/planted_faults.py --minutes 120       # start again to go on; idle processors, please
    python benchmarks/planted_faults.py --table

The faults are in planted_faults.yaml: a piece of text in one file and its replacement, for the earlier revision and, at
the same place, for the present one. Each is planted in a fresh copy of the committed files of its revision. pytest runs
the tests nearest to the fault, then the rest of the fast ones, then the slow ones, and stops at the first failure. The
test that failed is then run without the fault; if it fails there too, it is left out and the search goes on. One JSON
per fault and revision in results/planted_faults; a second start skips them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import common
import yaml

import vispeft  # noqa: F401 - makes torchvision importable for `common.write`

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_suffix(".yaml")
FOLDER = "planted_faults"
PLUGINS = Path(__file__).resolve().parent / "plugins"
EARLIER = "a0bd47e"
"""The revision before the second edition of the core."""
OWN_TEST = "tests/benchmarks/test_planted_faults.py"
"""Left out: it sees that the text of a fault is gone from its file."""
STAGE_LIMIT = 7200
"""Seconds after which a stage is given up; pytest-timeout ends single tests long before."""

Side = Literal["old", "new"]
SIDES: tuple[Side, ...] = ("old", "new")


# ------------------------------------------------------------------ the faults


class StaleError(Exception):
    """A fault does not fit the file it is to be planted in."""


@dataclass(frozen=True)
class Plant:
    """One replacement."""

    file: str
    """Path in the repository."""
    find: str
    """Text that the file holds exactly once."""
    put: str
    """Replacement."""

    def planted(self, text: str) -> str:
        """Make the faulty text of the file.

        Raises:
            StaleError: If the text to replace is not there exactly once, or the result is no Python.
        """
        count = text.count(self.find)
        if count != 1:
            raise StaleError(f"{self.file} holds the text to replace {count} times: {self.find!r}")
        faulty = text.replace(self.find, self.put)
        if faulty == text:
            raise StaleError(f"{self.file} stays as it is.")
        try:
            compile(faulty, self.file, "exec")
        except SyntaxError as error:
            raise StaleError(f"{self.file} no longer compiles: {error}") from error
        return faulty

    @property
    def digest(self) -> str:
        """Digest of the replacement, by which a result is known to belong to it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fault:
    """A mistake that a reviewer could overlook."""

    name: str
    part: str
    """Part of the library: hosts, merge, files, verify, quantiser, tasks, resume, mmseg."""
    says: str
    """The mistake in one line."""
    nearest: tuple[str, ...]
    """Tests that are run first."""
    old: Plant
    new: Plant | None
    """None until it has been written."""

    def plant(self, side: Side) -> Plant | None:
        """Give the replacement for one of the revisions."""
        return self.old if side == "old" else self.new


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """Read the table of faults."""
    faults = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        plants = {side: Plant(**entry[side]) if entry.get(side) else None for side in SIDES}
        faults.append(Fault(**{**entry, **plants, "nearest": tuple(entry["nearest"])}))
    assert len({fault.name for fault in faults}) == len(faults), "names of faults must differ"
    return faults


def git(*arguments: str) -> bytes:
    """Run git in this repository and return its output."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def problems(faults: Iterable[Fault], revisions: dict[Side, str]) -> Iterator[str]:
    """List the faults that do not fit their revision."""
    for fault in faults:
        for side, revision in revisions.items():
            plant = fault.plant(side)
            if plant is None:
                yield f"{fault.name}: no text for the {side} revision yet"
                continue
            try:
                plant.planted(git("show", f"{revision}:{plant.file}").decode())
            except (StaleError, subprocess.CalledProcessError) as error:
                yield f"{fault.name} ({side}): {error}"


# ------------------------------------------------------------------ running the suite


@dataclass(frozen=True)
class Stage:
    """A part of the suite."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Result of a stage."""

    failed: tuple[str, ...]
    """Tests that failed, or files that could not be imported."""
    summary: str
    """pytest's last line."""
    seconds: float


def stages(side: Side, nearest: tuple[str, ...]) -> list[Stage]:
    """Divide the suite of a revision; the earlier one had no fast half, and its slow tests ran with the others."""
    near = [Stage("nearest", (*nearest, *(() if side == "old" else ("-m", "not slow"))))] if nearest else []
    if side == "old":
        return [*near, Stage("all", ("tests",))]
    return [*near, Stage("fast", ("tests", "-m", "not slow")), Stage("slow", ("tests", "-m", "slow"))]


@contextmanager
def copy_of(revision: str) -> Iterator[Path]:
    """Unpack the committed files of a revision into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", revision))) as archive:
            archive.extractall(name, filter="data")
        yield Path(name)


def environment(folder: Path) -> dict[str, str]:
    """Make an environment that imports vispeft from a copy, also in the processes that tests start."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join([str(folder), str(PLUGINS)])
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_stage(folder: Path, stage: Stage, *, workers: int, without: Iterable[str] = (), stop: bool = True) -> Outcome:
    """Run a part of the suite.

    Args:
        folder: Copy of a revision.
        stage: The part.
        workers: Processes; 0 runs the tests in pytest's own.
        without: Tests to leave out.
        stop: Whether to stop at the first failure.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "one_thread",
        "-n",
        str(workers),
    ]
    command += ["--dist", "worksteal"] if workers else []
    left_out = (f"--deselect={test}" for test in (OWN_TEST, *without))
    command += [*(["-x"] if stop else []), *left_out, *stage.arguments]
    began = time.monotonic()
    run = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=STAGE_LIMIT
    )
    seconds = round(time.monotonic() - began, 1)
    failed = tuple(re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE))
    lines = run.stdout.strip().splitlines() or [""]
    nothing_to_run = run.returncode == 5  # for example no slow test near the fault
    if (run.returncode not in (0, 1, 2) and not nothing_to_run) or (run.returncode in (1, 2)) != bool(failed):
        raise SystemExit(f"pytest ended with {run.returncode} and cannot be understood:\n{run.stdout}\n{run.stderr}")
    return Outcome(failed, lines[-1], seconds)


def check_import(folder: Path) -> None:
    """Refuse to test anything but the copy."""
    code = "import vispeft; print(vispeft.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    if run.returncode == 0 and not Path(run.stdout.strip()).is_relative_to(folder):
        raise SystemExit(f"vispeft is imported from {run.stdout.strip()}, and not from the copy in {folder}.")


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Trial:
    """One fault in one revision."""

    fault: Fault
    side: Side

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{FOLDER}/{self.fault.name}-{self.side}"

    def result(self) -> dict[str, Any] | None:
        """Read its result; None when it has not been run with the present text."""
        path = common.RESULTS / f"{self.name}.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["plant"] == self.digest else None

    @property
    def digest(self) -> str | None:
        """Digest of its text."""
        plant = self.fault.plant(self.side)
        return None if plant is None else plant.digest


def failing_anyway(side: Side) -> set[str]:
    """List the tests that earlier runs found to fail without a fault."""
    paths = sorted((common.RESULTS / FOLDER).glob(f"*-{side}.json"))
    return {test for path in paths for test in json.loads(path.read_text(encoding="utf-8"))["failing_anyway"]}


def search(folders: tuple[Path, Path], stage: Stage, workers: int, failing: set[str]) -> Outcome:
    """Run a stage until a test fails that passes without the fault, or to its end.

    Args:
        folders: The copy with the fault, and one without.
        stage: The part of the suite.
        workers: Processes.
        failing: Tests that fail without the fault, which are left out; those that are found here are added.

    Returns:
        The outcome, with the tests that fail because of the fault.
    """
    faulty, clean = folders
    while True:
        outcome = run_stage(faulty, stage, workers=workers, without=sorted(failing))
        if not outcome.failed:
            return outcome
        anyway = run_stage(clean, Stage("clean", outcome.failed), workers=0, stop=False).failed
        told = tuple(test for test in outcome.failed if test not in anyway)
        if told:
            return replace(outcome, failed=told)
        failing.update(anyway)


def run_fault(trial: Trial, revision: str, workers: int) -> None:
    """Plant a fault in a fresh copy and run the suite stage by stage until a test fails."""
    plant = trial.fault.plant(trial.side)
    assert plant is not None
    outcomes: dict[str, Outcome] = {}
    failing = failing_anyway(trial.side)
    with copy_of(revision) as folder, copy_of(revision) as clean:
        target = folder / plant.file
        target.write_text(plant.planted(target.read_text(encoding="utf-8")), encoding="utf-8")
        check_import(folder)
        for stage in stages(trial.side, trial.fault.nearest):
            outcomes[stage.name] = search((folder, clean), stage, workers, failing)
            if outcomes[stage.name].failed:
                break
    _write(trial, revision, outcomes, workers, failing)


def _write(
    trial: Trial, revision: str, outcomes: dict[str, Outcome], workers: int, failing: Iterable[str] = ()
) -> None:
    failed = [test for outcome in outcomes.values() for test in outcome.failed]
    (common.RESULTS / FOLDER).mkdir(parents=True, exist_ok=True)
    common.write(
        trial.name,
        {
            "revision": revision,
            "plant": trial.digest,
            "workers": workers,
            "found": bool(failed),
            "failed": failed,
            "failing_anyway": sorted(failing),
            "stage": list(outcomes)[-1],
            "seconds": round(sum(outcome.seconds for outcome in outcomes.values()), 1),
            "stages": {name: asdict(outcome) for name, outcome in outcomes.items()},
        },
    )


def table_lines(faults: list[Fault]) -> Iterator[str]:
    """Yield the table of results, with marks where a run is missing."""
    yield "| part | fault | suite of the earlier revision | present suite |"
    yield "|---|---|---|---|"
    lost, missing, found = [], 0, dict.fromkeys(SIDES, 0)
    for fault in faults:
        results = {side: Trial(fault, side).result() for side in SIDES}
        yield f"| {fault.part} | {fault.says} | {_cell(results['old'])} | {_cell(results['new'])} |"
        missing += sum(result is None for result in results.values())
        for side, result in results.items():
            found[side] += bool(result and result["found"])
        old, new = results["old"], results["new"]
        lost += [fault.name] if old and new and old["found"] and not new["found"] else []
    yield ""
    yield (
        f"Of {len(faults)} faults the earlier suite finds {found['old']} and the present one {found['new']}"
        + (f"; {missing} of {2 * len(faults)} runs are missing." if missing else ".")
        + (f" LOST: {', '.join(lost)}." if lost else "")
    )


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not yet run"
    seconds = f"{result['seconds']:,.0f} s"
    return f"`{result['failed'][0].split('::', 1)[-1]}`, {seconds}" if result["found"] else f"not found, {seconds}"


# ------------------------------------------------------------------ command line


def run_all(faults: list[Fault], revisions: dict[Side, str], arguments: argparse.Namespace) -> None:
    """Run the trials without a result until the time is used up."""
    began = time.monotonic()
    trials = [Trial(fault, side) for fault in faults for side in revisions]
    for trial in trials:
        if trial.result() is not None or trial.digest is None:
            continue
        if time.monotonic() - began >= 60 * arguments.minutes:
            raise SystemExit("The time is used up; start again to go on.")
        print(f"{trial.name} ...", flush=True)
        try:
            run_fault(trial, revisions[trial.side], arguments.workers)
        except StaleError as error:
            print(f"{trial.name} is left out: {error}", flush=True)
            continue
        result = trial.result()
        assert result is not None
        tests = ", ".join(result["failed"][:3]) or "no failing test"
        print(f"{trial.name}: {tests} ({result['stage']}, {result['seconds']:.0f} s)", flush=True)


def main() -> None:
    """Check, run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only see whether the faults apply and compile")
    parser.add_argument("--table", action="store_true", help="print the table and put it into docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="these revisions alone")
    parser.add_argument("--revision", default="HEAD", help="the present revision; only committed files count")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    # With several, pytest goes on for minutes after the first failure.
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest; 0 for its own")
    arguments = parser.parse_args()
    faults = [fault for fault in read_faults() if arguments.only is None or fault.name in arguments.only]
    if arguments.table:
        lines = list(table_lines(faults))
        print("\n".join(lines))
        common.write_section("planted_faults", lines)
        return
    named: dict[Side, str] = {"old": EARLIER, "new": arguments.revision}
    revisions = {side: git("rev-parse", f"{named[side]}^{{commit}}").decode().strip() for side in arguments.sides}
    found = list(problems(faults, revisions))
    print("\n".join(found or [f"{len(faults)} faults apply to {', '.join(revisions)}."]))
    if arguments.check:
        raise SystemExit(bool(found))
    run_all(faults, revisions, arguments)


if __name__ == "__main__":
    main()
