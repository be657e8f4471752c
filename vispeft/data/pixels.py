"""Pixels as they are stored in a file, in images and masks alike: values of 1 to 32 bits, colours, and orientation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from vispeft.data.formats import PixelError, StoredTiff, open_image

__all__ = [
    "QUARTER_TURNS",
    "Grey",
    "as_numbers",
    "exif_orientation",
    "grey_scale",
    "grey_values",
    "is_wide",
    "netpbm_values",
    "netpbm_white",
    "palette_colours",
    "stored_rows",
    "stored_size",
    "upright",
    "wide_colours",
]

STRETCHED = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow stretches grey values of 2 and 4 bits to 0 to 255, by raw mode."""

QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of Exif 2.3 that exchange width and height."""

METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG file that may hold an orientation."""
ROWS = 256
"""Rows of an image that are looked at together."""
HEADER = 8
"""Bytes of the signature of a PNG file, and of the head of a chunk: its length and its name."""


class Grey(NamedTuple):
    """Grey values as they are stored."""

    values: np.ndarray
    """Integers or floats (H, W), upright."""
    white: int
    """Largest value there can be; 0 if it is not known, as with signed and floating-point numbers."""
    inverted: bool
    """Whether 0 is meant as white."""


# ------------------------------------------------------------------ orientation


def stored_size(image: ImageFile) -> tuple[int, int]:
    """Return width and height of an opened image before its metadata turn it.

    Args:
        image: An opened image that was not loaded yet.
    """
    if isinstance(image, StoredTiff):  # newer releases of Pillow exchange them, older ones do not
        return int(image.tag_v2[256]), int(image.tag_v2[257])
    return image.size


def exif_orientation(image: ImageFile) -> int:
    """Return the orientation that the metadata of an image say, 1 to 8; 1 is upright.

    Only the metadata are read, unless those of a PNG file stand behind its pixels.

    Args:
        image: An opened image that was not loaded yet.
    """
    if image.format == "PNG" and not _has_metadata(image):
        return 1  # Pillow would decode all pixels to look for them
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _has_metadata(image: ImageFile) -> bool:
    """Look for chunks of metadata in a PNG file, without reading its pixels."""
    file = image.fp
    assert file is not None
    place = file.tell()
    try:
        file.seek(HEADER)
        while len(head := file.read(HEADER)) == HEADER:
            if head[4:] in METADATA:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)  # behind content and checksum
    finally:
        file.seek(place)
    return False


_TURNS = {
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: array[::-1, ::-1].swapaxes(0, 1),
    8: lambda array: np.rot90(array),
}
"""Turns to upright by orientation (Exif 2.3, tag 274)."""


