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
from vispeft.storage.locks import hold

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
    """Everything the pieces depend on, as values of JSON; pieces of another plan are not gone on with."""
    ending: str
    """Ending of a piece's file, with its dot."""

    @contextlib.contextmanager
    def held(self, finished: Callable[[], None], *endings: str) -> Iterator[None]:
        """Keep other processes out of the folder, and begin or go on in it, while a block of code runs.

        Args:
            finished: Raises, if the work is finished: another process may have done it meanwhile.
            endings: Ends of the names of further files that are written in the folder.

        Raises:
            ConfigError: If the folder holds pieces of another plan.
            FileError: If it cannot be written, or another process works in it.
        """
        try:
            (self.place / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out is {self.place}, where nothing can be written ({error.strerror}).") from error
        with self._locked():
            finished()
            remove_partial(self.place, PLAN, *endings)
            remove_partial(self.place / PARTS, self.ending)
            self._begin()
            yield

    def _locked(self) -> contextlib.AbstractContextManager[bool]:
        return hold(self.place / ".lock", f"The {self.what} {self.place}")

    def _begin(self) -> None:
        """Write the plan, or compare it with that of the pieces that are there."""
        if not self.begun or not any(path.suffix == self.ending for path in (self.place / PARTS).iterdir()):
            write_atomically({self.place / PLAN: json.dumps(self.plan, indent=1).encode()})
            return
        other = self._differences()
        if other:
            raise ConfigError(
                f"{self.place} holds an unfinished {self.what}, which was begun with other settings "
                f"({', '.join(other)}). Repeat the first command to go on with it; otherwise choose another --out, or "
                "remove the folder."
            )

    def _differences(self) -> list[str]:
        """Name what differs in the plan of the work before."""
        path = self.place / PLAN
        try:
            before = json.loads(read_regular(path))
            return [key for key in self.plan if before.get(key) != self.plan[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise FileError(f"{path} cannot be read: {brief(error)} Choose another --out.") from error

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
        """Remove what a process left that was killed when the work was finished and `clear` was not.

        Pieces of other work, and those that another process is writing, stay.
        """
        with contextlib.suppress(FileError), self._locked():
            if not self.begun or not self._differences():
                self.clear()
