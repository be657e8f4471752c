"""The formats of images that are read, a limit on their pixels, and the reasons for those that are not read.

Pillow chooses a decoder by a file's first bytes, whatever its name says. One of them, that of EPS, runs Ghostscript.
The list of formats is therefore closed, so that no file starts another program. Pillow's own limit on pixels holds for
the whole process; it is replaced by one that is a setting of the data modules.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import EpsImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile

__all__ = ["FORMATS", "MAX_PIXELS", "PixelError", "StoredTiff", "open_image", "start_no_program", "too_large"]

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats. All are decoded within this process; a phone's MPO file is a JPEG to it."""

MAX_PIXELS = 128_000_000
"""Pixels of the largest image that is opened by default: above the 108 million of today's cameras, and little enough
for an image to be decoded several times at once in the memory of a small machine."""

UNKNOWN = (
    "unknown pixel mode",
    "unknown data organization",
    "Invalid value for samples per pixel",
    "string index out of range",
)
"""Pillow's messages about TIFF files that it cannot read though they may be whole; the last one is about bands that
stand apart and are more than it has letters for."""
SAMPLES = {1: "unsigned", 2: "signed", 3: "floating-point"}
"""Kinds of numbers in TIFF, by the tag SampleFormat."""
PHOTOMETRIC, BITS, SAMPLES_PER_PIXEL, FORMAT_OF_SAMPLE, EXTRA, PLANAR = 262, 258, 277, 339, 338, 284
"""TIFF tags: PhotometricInterpretation, BitsPerSample, SamplesPerPixel, SampleFormat, ExtraSamples, and
PlanarConfiguration."""
APART = 2
"""PlanarConfiguration of bands that are stored one after the other."""


class PixelError(ValueError):
    """A file that is whole and is not read; the message says what it holds and what to do."""

    def __init__(self, problem: str, reason: str, size: tuple[int, int] = (0, 0)) -> None:
        """Compose the error.

        Args:
            problem: ``unsupported`` or ``too-large``.
            reason: What the file holds, and what to do.
            size: Width and height of the image, where they are known.
        """
        super().__init__(reason)
        self.problem, self.size = problem, size


class StoredTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF file whose grey values Pillow neither inverts nor takes for others.

    Pillow inverts values of 1 to 8 bits in files in which 0 is white, and reads those of 16 bits as they are; it lacks
    the big-endian one of these. Here no value is inverted, and `white_is_zero` says how they are meant.
    """

    white_is_zero = False
    """Whether the file says that 0 is white."""
    bits = 0
    """Bits of a sample."""
    samples = "unsigned"
    """Kind of its numbers: unsigned, signed or floating-point."""
    bands = 1
    """Samples per pixel in the file, which may be more than are read."""

    def _setup(self) -> None:
        tags = self.tag_v2
        self.bits = _first(tags.get(BITS, (1,)))
        self.samples = SAMPLES.get(_first(tags.get(FORMAT_OF_SAMPLE, (1,))), "unknown")
        self.bands = tags.get(SAMPLES_PER_PIXEL, 1)
        meaning = tags.get(PHOTOMETRIC, 0)
        self.white_is_zero = meaning == 0
        if meaning == 0:
            tags[PHOTOMETRIC] = 1
        if self.bits == 32 and self.samples == "unsigned":
            tags[FORMAT_OF_SAMPLE] = (2,)  # equal bytes, in both byte orders; see `pixels.grey_values`
        if meaning == 2 and self.bands == 4 and EXTRA not in tags:
            tags[EXTRA] = (0,)  # a fourth band is transparency only where the file says so
        super()._setup()
        if self.bits == 16 and tags.get(PLANAR) == APART:
            order = "B" if tags.prefix == b"MM" else "L"
            self.tile = [_wide(tile, order) for tile in self.tile]
        if self.size != getattr(self, "_tile_size", self.size):
            self.filename = ""  # without a name no memory is mapped, which Pillow does in the size after the turn

    def load_prepare(self) -> None:
        """Take room for the pixels, whose number was compared with the reader's own limit before."""
        if hasattr(self, "_tile_size") and self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)
        super().load_prepare()


