"""Work in pieces: each is a file of its own until the last one is there, so that a killed process goes on behind it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError, brief
from vispeft.storage.disk import read_regular, write_atomically
from vispeft.storage.leftovers import remove_partial
from vispeft.storage.locks import clear, hold

__all__ = ["PARTS", "PLAN", "Pieces"]

PARTS, PLAN = "parts", "plan.json"
"""Folder of the pieces, and the file that says what all of them depend on."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A folder of pieces of one piece of work, by the number of the first item of each.

    Pieces always begin at the same items, so that results do not depend on where the work was interrupted.
    """

    place: Path
    """The folder."""
    what: str
    """Noun for the work, for messages."""
    plan: Mapping[str, Any]
    """Everything the pieces depend on, as values of JSON; a folder of another plan is not gone on with."""
    ending: str
    """Ending of a piece's file, with its dot."""

    @contextlib.contextmanager
    def held(self, finished: Callable[[], None], *endings: str) -> Iterator[None]:
        """Keep other processes out of the folder, and begin or go on in it, while a block of code runs.

        Args:
            finished: Raises, if the work is finished: another process may have done it meanwhile.
            endings: Ends of the names of further files that are written in the folder.

        Raises:
            ConfigError: If the folder holds unfinished work of another plan.
            FileError: If it cannot be written, or another process works in it.
        """
        try:
            (self.place / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out is {self.place}, where nothing can be written ({error.strerror}).") from error
        with hold(self.place / ".lock", f"The {self.what} {self.place}"):
            finished()
            remove_partial(self.place, PLAN, *endings)
            remove_partial(self.place / PARTS, self.ending)
            self._begin()
            yield

    def _begin(self) -> None:
        """Write the plan, or compare it with that of the work before."""
        path = self.place / PLAN
        if not path.exists():
            write_atomically({path: json.dumps(self.plan, indent=1).encode()})
            return
        try:
            before = json.loads(read_regular(path))
            other = [key for key in self.plan if before.get(key) != self.plan[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise FileError(f"{path} cannot be read: {brief(error)} Choose another --out.") from error
        if other:
            raise ConfigError(
                f"{self.place} holds an unfinished {self.what} of another {' and another '.join(other)}. Give the "
                "settings of that one to go on with it, or choose another --out."
            )

    @property
    def begun(self) -> bool:
        """Whether there is unfinished work in the folder."""
        return (self.place / PLAN).is_file()

    def path(self, start: int) -> Path:
        """Return the file of a piece.

        Args:
            start: Number of its first item.
        """
        return self.place / PARTS / f"{start:09d}{self.ending}"

    def write(self, start: int, content: bytes) -> None:
        """Write a piece.

        Args:
            start: Number of its first item.
            content: The file.

        Raises:
            FileError: If it cannot be written.
        """
        write_atomically({self.path(start): content})

    def clear(self) -> None:
        """Remove the pieces and the plan, behind the finished work."""
        shutil.rmtree(self.place / PARTS, ignore_errors=True)
        (self.place / PLAN).unlink(missing_ok=True)

    def clear_behind_a_kill(self) -> None:
        """Remove what a process left that was killed when the work was finished and `clear` was not."""
        if self.begun:
            self.clear()
        clear(self.place / ".lock")
