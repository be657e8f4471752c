"""Files of a folder tree: the images that are read, and one line about everything that is left out.

Every reader of folders goes through a tree with these functions, so that all of them follow links alike, skip the same
hidden files, and take the same endings for images.
"""

from __future__ import annotations

import bisect
import errno
import os
import stat
from collections import Counter, defaultdict
from pathlib import Path
from typing import BinaryIO, Literal

from vispeft.errors import counted, printable

__all__ = ["EXTENSIONS", "LeftOut", "is_hidden", "is_image", "list_folder", "open_regular", "walk"]

EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""Suffixes of image files; browsers on Windows save JPEG as ``.jfif``."""

Reason = Literal[
    "ending", "mask", "label", "loose", "folder", "again", "special", "closed", "link", "member", "hidden", "other"
]
"""Why something is left out; a key of `REASONS`."""

REASONS: dict[Reason, tuple[str, str, str]] = {
    "ending": ("file", "files", f"with another ending than {', '.join(EXTENSIONS)}"),
    "mask": ("file", "files", "with another ending than mask_suffix among the masks"),
    "label": ("file", "files", "with another ending than those of the labels in its folder"),
    "loose": ("image", "images", "outside of the folders that are read"),
    "folder": ("folder", "folders", "beside those that are read"),
    "again": ("link back, or", "links back, or", "to a folder that is read already"),
    "special": ("pipe or device", "pipes or devices", ""),
    "closed": ("folder", "folders", "that cannot be opened"),
    "link": ("link or device", "links or devices", "in shards"),
    "member": ("member", "members", "of shards with other endings than images and labels"),
    "hidden": ("hidden entry", "hidden entries", ""),
    "other": ("entry", "entries", "beside the folders that are read, and no image"),
}
"""Singular, plural and description of what is left out, by the reason, in the order of the line."""

HARMLESS: tuple[Reason, ...] = ("member", "hidden", "other")
"""Reasons that hardly hide an image that was meant."""
BY_ENDING: tuple[Reason, ...] = ("ending", "mask", "label", "member")
"""Reasons with which files are counted by their ending."""

NAMED = 5
"""Largest number of places named for each reason."""


class LeftOut:
    """Entries of a folder that a reader leaves out, by the reason."""

    def __init__(self, root: str | Path) -> None:
        """Start without entries.

        Args:
            root: Folder that names in the line are relative to.
        """
        self.root = str(root)
        self._counts: Counter[Reason] = Counter()
        self._named: dict[Reason, list[str]] = defaultdict(list)
        self._endings: dict[Reason, Counter[str]] = defaultdict(Counter)

    def __bool__(self) -> bool:
        """Whether anything is left out."""
        return bool(self._counts)

    @property
    def level(self) -> Literal["warning", "fact"]:
        """``fact`` if nothing is left out that may have been meant, else ``warning``."""
        return "fact" if all(reason in HARMLESS for reason in self._counts) else "warning"

    def add(self, reason: Reason, path: str, note: str = "") -> None:
        """Add an entry.

        Args:
            reason: Why it is left out.
            path: The entry, below the root.
            note: A remark behind its name.
        """
        name = path.removeprefix(self.root).lstrip(os.sep) or path
        self._counts[reason] += 1
        self._endings[reason][os.path.splitext(name)[1].lower() or "without ending"] += 1
        # The first few by name, as there may be millions.
        bisect.insort(self._named[reason], f"{name} ({note})" if note else name)
        del self._named[reason][NAMED:]

    def line(self) -> str:
        """Describe everything that is left out in one line, without a final full stop."""
        return f"Left out: {'; '.join(self._part(reason) for reason in REASONS if self._counts[reason])}"

    def _part(self, reason: Reason) -> str:
        noun, plural, text = REASONS[reason]
        count, names = self._counts[reason], ", ".join(map(printable, self._named[reason]))
        more = f" and {count - NAMED:,} more" if count > NAMED else ""
        endings = ""
        if reason in BY_ENDING:
            common = self._endings[reason].most_common(NAMED)
            endings = ", ".join(f"{number:,} {printable(ending)}" for ending, number in common) + ": "
        return f"{counted(count, noun, plural)} {text}".rstrip() + f" ({endings}{names}{more})"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, unless it is a pipe, a device or a folder, which might block or never end.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    # Without this flag, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def is_image(path: str) -> bool:
    """Whether the ending of a path is that of an image.

    Args:
        path: The path.
    """
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems leave among images.

    Names with a dot in front (``.ipynb_checkpoints``, ``._1.jpg``) and ``__MACOSX``.

    Args:
        name: Its name, without the folder.
    """
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def list_folder(folder: str | Path, left: LeftOut) -> tuple[dict[str, str], list[str]]:
    """List one folder.

    Links to folders count as folders, except those that lead to the folder itself or to one that contains it.

    Args:
        folder: The folder.
        left: Receives what is left out.

    Returns:
        Folders by name, and files; both sorted by name. Links to files that are missing count as files.
    """
    real, linked, files = _scan(str(folder), left)
    above = _above(str(folder))
    for path in linked:
        if _identity(path) in above:
            left.add("again", path)
        else:
            real.append(path)
    return {os.path.basename(path): path for path in sorted(real)}, sorted(files)


def walk(folder: str | Path, left: LeftOut) -> list[str]:
    """List the files of a folder and of all folders in it.

    Links are followed. Each folder is read once, under its own name where it lies in the tree itself; thus links that
    lead back end.

    Args:
        folder: The folder.
        left: Receives what is left out.

    Returns:
        The files, unsorted. Links to files that are missing are among them.
    """
    seen = _above(str(folder)) - {_identity(str(folder))}
    files: list[str] = []
    real, linked = [str(folder)], []
    while real or linked:
        # Folders of the tree itself come before those that links lead to.
        place = real.pop() if real else linked.pop(0)
        identity = _identity(place)
        if identity is None or identity in seen:
            left.add("again" if identity else "closed", place)
            continue
        seen.add(identity)
        found, links, inside = _scan(place, left)
        real += found
        linked += links
        files += inside
    return files


def _scan(folder: str, left: LeftOut) -> tuple[list[str], list[str], list[str]]:
    """Return folders, links to folders, and files."""
    try:
        with os.scandir(folder) as opened:
            entries = list(opened)
    except OSError:
        left.add("closed", folder)
        return [], [], []
    real: list[str] = []
    linked: list[str] = []
    files: list[str] = []
    for entry in entries:
        if is_hidden(entry.name):
            left.add("hidden", entry.path)
        elif entry.is_symlink():
            _sort_link(entry.path, linked, files, left)
        elif entry.is_dir(follow_symlinks=False):
            real.append(entry.path)
        elif entry.is_file(follow_symlinks=False):
            files.append(entry.path)
        else:
            left.add("special", entry.path)
    return real, sorted(linked), files


def _sort_link(path: str, linked: list[str], files: list[str], left: LeftOut) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        files.append(path)  # it leads nowhere, and is reported as a missing file
        return
    if stat.S_ISDIR(mode):
        linked.append(path)
    elif stat.S_ISREG(mode):
        files.append(path)
    else:
        left.add("special", path)


def _identity(folder: str) -> tuple[int, int] | None:
    """Identify a folder whatever path leads to it; None if it cannot be asked."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _above(folder: str) -> set[tuple[int, int] | None]:
    """Identify a folder and all that contain it, with the links of its path and without."""
    place = Path(os.path.realpath(folder))
    path = Path(os.path.abspath(folder))
    return {_identity(str(one)) for one in (place, *place.parents, path, *path.parents)} - {None}
