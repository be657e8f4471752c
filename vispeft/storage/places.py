"""Places on the disk: the cache folder, and whether something can be written, asked before the work."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vispeft.errors import FileError

__all__ = ["cache_folder", "check_folder"]


def cache_folder() -> Path:
    """Return the cache folder: ``VISPEFT_CACHE``, or ``vispeft`` in the user's cache folder."""
    chosen = os.environ.get("VISPEFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vispeft"


def check_folder(path: Path, what: str) -> None:
    """Refuse a folder that can neither be made nor be written to. Nothing is made.

    Args:
        path: The folder; it and those above it need not exist.
        what: Noun for what goes there, for the message.

    Raises:
        FileError: If a file stands in its way, it must not be written to, or it can have no such name.
    """
    for place in (path, *path.absolute().parents):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # such as a name that is too long
            raise _refused(path, what, error.strerror or str(error)) from error
        if not os.path.isdir(place):
            raise _refused(path, what, f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise _refused(path, what, f"{place}: {os.strerror(errno.EACCES)}")
        return


def _refused(path: Path, what: str, reason: str) -> FileError:
    return FileError(f"{what} {path} could not be made ({reason}). Choose another place.")
