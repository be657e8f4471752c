"""Folders of vispeft's cache that are made once, from files that a user has fetched."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from vispeft.errors import FileError
from vispeft.storage.locks import clear, hold
from vispeft.storage.places import cache_folder

__all__ = ["make_once"]

_PART = ".making-"
"""Begin of the name of a folder until it is complete."""
_LOCK = ".lock"


def make_once(name: str, parts: Iterable[bytes], write: Callable[[Path], None], room: str) -> Path:
    """Fill a folder of the cache, unless this was done before from the same files.

    A second process waits for one that fills a folder of the same name. What a killed process left is removed.

    Args:
        name: Name of the folder inside the cache, which gets a folder for each content of the files.
        parts: Everything the result depends on: a version, and contents or digests of files.
        write: Function that fills a given folder; an error leaves nothing behind.
        room: Space it needs, for messages, such as ``40 MB``.

    Returns:
        The folder.

    Raises:
        FileError: If it cannot be written.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    home = cache_folder() / name / digest.hexdigest()[:16]
    lock = home.parent / _LOCK
    if home.is_dir():
        _tidy(home.parent, lock)
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with hold(lock, f"The folder {home.parent} (in VISPEFT_CACHE)", wait=True):
            _remove_parts(home.parent)
            if not home.is_dir():  # otherwise the process before has made the same
                _make(home, write)
    except OSError as error:
        raise FileError(
            f"The images cannot be written to {home} ({error.strerror or error}). Set VISPEFT_CACHE to a folder with "
            f"room for {room}."
        ) from error
    return home


def _make(home: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder, and give it its name once it is complete; the caller holds the lock."""
    part = home.with_name(f"{_PART}{home.name}")
    part.mkdir()
    try:
        write(part)
        os.replace(part, home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tidy(folder: Path, lock: Path) -> None:
    """Remove what killed processes left, unless a living one is at work there."""
    if any(folder.glob(f"{_PART}*")):
        with contextlib.suppress(FileError), hold(lock, str(folder)):
            _remove_parts(folder)
    clear(lock)


def _remove_parts(folder: Path) -> None:
    """Remove folders that were not completed; the caller holds the lock, so nobody is filling one."""
    for part in folder.glob(f"{_PART}*"):
        shutil.rmtree(part, ignore_errors=True)
