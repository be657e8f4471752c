"""Facts about images, and a store of them, so that no image is inspected twice."""

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

from vispeft.data.formats import open_image
from vispeft.data.images import UNREADABLE, to_rgb, why

__all__ = ["FactStore", "Facts", "ImageFacts", "cache_folder", "look_at"]

logger = logging.getLogger(__name__)

Key = tuple[str, int, int, str]
"""Path, size in bytes, modification time in nanoseconds, and level of inspection."""

QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of Exif 2.3 that exchange width and height."""

SETTLED = 2.0
"""Seconds after a modification from which the file's modification time identifies its content."""


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image."""

    problem: str = ""
    """Why it is unusable: ``missing``, ``empty``, ``truncated`` or ``broken``; empty if it is usable."""
    reason: str = ""
    """The reader's message about the problem."""
    width: int = 0
    """Pixels."""
    height: int = 0
    """Pixels."""
    mode: str = ""
    """Pillow's pixel mode, such as RGB, L, I;16 or CMYK."""
    frames: int = 1
    """Number of images in the file."""
    digest: str = ""
    """Hash of the pixels; empty if only the header was read."""
    turned: bool = False
    """Whether its metadata rotate it by 90 degrees, which swaps width and height on reading."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image as read."""
        return (self.height, self.width) if self.turned else (self.width, self.height)


Facts = TypeVar("Facts", bound=ImageFacts)


def look_at(file: BinaryIO, full: bool) -> ImageFacts:
    """Inspect one image.

    Args:
        file: Its open file.
        full: Whether to decode and hash the pixels, instead of reading only the header.
    """
    if not file.read(1):
        return ImageFacts(problem="empty")
    file.seek(0)
    try:
        with open_image(file) as image:
            frames = getattr(image, "n_frames", 1)
            header = ImageFacts(width=image.width, height=image.height, mode=image.mode, frames=frames)
            if full:
                return _decoded(image, header)
            # Pillow reads a whole PNG to find these metadata, which may follow the pixels.
            return header if image.format == "PNG" else replace(header, turned=_turn(image) in QUARTER_TURNS)
    except UNREADABLE as error:
        return ImageFacts(problem="broken", reason=why(error))


def _decoded(image: Image.Image, header: ImageFacts) -> ImageFacts:
    try:
        image.load()
    except UNREADABLE as error:
        # The header was complete, so pixels are missing.
        return replace(header, problem="truncated", reason=why(error))
    to_rgb(image, image.format)
    pixels = hashlib.blake2b(image.tobytes(), digest_size=16)
    # Orientation is part of the image: equal pixels with different orientations are two images.
    turned = _turn(image)
    pixels.update(f"{image.mode} {image.size} {turned}".encode())
    if image.mode == "P":  # equal indices mean different colours under different palettes
        pixels.update(bytes(image.getpalette("RGBA") or ()))
    return replace(header, digest=pixels.hexdigest(), turned=turned in QUARTER_TURNS)


def _turn(image: Image.Image) -> int:
    """Return the Exif orientation; 1 is upright."""
    return image.getexif().get(ExifTags.Base.Orientation) or 1


def cache_folder() -> Path:
    """Return the cache folder: ``VISPEFT_CACHE``, or ``vispeft`` in the user's cache folder."""
    chosen = os.environ.get("VISPEFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vispeft"


VERSION = 2
"""Version of the stored facts, incremented whenever one is determined differently, to discard older ones."""


class FactStore(Generic[Facts]):
    """Facts on disk, by path, size and modification time.

    It only saves time: if it cannot be read or written, everything is inspected again.
    """

    def __init__(self, kind: type[Facts]) -> None:
        """Locate the store.

        Args:
            kind: Class of the stored facts.
        """
        self.kind = kind
        self.file = cache_folder() / f"images-{VERSION}.sqlite"

    def get(self, keys: Iterable[Key]) -> dict[Key, Facts]:
        """Return the known facts.

        Args:
            keys: Keys of the files.
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
        """Store facts.

        Args:
            facts: Facts by file. Files modified in the last seconds are left out, as their next modification could have
            the same time stamp.
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