def upright(array: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn the pixels of a loaded image upright, as its metadata say.

    Args:
        array: Its pixels (H, W) or (H, W, C).
        image: The image. Pillow turns TIFF files itself, and says so by removing the orientation.
    """
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    # A copy: torch refuses negative strides, which numpy calls contiguous where a side has one pixel.
    return _TURNS[found](array).copy() if found in _TURNS else array


# ------------------------------------------------------------------ values


class Scale(NamedTuple):
    """How Pillow gives the grey values of a file."""

    stretched: int
    """Factor by which it stretches them."""
    white: int
    """Largest value there can be in the file; 0 if it is not known, as with signed and floating-point numbers."""


def grey_scale(image: ImageFile) -> Scale:
    """Say how Pillow gives the grey values of a file.

    Args:
        image: An opened image that was not loaded yet, of one of Pillow's modes 1, L, LA, La, I, I;16 and F.
    """
    if image.format == "PPM":
        return Scale(1, netpbm_white(image))
    if isinstance(image, StoredTiff):
        white = 2**image.bits - 1 if image.samples == "unsigned" and image.bits <= 16 else 0
        return Scale(255 // white if image.mode == "L" and 0 < white < 255 else 1, white)
    if image.mode in ("1", "L", "LA", "La"):
        stretched = STRETCHED.get(_raw_mode(image), 1)
        return Scale(stretched, 1 if image.mode == "1" else 255 // stretched)
    # Releases before Pillow 11 call the 16 bits of a PNG file "I".
    return Scale(1, 65_535 if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG") else 0)


def grey_values(image: ImageFile) -> Grey:
    """Read the values of a grey file of 1 to 32 bits, neither stretched nor inverted.

    Args:
        image: An opened image that was not loaded yet, of one of Pillow's modes 1, L, LA, La, I, I;16 and F.

    Raises:
        PixelError: If it is a file of another kind.
        OSError: If it is damaged.
    """
    stretched, white = grey_scale(image)
    if image.format == "PPM":
        return Grey(netpbm_values(image), white, image.mode == "1")
    inverted = isinstance(image, StoredTiff) and image.white_is_zero
    values = as_numbers(np.asarray(image.getchannel(0) if image.mode in ("LA", "La") else image), image)
    return Grey(upright(values // np.uint8(stretched) if stretched > 1 else values, image), white, inverted)


def as_numbers(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Take values for the numbers that the file says they are, where Pillow does not: signed bytes, unsigned words.

    Args:
        values: An array of Pillow, of any shape.
        image: The image they are of.
    """
    if values.dtype == bool:
        return values.astype(np.uint8)
    if isinstance(image, StoredTiff):
        kind = (image.bits, image.samples)
        return values.view({(8, "signed"): np.int8, (32, "unsigned"): np.uint32}.get(kind, values.dtype))
    return values


def _raw_mode(image: Image.Image) -> str:
    """Return the raw mode in which an unread file packs its values."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def is_wide(image: Image.Image) -> bool:
    """Whether the colours of an unread file have 16 bits each, of which Pillow keeps 8.

    Args:
        image: An opened image that was not loaded yet.
    """
    return image.mode in ("RGB", "RGBA") and ";16" in _raw_mode(image)


def wide_colours(image: ImageFile, file: str | Path | BinaryIO) -> np.ndarray:
    """Read colours of 16 bits each.

    Args:
        image: An opened image for which `is_wide` holds.
        file: Its file.

    Returns:
        uint16 colours (H, W, 3), upright, or (H, W, 4) with transparency.

    Raises:
        PixelError: If the file packs them in a way in which the lower bytes cannot be reached.
        OSError: If it is damaged.
    """
    return upright(np.concatenate(list(stored_rows(image, file))), image)


def stored_rows(image: ImageFile, file: str | Path | BinaryIO) -> Iterator[np.ndarray]:
    """Yield the pixels of an image as arrays of some rows each, in their full width and not yet upright.

    Args:
        image: An opened image that was not loaded yet.
        file: Its file. Colours of 16 bits are decoded twice: their upper bytes, and in a second pass the lower ones.

    Raises:
        PixelError: If 16-bit colours are packed in a way in which the lower bytes cannot be reached.
        OSError: If it is damaged.
    """
    if image.format == "PPM":
        yield netpbm_values(image)
        return
    if not is_wide(image):
        image.load()
        for box in _boxes(image):
            yield as_numbers(np.asarray(image.crop(box)), image)
        return
    paired = _raw_mode(image) == "LA;16B"  # grey and transparency: the second pass has all four bytes of a pixel
    with open_image(file, image.width * image.height) as again:
        again.tile = [tile._replace(args=_other_bytes(tile[3])) for tile in again.tile]
        for one in (image, again):
            one.load()
        for box in _boxes(image):
            upper, lower = (np.asarray(one.crop(box)) for one in (image, again))
            yield _paired(lower) if paired else upper.astype(np.uint16) << 8 | lower


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, image.height, ROWS):
        yield 0, top, image.width, min(top + ROWS, image.height)


def _paired(four: np.ndarray) -> np.ndarray:
    grey, alpha = (four[..., at].astype(np.uint16) << 8 | four[..., at + 1] for at in (0, 2))
    return np.stack([grey, grey, grey, alpha], -1)


def _other_bytes(arguments: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Name the raw mode of equal width that takes the other byte of each value."""
    raw = arguments if isinstance(arguments, str) else arguments[0]
    native = "L" if sys.byteorder == "little" else "B"
    colours, _, order = raw.partition(";16")
    if raw == "LA;16B":
        other = "RGBA"
    elif colours in ("RGB", "RGBA", "RGBX") or (colours in tuple("RGBA") and order != "N"):
        other = f"{colours};16{'L' if (native if order == 'N' else order) == 'B' else 'B'}"
    else:
        raise PixelError("unsupported", f"its 16-bit colours are packed as {raw}; save them without transparency")
    return other if isinstance(arguments, str) else (other, *arguments[1:])


def palette_colours(image: Image.Image) -> np.ndarray:
    """Return the colours of a palette (256, 3), uint8; those it lacks are black.

    Args:
        image: A loaded image of mode P or PA.
    """
    found = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    return np.concatenate([found, np.zeros((256 - len(found), 3), np.uint8)])


# ------------------------------------------------------------------ PBM, PGM and PPM


def netpbm_white(image: ImageFile) -> int:
    """Return the largest value that the header of a PBM, PGM or PPM file allows.

    Args:
        image: An opened image of the format PPM that was not loaded yet.
    """
    arguments = image.tile[0][3]
    if isinstance(arguments, tuple) and image.mode in ("L", "I", "RGB"):
        return int(arguments[1])
    return {"1": 1, "I": 65_535}.get(image.mode, 255)


def netpbm_values(image: ImageFile) -> np.ndarray:
    """Read the values of a PBM, PGM or PPM file. Pillow stretches them to 8 or 16 bits, pixel by pixel.

    Args:
        image: An opened image of the format PPM that was not loaded yet.

    Returns:
        uint8 or uint16 values (H, W) or (H, W, 3).

    Raises:
        PixelError: If it holds floating-point or otherwise packed numbers.
        OSError: If pixels are missing, or above the largest value of the header.
    """
    if image.mode not in ("1", "L", "I", "RGB"):
        raise PixelError("unsupported", f"its pixels are {image.mode}; save it as PNG or TIFF")
    white, bits = netpbm_white(image), image.mode == "1"
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    count, depth = math.prod(shape), np.dtype(">u2" if white > 255 else "u1")
    file = image.fp
    assert file is not None
    file.seek(image.tile[0][2])
    content = file.read()
    if image.tile[0][0] == "ppm_plain":
        values = _plain(content, bits, count)
    elif bits:
        row = -(-image.width // 8)
        packed = np.frombuffer(content, np.uint8, min(row * image.height, len(content) // row * row))
        values = np.unpackbits(packed.reshape(-1, row), axis=1)[:, : image.width]
    else:
        values = np.frombuffer(content, depth, min(count, len(content) // depth.itemsize))
    if values.size != count:
        raise OSError(f"image file is truncated: {values.size} of {count} values are there")
    if not 0 <= values.min() <= values.max() <= white:
        raise OSError(f"it has values from {values.min()} to {values.max()}, and its header allows 0 to {white}")
    return values.reshape(shape).astype(np.uint8 if white <= 255 else np.uint16)


def _plain(content: bytes, bits: bool, count: int) -> np.ndarray:
    """Read the numbers of a file of text."""
    text = b"\n".join(line.partition(b"#")[0] for line in content.splitlines())
    words = [*b"".join(text.split()).decode("ascii")] if bits else text.split()
    try:
        return np.array([int(word) for word in words[:count]], np.int64)
    except (OverflowError, ValueError) as error:
        raise OSError("it has words that are no numbers") from error