def _first(values: Any) -> int:
    return int(values[0]) if isinstance(values, tuple) else int(values)


def _wide(tile: Any, order: str) -> Any:
    """Correct Pillow's raw mode of a band of 16 bits that stands apart, which it reads as 8 bits."""
    if isinstance(tile[3], tuple) and tile[3][0] in ("R", "G", "B", "A"):
        return tile._replace(args=(f"{tile[3][0]};16{order}", *tile[3][1:]))
    return tile


def open_image(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Open an image of one of the formats, without reading its pixels.

    Every image and mask is opened by this function.

    Args:
        file: A path, or an open file.
        max_pixels: Largest number of pixels.

    Returns:
        Pillow's image. It is a context manager, which closes the file.

    Raises:
        ValueError: If the path names no regular file, such as a pipe or a device, which might never end.
        PixelError: If it has more pixels, or is of a kind that cannot be read.
        OSError: If the file is missing, or an image of none of these formats.
    """
    if isinstance(file, str | Path):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is no regular file")
        with open(file, "rb") as opened:
            prefix = opened.read(16)
    else:
        file.seek(0)
        prefix = file.read(16)
    image = _identified(file, prefix)
    if image.width * image.height > max_pixels:
        if isinstance(file, str | Path):
            image.close()
        raise too_large(image.size, max_pixels)
    return image


def too_large(size: tuple[int, int], max_pixels: int) -> PixelError:
    """Make the error of an image above the limit.

    Args:
        size: Its width and height.
        max_pixels: The limit.
    """
    pixels = f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels"
    return PixelError("too-large", f"{pixels} are more than max_pixels={max_pixels}; raise it, or cut tiles", size)


def _identified(file: str | Path | BinaryIO, prefix: bytes) -> ImageFile:
    """Open a file by the first format that takes it. Pillow's own loop would apply its limit on pixels."""
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        try:
            taken = factory is not None and (accept is None or accept(prefix))
            if not taken or isinstance(taken, str):  # a string says why this Pillow cannot decode the format
                continue
            source: Any = file
            if not isinstance(file, str | Path):
                file.seek(0)
            return cast(ImageFile, (StoredTiff if name == "TIFF" else cast(Any, factory))(source, ""))
        except Image.DecompressionBombError as error:  # Pillow compares some formats with its own limit, too
            raise PixelError(
                "unsupported", f"{name} of so many pixels is not opened; save it as PNG or TIFF"
            ) from error
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # those of a file of another format
            if name == "TIFF" and taken:
                _explain(file, error)
    raise UnidentifiedImageError("cannot identify image file")


def _explain(file: str | Path | BinaryIO, error: Exception) -> None:
    """Say what a TIFF file holds that Pillow does not know.

    Raises:
        PixelError: If its tags can be read, and are the reason.
    """
    if str(error) not in UNKNOWN:
        return
    try:
        tags = _tags(file)
        bits = cast("tuple[int, ...]", tags.get(BITS, (1,)))
        bands, kind = int(tags.get(SAMPLES_PER_PIXEL, 1)), SAMPLES.get(_first(tags.get(FORMAT_OF_SAMPLE, (1,))))
    except Exception:
        return  # damaged tags are no reason
    depths = " and ".join(str(depth) for depth in sorted(set(bits)))
    raise PixelError(
        "unsupported",
        f"this TIFF has {bands} band{'' if bands == 1 else 's'} of {depths} bits ({kind or 'unknown'} numbers, "
        f"photometric interpretation {tags.get(PHOTOMETRIC)}), which cannot be read; save one band (grey) or three "
        "(red, green, blue) of 8 or 16 bits",
    ) from error


def _tags(file: str | Path | BinaryIO) -> Any:
    """Read the tags of the first image of a TIFF file."""
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return _tags(opened)
    file.seek(0)
    header = file.read(8)
    if header[2:4] in (b"\x2b\0", b"\0\x2b"):  # a BigTIFF has twice the header
        header += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags


def start_no_program() -> None:
    """Keep Pillow from running Ghostscript in this process, for data sets of torchvision, which open files themselves.

    An EPS file then fails as it does where Ghostscript is not installed.
    """
    EpsImagePlugin.gs_binary = False
