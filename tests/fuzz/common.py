"""The driver of all fuzzing: a case is refused with one of the project's errors or works, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from vispeft.errors import VispeftError

__all__ = ["SECONDS", "cases", "outcome"]

SECONDS = 2.0
"""Longest time of a case, in seconds of the processor: other processes may slow the machine down."""
GROWTH = 200 * 2**20
"""Largest growth of the process's memory in a case, in bytes."""


def cases(count: int) -> Callable[[Any], Any]:
    """Set the number of cases of a test.

    Args:
        count: The number in the suite; ``VISPEFT_FUZZ=10`` makes ten times as many.
    """
    times = float(os.environ.get("VISPEFT_FUZZ", "1"))
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    # In the suite the same cases each time; others in each longer run.
    return settings(
        max_examples=max(1, round(count * times)),
        deadline=None,
        derandomize=times == 1,
        database=None,
        suppress_health_check=checks,
    )


def outcome(case: Callable[[], Any], folder: Path) -> str:
    """Run a case.

    Args:
        case: The case, a function without arguments.
        folder: The folder it may look into. Nothing in it or in the current folder may be new afterwards.

    Returns:
        ``"works"``, or the text of the error with which it was refused.

    Raises:
        AssertionError: If it took too long or too much memory, started a program, imported a module that is not of an
            installed package, or left a file behind. Any error but ours passes through.
    """
    files, memory, began = _listing(folder), _peak(), time.process_time()
    with _nothing_started(folder):
        try:
            case()
        except VispeftError as error:
            found = str(error)
        else:
            found = "works"
    assert time.process_time() - began < SECONDS, f"took {time.process_time() - began:.1f} s"
    assert _peak() - memory < GROWTH, f"the process grew by {(_peak() - memory) / 2**20:.0f} MiB"
    assert _listing(folder) == files, "left files behind"
    return found


def _peak() -> int:
    """Return the largest memory of the process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _listing(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names} | set(os.listdir())


@contextmanager
def _nothing_started(folder: Path) -> Iterator[None]:
    """Fail where a program is started, a file is opened to be written, or a planted module is imported."""
    events: list[str] = []
    modules = set(sys.modules)

    def note(event: str) -> Callable[..., Any]:
        def called(*arguments: Any, **_: Any) -> Any:
            events.append(f"{event} {arguments[:1]}")
            raise OSError(f"{event} is not allowed in a test")

        return called

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "system"), (subprocess, "Popen"), (os, "posix_spawn"), (os, "fork"), (os, "execve")):
            if hasattr(owner, name):
                patch.setattr(owner, name, note(name))
        yield
    assert not events, events
    new = [name for name in set(sys.modules) - modules if name in PLANTED or _inside(name, folder)]
    assert not new, f"imported {new}"


PLANTED = {"antigravity", "this", "idlelib", "turtledemo", "planted"}
"""Modules that nothing but a planted name imports."""


def _inside(name: str, folder: Path) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)
