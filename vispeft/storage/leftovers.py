"""Leftovers of killed processes: files under temporary names, and saves that stopped between two files."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from vispeft.storage.disk import settle
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE

__all__ = ["finish_save", "remove_partial"]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?:part|earlier|copy|[a-z0-9_]{8})")
"""Names that `write_atomically` gives to files until they are complete, and to earlier ones until it is done. Earlier
versions ended them in eight random letters."""


def remove_partial(folder: Path, *endings: str) -> None:
    """Remove files that were being written when a process was killed.

    The caller sees to it that nobody writes there at present.

    Args:
        folder: The folder; it need not exist.
        endings: Ends of the names of files that are written there.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match and match["name"].endswith(endings) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):  # on Windows a virus scanner may have it open
                path.unlink(missing_ok=True)


def finish_save(folder: Path) -> None:
    """Finish a save of an adapter that was stopped between two of its files, or undo it.

    The caller sees to it that nobody writes there at present.

    Args:
        folder: The adapter's directory; it need not exist.
    """
    if folder.is_dir():
        settle([folder / name for name in (ADAPTER_FILE, HEAD_FILE, JSON_FILE)])
        remove_partial(folder, ADAPTER_FILE, HEAD_FILE, JSON_FILE)
