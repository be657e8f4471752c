"""Changing a zoo: one process at a time, and an adapter is listed only once all of its files are there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vispeft.errors import FileError, UnknownNameError
from vispeft.storage.locks import hold
from vispeft.storage.places import check_folder
from vispeft.zoo.index import ZooEntry, check_files, read_index, write_index

__all__ = ["held_zoo", "put_in_place", "remove_adapter", "staged"]

_LOCK, _STAGE = ".lock", ".adding"


@contextlib.contextmanager
def held_zoo(zoo: Path) -> Iterator[None]:
    """Keep other processes from changing a zoo while a block of code runs.

    Args:
        zoo: Its folder; made if missing.

    Raises:
        FileError: If it cannot be written.
    """
    check_folder(zoo, "The zoo")
    zoo.mkdir(parents=True, exist_ok=True)
    with hold(zoo / _LOCK, f"The zoo {zoo}", wait=True):
        yield


@contextlib.contextmanager
def staged(zoo: Path, name: str) -> Iterator[Path]:
    """Make an empty folder in which an adapter is put together, and remove it at the end; the caller holds the zoo.

    Args:
        zoo: The zoo's folder.
        name: The adapter, which is also the folder's name.

    Yields:
        The folder, on the disk of the zoo.

    Raises:
        FileError: If it cannot be made.
    """
    above = zoo / _STAGE
    try:
        if above.exists():  # of a process that was killed
            shutil.rmtree(above)
        (above / name).mkdir(parents=True)
    except OSError as error:
        raise FileError(f"{above} could not be emptied ({error.strerror or error}). Remove it.") from error
    try:
        yield above / name
    finally:
        shutil.rmtree(above, ignore_errors=True)


def put_in_place(zoo: Path, folder: Path, entry: ZooEntry) -> None:
    """Move a complete folder into a zoo and list it; the caller holds the zoo.

    The index is written last: killed before, the adapter is not listed, and the next call removes its folder.

    Args:
        zoo: The zoo's folder.
        folder: The folder of all files, on the same disk, named as the adapter.
        entry: The adapter.

    Raises:
        FileError: If its files are not those of the entry, or something cannot be written.
    """
    check_files(folder.parent, entry)
    listed, place = read_index(zoo), zoo / entry.name
    if entry.name in listed and listed[entry.name].same_content(entry):
        with contextlib.suppress(FileError):
            check_files(zoo, listed[entry.name])
            return
    try:
        if entry.name in listed:  # of the same content once, and damaged since
            write_index(zoo, {name: other for name, other in listed.items() if name != entry.name})
        shutil.rmtree(place, ignore_errors=True)
        os.replace(folder, place)
    except OSError as error:
        raise FileError(f"zoo:{entry.name} could not be put into {zoo} ({error.strerror or error}).") from error
    write_index(zoo, {**listed, entry.name: entry})


def remove_adapter(zoo: Path, name: str) -> None:
    """Remove an adapter from a zoo.

    Args:
        zoo: The zoo's folder.
        name: The adapter.

    Raises:
        UnknownNameError: If the zoo lists no such adapter.
    """
    with held_zoo(zoo):
        listed = read_index(zoo)
        if name not in listed:
            raise UnknownNameError("adapter of this zoo", name, listed, f"The zoo is {zoo}.")
        write_index(zoo, {other: entry for other, entry in listed.items() if other != name})
        shutil.rmtree(zoo / name, ignore_errors=True)
