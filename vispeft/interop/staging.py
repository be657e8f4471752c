"""Files that appear whole or not at all, and that a killed process leaves neither half nor beside their place."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vispeft.errors import ConfigError, FileError
from vispeft.storage.locks import InUseError, hold
from vispeft.storage.places import check_folder

__all__ = ["check_free", "staged"]

_MOVING = ".moving"
"""File of the temporary folder that lists its files once they are complete, written before the first one is moved."""


@contextmanager
def staged(path: Path, *others: Path) -> Iterator[Path]:
    """Write a file, and files beside it, in a temporary folder and move them into place only on success.

    Leftovers of a process that was killed while it wrote the same files are removed first: its temporary folder, and
    those files that it had moved, unless it had moved all of them.

    Args:
        path: The file.
        others: Files known to be written beside it, which must not exist either.

    Yields:
        A path of the same name in a temporary folder, all of whose files are moved.

    Raises:
        ConfigError: If one of the files exists.
        InUseError: If another process writes the same file.
        FileError: If the files cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _undo(path)
            _refuse_existing(path, *others)
            folder = _folder(path)
            folder.mkdir()
            try:
                yield folder / path.name
                _move(folder, path)
            finally:
                _undo(path)
    except OSError as error:
        raise _unwritten(path, error.strerror or str(error)) from error


def check_free(path: Path, *others: Path) -> None:
    """Refuse files that exist, before any work is done for them.

    Leftovers of a process that was killed while it wrote the same files do not count, and are removed.

    Args:
        path: The file.
        others: Files that are written beside it.

    Raises:
        ConfigError: If one of them exists.
        InUseError: If another process writes the same file.
        FileError: If there can be no such file, for example because the name is too long, or a file stands where its
            folder should.
    """
    try:
        left = _folder(path).exists() or _lock(path).exists()
    except OSError as error:
        raise _unwritten(path, error.strerror or str(error)) from error
    if left:
        with _locked(path):
            _undo(path)
    check_folder(path.parent, "The folder")
    _refuse_existing(path, *others)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(_lock(path), f"The file {path}"))
        except InUseError:
            raise
        except FileError as error:
            raise _unwritten(path, getattr(error.__cause__, "strerror", None) or str(error)) from error
        yield


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _unwritten(path: Path, reason: str) -> FileError:
    return FileError(f"{path} could not be written ({reason}). Free some space, or choose another place.")


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already and is not overwritten. Choose another name.")


def _move(folder: Path, path: Path) -> None:
    """Put all files of a folder at their places, the named one last."""
    written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    for file in written:
        _refuse_existing(path.with_name(file.name))
        with file.open("rb+") as content:
            os.fsync(content.fileno())
    with (folder / _MOVING).open("w", encoding="utf-8") as note:
        json.dump({file.name: _identity(file) for file in written}, note)
        note.flush()
        os.fsync(note.fileno())
    for file in written:
        file.replace(path.with_name(file.name))


def _identity(file: Path) -> list[int]:
    """Return what tells a file from any other, also after it was moved."""
    found = file.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _undo(path: Path) -> None:
    """Remove what a killed process left, and take back what it had moved, unless nothing was left to move."""
    folder = _folder(path)
    listed: dict[str, list[int]] = {}
    with contextlib.suppress(OSError, ValueError):  # killed before the list was complete: nothing was moved
        listed = json.loads((folder / _MOVING).read_text(encoding="utf-8"))
    if any((folder / name).exists() for name in listed):
        for name, identity in listed.items():
            place = path.with_name(name)
            if not (folder / name).exists() and place.exists() and _identity(place) == identity:
                place.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    # Earlier versions, and other writers, gave their temporary files random names.
    earlier = re.compile(re.escape(f".{path.name}.") + r"(part|earlier|[a-z0-9_]{8})")
    for left in path.parent.iterdir():
        if earlier.fullmatch(left.name):
            if left.is_symlink():
                continue
            if not left.is_dir():
                left.unlink(missing_ok=True)
            elif all(part.is_file() and part.name.startswith(path.name) for part in left.iterdir()):
                shutil.rmtree(left, ignore_errors=True)  # else it is somebody's folder with a name of eight letters
