"""What the commands that read images share: the number of workers, and the images that could not be read."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from vispeft.building.config_files import read_config
from vispeft.cli.common import console
from vispeft.cli.runs import Run
from vispeft.cli.stopping import Stopped
from vispeft.data.reading import BrokenImage
from vispeft.errors import DataError, counted, is_utf8, printable

__all__ = ["NAMED", "add_reading", "add_workers", "check_names", "end_with", "goes_on", "workers_of"]

NAMED = 20
"""Largest number of images that are named at the end."""


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that read images.

    Args:
        parser: A command's parser.
    """
    parser.add_argument("--workers", type=int, help="processes that read images; default: as the run's data")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that read images of the user's.

    Args:
        parser: A command's parser.
    """
    parser.add_argument("--max_pixels", type=int, help="largest number of pixels of an image; default: as trained")
    add_workers(parser)


def workers_of(run: Run) -> int:
    """Return the number of processes that read the data of a run; 0 where its config does not say, or is of others.

    Args:
        run: The run.
    """
    if run.foreign:
        return 0
    data = read_config(run.config).get("data")
    settings = data.get("init_args") if isinstance(data, dict) else None
    found = settings.get("num_workers") if isinstance(settings, dict) else None
    return found if isinstance(found, int) and found > 0 else 0


def check_names(paths: Sequence[Path], done: str) -> None:
    """Refuse images whose names a table cannot hold, before the work begins.

    Args:
        paths: The files.
        done: Participle of the work, for the message.

    Raises:
        DataError: If there are some; the message names them.
    """
    broken = [printable(str(path)) for path in paths if not is_utf8(str(path))]
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        named = "; ".join(f"{name} has a name that is no UTF-8, which the table could not hold" for name in broken[:5])
        raise DataError(
            f"{len(broken)} of {counted(len(paths), 'image')} cannot be used: {named}{more}. "
            f"Nothing was {done}; mend what is named there, or leave these images out."
        )


@contextlib.contextmanager
def goes_on() -> Iterator[None]:
    """Add to the message of a stop how the work is gone on with."""
    try:
        yield
    except Stopped as stopped:
        stopped.hint = "The same command goes on behind the last batch."
        raise


def end_with(left_out: Sequence[BrokenImage]) -> None:
    """List the images that could not be read, and end the command with status 1 if there are some.

    Args:
        left_out: The images.

    Raises:
        SystemExit: With status 1, if there are some.
    """
    if not left_out:
        return
    console.print(f"{counted(len(left_out), 'image')} could not be read and left out:", soft_wrap=True)
    for entry in left_out[:NAMED]:
        console.print(f"  {entry.reason}", soft_wrap=True)
    if len(left_out) > NAMED:
        console.print(f"  and {len(left_out) - NAMED:,} more")
    raise SystemExit(1)
