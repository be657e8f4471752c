"""Locks between processes: one that writes a run directory or an entry of a cache keeps the others out."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vispeft.errors import FileError
from vispeft.storage.system import lock_process, moves_open_files, open_file

__all__ = ["InUseError", "clear", "hold"]

logger = logging.getLogger(__name__)

_WAIT = 0.2
"""Seconds between two tries to get a lock."""
_held: set[Path] = set()
"""Real paths of the locks of this process; the system's own are between processes only."""
_guard = threading.Lock()


class InUseError(FileError):
    """Another process, or another thread of this one, holds the lock."""


@contextlib.contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock while a block of code runs.

    The system gives a lock back when its process ends, however it ends: one of a killed process is in nobody's way. Its
    file is removed at the end of the block, or by the next holder.

    Args:
        path: The lock's file; its folder must exist.
        what: Noun for what is locked, for messages.
        wait: Whether to wait for the present holder instead of raising.

    Yields:
        Whether the lock had to be waited for.

    Raises:
        InUseError: If somebody else holds the lock.
        FileError: If the file cannot be made.
    """
    # One name for each, whichever links lead to its folder, and also once the working directory is another.
    path = Path(os.path.realpath(path.parent), path.name)
    said = False
    while True:
        try:
            descriptor = _take(path, what)
            break
        except InUseError as error:
            if not wait:
                raise
            if not said:
                logger.info("%s Waiting for it.", str(error).partition(". ")[0] + ".")
            said = True
            time.sleep(_WAIT)
    owner = os.getpid()
    try:
        yield said
    finally:
        if os.getpid() == owner:  # a forked process holds no lock of its parent's
            _give_back(path, descriptor)


def clear(path: Path) -> None:
    """Remove the file of a lock that a killed process left, if nobody holds it.

    Args:
        path: The lock's file; it need not exist.
    """
    if path.exists():
        with contextlib.suppress(FileError), hold(path, str(path)):
            pass


def _take(path: Path, what: str) -> int:
    with _guard:
        if path in _held:
            raise InUseError(_busy(what, f"another thread of process {os.getpid()}"))
        while True:
            try:
                descriptor = open_file(path)  # never through a link: the name of the process is written into it
            except OSError as error:
                raise FileError(f"{what} cannot be locked by {path} ({error.strerror}).") from error
            _lock(descriptor, what)
            # The holder before may have removed the file between our two calls; a lock on it would hold nobody off.
            if _stands_at(descriptor, path):
                break
            os.close(descriptor)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held.add(path)
        return descriptor


def _stands_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _lock(descriptor: int, what: str) -> None:
    try:
        lock_process(descriptor)
    except BlockingIOError as error:
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise InUseError(_busy(what, holder)) from error
    except OSError as error:
        logger.warning("%s cannot be locked here (%s). See to it that no other process uses it.", what, error)


def _busy(what: str, holder: str) -> str:
    return f"{what} is in use by {holder}. Wait until it has ended, or end it; two would spoil each other's files."


def _give_back(path: Path, descriptor: int) -> None:
    with _guard:
        if moves_open_files():
            with contextlib.suppress(OSError):
                if _stands_at(descriptor, path):  # before the lock ends, so that nobody else's file is removed
                    os.unlink(path)
            os.close(descriptor)
        else:  # nor can one be removed that somebody else has opened meanwhile
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(path)
        _held.discard(path)
