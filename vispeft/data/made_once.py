"""Folders of vispeft's cache that are made once, from files that a user has fetched."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from vispeft.data.facts import cache_folder
from vispeft.errors import FileError

__all__ = ["make_once"]


def make_once(name: str, parts: Iterable[bytes], write: Callable[[Path], None], room: str) -> Path:
    """Fill a folder of the cache, unless this was done before from the same files.

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
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=home.parent, prefix=".making-"))
        try:
            write(scratch)
            # The folder gets its name only once it is complete.
            os.replace(scratch, home)
        except OSError:
            if not home.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FileError(
            f"The images cannot be written to {home} ({error.strerror or error}). Set VISPEFT_CACHE to a folder with "
            f"room for {room}."
        ) from error
    return home
