"""Facts about images, and a store of them, so that no image is inspected twice."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
from PIL.ImageFile import ImageFile

from vispeft.data.formats import PixelError, StoredTiff, open_image, too_large
from vispeft.data.images import DEEP, GREY, PLAIN, UNREADABLE, Reading, why
from vispeft.data.pixels import (
    QUARTER_TURNS,
    exif_orientation,
    grey_scale,
    is_wide,
    netpbm_white,
    stored_rows,
    stored_size,
)
from vispeft.storage.places import cache_folder

__all__ = ["FactStore", "Facts", "ImageFacts", "header_facts", "limited", "look_at"]

logger = logging.getLogger(__name__)

Key = tuple[str, int, int, str]
"""Path, size in bytes, modification time in nanoseconds, and level of inspection."""

SETTLED = 2.0
"""Seconds after a modification from which the file's modification time identifies its content."""


LARGE = 2**24
"""Pixels above which images are decoded one at a time, as the threads of a check would need too much memory."""
_ALONE = threading.Lock()


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image."""

    problem: str = ""
    """Why it is unusable: ``missing``, ``empty``, ``truncated``, ``broken``, ``unsupported`` or ``too-large``; empty if
    it is usable."""
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
    orientation: int = 1
    """Orientation in its metadata, 1 to 8 (Exif 2.3); 1 is upright."""
    dropped: int = 0
    """Number of bands in the file that are not read."""
    transparent: bool = False
    """Whether some of its pixels are transparent; whether they may be if only the header was read."""
    deep: bool = False
    """Whether its values have more than 8 bits."""
    white: int = 0
    """Largest value that a deep image could hold; 0 if it is not known."""
    lowest: float = 0
    """Smallest value of a deep image; 0 if only the header was read."""
    highest: float = 0
    """Largest value of a deep image; 0 if only the header was read."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image as read."""
        turned = self.orientation in QUARTER_TURNS
        return (self.height, self.width) if turned else (self.width, self.height)


Facts = TypeVar("Facts", bound=ImageFacts)


def look_at(file: BinaryIO, full: bool, reading: Reading = PLAIN) -> ImageFacts:
    """Inspect one image.

    Args:
        file: Its open file.
        full: Whether to decode and hash the pixels, instead of reading only the header.
        reading: How it will be read.
    """
    file.seek(0)
    if not file.read(1):
        return ImageFacts(problem="empty")
    try:
        with open_image(file, reading.max_pixels) as image:
            header = ImageFacts(**header_facts(image), transparent=image.has_transparency_data)
            refuse_unknown(header, image, reading)
            return _decoded(file, image, header) if full else header
    except PixelError as error:
        width, height = error.size
        return ImageFacts(problem=error.problem, reason=why(error), width=width, height=height)
    except UNREADABLE as error:
        return ImageFacts(problem="broken", reason=why(error))


def limited(known: Facts, reading: Reading) -> Facts:
    """Give an image above the limit on pixels the problem that it has.

    Args:
        known: Its facts.
        reading: The limit.
    """
    if known.problem or known.width * known.height <= reading.max_pixels:
        return known
    error = too_large((known.width, known.height), reading.max_pixels)
    return replace(known, problem=error.problem, reason=str(error))


def header_facts(image: ImageFile) -> dict[str, Any]:
    """Read what the header and the metadata of an image say.

    Args:
        image: An opened image.

    Returns:
        Values of the fields of `ImageFacts`.
    """
    width, height = stored_size(image)
    known = {"orientation": exif_orientation(image), "mode": image.mode, "deep": False, "white": 0, "dropped": 0}
    if image.format == "PPM":
        known["white"] = netpbm_white(image)
    elif image.mode in DEEP:
        known["white"] = grey_scale(image).white
    elif is_wide(image):
        known["white"] = 65_535
    known["deep"] = image.mode in DEEP or known["white"] > 255
    if isinstance(image, StoredTiff):
        known["dropped"] = max(0, image.bands - len(image.getbands()))
    return {**known, "width": width, "height": height, "frames": getattr(image, "n_frames", 1)}


def refuse_unknown(header: ImageFacts, image: ImageFile, reading: Reading) -> None:
    """Refuse an image whose values have no known range, by its header.

    Raises:
        PixelError: If it is one.
    """
    if reading.value_range is None and image.mode in GREY and grey_scale(image).white == 0:
        held = image.samples if isinstance(image, StoredTiff) else "32-bit"
        text = f"its {held} numbers (mode {image.mode}) have no known range; set value_range, or save 8 or 16 bits"
        raise PixelError("unsupported", text, image.size)


def _decoded(file: BinaryIO, image: ImageFile, header: ImageFacts) -> ImageFacts:
    """Decode an image, hash its pixels, and find the range of those of more than 8 bits."""
    digest, lowest, highest, alpha = hashlib.blake2b(digest_size=16), math.inf, -math.inf, False
    try:
        with _ALONE if header.width * header.height > LARGE else nullcontext():
            for rows in stored_rows(image, file):
                digest.update(rows.tobytes())
                if image.mode in ("RGBA", "LA"):
                    alpha = alpha or bool((rows[..., -1] < np.iinfo(rows.dtype).max).any())
                if header.deep:
                    values = rows[..., :3] if rows.ndim == 3 else rows
                    lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
    except PixelError as error:
        return replace(header, problem=error.problem, reason=why(error))
    except UNREADABLE as error:
        # The header was complete, so pixels are missing.
        return replace(header, problem="truncated", reason=why(error))
    # Orientation is part of the image: equal pixels with different orientations are two images.
    digest.update(f"{header.mode} {header.width} {header.height} {header.orientation}".encode())
    if isinstance(image, StoredTiff) and image.white_is_zero:
        digest.update(b"white is zero")
    if header.mode == "P":  # equal indices mean different colours under different palettes
        digest.update(bytes(image.getpalette("RGBA") or ()))
    known = replace(header, digest=digest.hexdigest())
    if image.mode in ("RGBA", "LA"):
        known = replace(known, transparent=alpha)
    return replace(known, lowest=lowest, highest=highest) if header.deep else known


VERSION = 3
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
