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
from vispeft.zoo.index import FILES, ZooEntry, check_files, read_index, write_index

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

    The index is written last: killed before, the adapter is not listed, and the next call replaces its folder.

    Args:
        zoo: The zoo's folder.
        folder: The folder of all files, on the same disk, named as the adapter, in a folder that the caller removes.
        entry: The adapter.

    Raises:
        FileError: If its files are not those of the entry, its place is taken by what is no adapter of this zoo, or
            something cannot be written.
    """
    check_files(folder.parent, entry)
    listed, place = read_index(zoo), zoo / entry.name
    if entry.name in listed and listed[entry.name].same_content(entry):
        with contextlib.suppress(FileError):
            check_files(zoo, listed[entry.name])
            return
    if entry.name not in listed:
        _check_free(place)
    try:
        if entry.name in listed:  # of the same content once, and damaged since
            write_index(zoo, {name: other for name, other in listed.items() if name != entry.name})
        _set_aside(place, folder.parent)
        os.replace(folder, place)
    except OSError as error:
        raise FileError(f"zoo:{entry.name} could not be put into {zoo} ({error.strerror or error}).") from error
    write_index(zoo, {**listed, entry.name: entry})


def _check_free(place: Path) -> None:
    """Refuse a place that is not empty, but for what `put_in_place` leaves when it is killed before the index.

    Args:
        place: Where an adapter would go that is not listed.

    Raises:
        FileError: If something else is there, such as a user's runs.
    """
    if not os.path.lexists(place):
        return
    try:
        if place.is_symlink():
            found, ours = ["a link"], False
        else:
            found = sorted(path.name for path in place.iterdir())
            ours = all(name in FILES and (place / name).is_file() for name in found)
    except OSError as error:
        found, ours = [error.strerror or str(error)], False
    if not ours:
        raise FileError(
            f"{place} exists and is no adapter of this zoo (found {', '.join(found[:4])}), and it is not overwritten. "
            "Choose another folder for the zoo, or move it away."
        )


def _set_aside(place: Path, above: Path) -> None:
    """Move the folder of an adapter, if there is one, to where it is removed; at once, so that no part of it stays."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(place, above / ".before")  # no adapter's name begins with a dot


def remove_adapter(zoo: Path, name: str) -> None:
    """Remove an adapter from a zoo.

    Args:
        zoo: The zoo's folder.
        name: The adapter.

    Raises:
        UnknownNameError: If the zoo lists no such adapter.
        FileError: If its folder cannot be removed.
    """
    with held_zoo(zoo), staged(zoo, name) as folder:
        listed = read_index(zoo)
        if name not in listed:
            raise UnknownNameError("adapter of this zoo", name, listed, f"The zoo is {zoo}.")
        write_index(zoo, {other: entry for other, entry in listed.items() if other != name})
        try:
            _set_aside(zoo / name, folder.parent)
        except OSError as error:
            raise FileError(f"{zoo / name} is listed no more, and could not be removed ({error.strerror}).") from error
