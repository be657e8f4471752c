"""Reading and writing of whole files: regular files only, and several files all or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vispeft.errors import FileError
from vispeft.storage.system import lock_opened, moves_open_files, open_file

__all__ = ["earlier", "read_regular", "regular_size", "settle", "write_atomically"]


def read_regular(path: Path, at_most: int | None = None) -> bytes:
    """Read a file, but no pipe, device or folder, which may never end.

    Args:
        path: The file; links are followed.
        at_most: Largest size in bytes; None for any size.

    Returns:
        Its content.

    Raises:
        FileError: If it is no regular file, or too large.
        OSError: If it cannot be read.
    """
    size = regular_size(path)
    if at_most is not None and size > at_most:
        raise FileError(f"{path} has {size:,} bytes; at most {at_most:,} are read. Is it the right file?")
    try:
        return path.read_bytes()
    except MemoryError as error:
        raise FileError(f"{path} has {size:,} bytes, more than there is memory for.") from error


def regular_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Args:
        path: The file; links are followed.

    Raises:
        FileError: If it is no regular file.
        OSError: If there is none.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is a {_kind(found.st_mode)}; a regular file is needed there.")
    return found.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "device")


def write_atomically(files: Mapping[Path, bytes | Iterable[bytes]], without: Iterable[Path] = ()) -> None:
    """Write several files, all or none.

    All contents are written beside their targets (``.NAME.part``) before the first one is renamed, and the earlier
    files are kept (``.NAME.earlier``) until the last one is renamed. After a kill in between, `read_adapter` finds the
    earlier files, and the next call for the same files undoes or finishes the interrupted one.

    Args:
        files: Contents by path, each whole or in parts, renamed in this order. With the last one the new files count.
        without: Files beside them that do not exist afterwards.

    Raises:
        FileError: If they cannot be written, for example because the disk is full.
    """
    gone, staged, kept = list(without), _Staged(), []
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            staged.add(path, content)
        settle([*gone, *files])  # behind the locks of the new files, or it would undo a save that is under way
        for path in files:
            if path.exists():
                _keep(path)
                kept.append(path)
        staged.rename()
    except BaseException as error:
        if staged.renamed != files.keys():
            staged.remove(kept)
            for path in kept:  # the last one is last again: until then, `settle` undoes the rest
                with contextlib.suppress(OSError):
                    _bring_back(path)
        if not isinstance(error, OSError):
            raise
        raise FileError(
            f"{', '.join(str(path) for path in files)} could not be written ({error.strerror or error}). The earlier "
            "files are unchanged; free some space or choose another directory."
        ) from error
    else:  # the new files count, and an interrupt leaves old ones to the next call
        for path in (*gone, *map(earlier, reversed(kept))):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    finally:
        staged.close()


def earlier(path: Path) -> Path:
    """Return the name of an earlier file while its path is being overwritten.

    Args:
        path: The path.
    """
    return path.with_name(f".{path.name}.earlier")


class _Staged:
    """New files beside their targets.

    A file is locked from its opening to its renaming, so that another process that writes the same one waits, and a
    leftover of a process that was killed is taken over. Where open files cannot be renamed, the lock ends before the
    first renaming.
    """

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.handles: list[int] = []
        self.renamed: set[Path] = set()

    def add(self, path: Path, content: bytes | Iterable[bytes]) -> None:
        """Write the content of one target."""
        handle = _open_part(_part(path))
        self.files.append(path)
        self.handles.append(handle)
        os.ftruncate(handle, 0)
        with open(handle, "wb", closefd=False) as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
        os.fsync(handle)
        if hasattr(os, "fchmod"):  # not on Windows before Python 3.13
            os.fchmod(handle, 0o644)

    def rename(self) -> None:
        """Put all files at their places."""
        if not moves_open_files():
            self.close()
        for path in self.files:
            os.replace(_part(path), path)
            self.renamed.add(path)

    def remove(self, kept: Collection[Path]) -> None:
        """Remove the new files, also from places that were empty before; `kept` names the other places."""
        if not moves_open_files():
            self.close()
        for path in self.files:
            with contextlib.suppress(OSError):
                os.unlink(path if path in self.renamed and path not in kept else _part(path))

    def close(self) -> None:
        """Release the locks."""
        while self.handles:
            with contextlib.suppress(OSError):
                os.close(self.handles.pop())


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _open_part(path: Path) -> int:
    """Open a file that is being written, new or left over, after any other process that writes it."""
    while True:
        handle = open_file(path)
        try:
            with contextlib.suppress(OSError):  # some network drives have no locks
                lock_opened(handle)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the other process renamed it meanwhile


def settle(paths: Sequence[Path]) -> None:
    """Undo or finish a call of `write_atomically` that was killed between its renames.

    Until the last file is renamed, its earlier file is the file itself, or a copy of it: then the call is undone.

    Args:
        paths: The files, in the order in which they are renamed.
    """
    last = paths[-1]
    undone = earlier(last).exists() and last.exists() and _equal(earlier(last), last)
    for path in paths:
        if _copy(path).exists():
            _copy(path).unlink()
        if not earlier(path).exists():
            continue
        if undone or not last.exists():
            _bring_back(path)
        else:
            earlier(path).unlink(missing_ok=True)


def _equal(first: Path, second: Path) -> bool:
    return first.samefile(second) or first.read_bytes() == second.read_bytes()


def _keep(path: Path) -> None:
    """Give a file the name of an earlier one as well, or copy it where a file cannot have two names."""
    try:
        os.link(path, earlier(path))
        return
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network drives
        copy = _copy(path)
    try:
        shutil.copyfile(path, copy)
        os.replace(copy, earlier(path))  # complete, or not there
    except BaseException:
        copy.unlink(missing_ok=True)
        raise


def _copy(path: Path) -> Path:
    return path.with_name(f".{path.name}.copy")


def _bring_back(path: Path) -> None:
    os.replace(earlier(path), path)
    earlier(path).unlink(missing_ok=True)  # renaming onto a hard link of the same file leaves both
