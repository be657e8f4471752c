"""The calls on open files that differ between systems: opening, locking and replacing.

On Windows an open file can be neither renamed nor removed, and locks are of ranges of bytes, which others cannot read.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import ModuleType

__all__ = ["lock_opened", "lock_process", "moves_open_files", "open_file"]

fcntl: ModuleType | None
msvcrt: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

_FAR = 2**30
"""The byte that is locked on Windows, behind the end of every file, so that all of the file can be read."""
_WAIT = 0.05
"""Seconds between two tries to get a lock on Windows."""


def moves_open_files() -> bool:
    """Return whether a file can be renamed and removed while it is open."""
    return fcntl is not None


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and writing, new or with its content; a link is refused where the system can.

    Args:
        path: The file.

    Returns:
        Its descriptor, which processes started meanwhile do not have.

    Raises:
        OSError: If it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):  # each exists on some systems
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o644)


def lock_opened(descriptor: int) -> None:
    """Lock a file for one opening of it, and wait for others that have it: other threads, too.

    Args:
        descriptor: The file; closing it gives the lock back.

    Raises:
        OSError: If the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    while True:
        try:
            _lock_byte(descriptor)
            return
        except BlockingIOError:
            time.sleep(_WAIT)


def lock_process(descriptor: int) -> None:
    """Lock a file for this process, without its forks, or raise where another process has it.

    Args:
        descriptor: The file; closing it gives the lock back.

    Raises:
        BlockingIOError: If another process has the lock.
        OSError: If the file system has no locks.
    """
    if fcntl is None:
        _lock_byte(descriptor)
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # POSIX allows this number beside that of BlockingIOError
        raise BlockingIOError(error.errno, error.strerror) from error


def _lock_byte(descriptor: int) -> None:
    if msvcrt is None:
        raise OSError("this system has no locks")
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _FAR, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from error
    finally:
        with contextlib.suppress(OSError):
            os.lseek(descriptor, place, os.SEEK_SET)
