"""What is found when an image is looked at, and a store of it, so that no image is looked at twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from PIL import ExifTags, Image

from vispeft.data.images import UNREADABLE, to_rgb, why

__all__ = ["FactStore", "Facts", "ImageFacts", "cache_folder", "look_at"]

logger = logging.getLogger(__name__)

Key = tuple[str, int, int, str]
"""Path, bytes, time of the last change in nanoseconds, and how thoroughly the image was looked at."""

QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of Exif 2.3 that exchange width and height."""

SETTLED = 2.0
"""Seconds after its last change from which on a file's time tells one content from another."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known about one image."""

    problem: str = ""
    """Why it cannot be used: ``missing``, ``empty``, ``truncated`` or ``broken``; empty when it can."""
    reason: str = ""
    """What the reader said about the problem."""
    width: int = 0
    """Pixels."""
    height: int = 0
    """Pixels."""
    mode: str = ""
    """Pillow's name for the kind of pixels, such as RGB, L, I;16 or CMYK."""
    frames: int = 1
    """Images in the file."""
    digest: str = ""
    """Hash of the pixels; empty when only the header was read."""
    turned: bool = False
    """Whether its metadata turn it by a quarter, so that width and height change places when it is read."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image that is read."""
        return (self.height, self.width) if self.turned else (self.width, self.height)


Facts = TypeVar("Facts", bound=ImageFacts)


def look_at(file: BinaryIO, full: bool) -> ImageFacts:
    """Look at one image.

    Args:
        file: Its open file.
        full: Decode and hash the pixels; otherwise only the header is read.
    """
    if not file.read(1):
        return ImageFacts(problem="empty")
    file.seek(0)
    try:
        with Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)
            header = ImageFacts(width=image.width, height=image.height, mode=image.mode, frames=frames)
            if full:
                return _decoded(image, header)
            # Pillow reads the whole of a PNG to find these metadata, which stand behind its pixels.
            return header if image.format == "PNG" else replace(header, turned=_turn(image) in QUARTER_TURNS)
    except UNREADABLE as error:
        return ImageFacts(problem="broken", reason=why(error))


def _decoded(image: Image.Image, header: ImageFacts) -> ImageFacts:
    try:
        image.load()
    except UNREADABLE as error:
        # The header was whole, so what is missing are pixels.
        return replace(header, problem="truncated", reason=why(error))
    to_rgb(image, image.format)
    pixels = hashlib.blake2b(image.tobytes(), digest_size=16)
    # The way an image is turned belongs to it: equal pixels that are turned differently are two images.
    turned = _turn(image)
    pixels.update(f"{image.mode} {image.size} {turned}".encode())
    if image.mode == "P":  # equal indices are other colours under another palette
        pixels.update(bytes(image.getpalette("RGBA") or ()))
    return replace(header, digest=pixels.hexdigest(), turned=turned in QUARTER_TURNS)


def _turn(image: Image.Image) -> int:
    """Give the number by which metadata say how an image is turned; 1 is upright."""
    return image.getexif().get(ExifTags.Base.Orientation) or 1


def cache_folder() -> Path:
    """Give the folder for what can be computed again: ``VISPEFT_CACHE``, or ``vispeft`` in the user's cache folder."""
    chosen = os.environ.get("VISPEFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vispeft"


VERSION = 2
"""Of the stored facts: raised when one of them is found in another way, so that older ones are not believed."""


class FactStore(Generic[Facts]):
    """Facts on disk, by path, size and time of the last change.

    It only saves time: where it cannot be read or written, everything is looked at again.
    """

    def __init__(self, kind: type[Facts]) -> None:
        """Remember where the store is.

        Args:
            kind: What is kept.
        """
        self.kind = kind
        self.file = cache_folder() / f"images-{VERSION}.sqlite"

    def get(self, keys: Iterable[Key]) -> dict[Key, Facts]:
        """Give what is known.

        Args:
            keys: The files in question.
        """
        found: dict[Key, Facts] = {}
        try:
            if self.file.is_file():
                with closing(self._open()) as store:
                    for key in keys:
                        row = store.execute(_SELECT, key).fetchone()
                        if row is not None:
                            found[key] = self.kind(**json.loads(row[0]))
        except (OSError, sqlite3.Error, ValueError, TypeError) as error:
            logger.debug("The store of image facts %s cannot be read (%s).", self.file, error)
        return found

    def put(self, facts: Mapping[Key, Facts]) -> None:
        """Remember what was found.

        Args:
            facts: Facts by file. Files changed in the last seconds are left out, because their next change could fall
                into the same tick of the clock.
        """
        latest = (time.time() - SETTLED) * 1e9
        rows = [(*key, json.dumps(asdict(value))) for key, value in facts.items() if key[2] < latest]
        if not rows:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as store, store:
                store.execute(_TABLE)
                store.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            logger.debug("The store of image facts %s cannot be written (%s).", self.file, error)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=5)


_TABLE = (
    "CREATE TABLE IF NOT EXISTS images (path TEXT, bytes INTEGER, changed INTEGER, level TEXT, facts TEXT, "
    "PRIMARY KEY (path, level))"
)
_SELECT = "SELECT facts FROM images WHERE path = ? AND bytes = ? AND changed = ? AND level = ?"
