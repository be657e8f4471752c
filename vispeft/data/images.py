"""Finding and reading image files."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.formats import MAX_PIXELS, PixelError, StoredTiff, open_image
from vispeft.data.pixels import (
    QUARTER_TURNS,
    Grey,
    exif_orientation,
    grey_values,
    is_wide,
    netpbm_values,
    netpbm_white,
    stored_size,
    upright,
    wide_colours,
)
from vispeft.data.trees import EXTENSIONS, LeftOut, is_image, walk
from vispeft.errors import ConfigError, DataError
from vispeft.storage.form import READ_PIXELS

__all__ = [
    "PLAIN",
    "UNREADABLE",
    "ImageFiles",
    "Reading",
    "find_images",
    "read_image",
    "read_size",
    "rgb_pixels",
    "to_rgb",
    "why",
]

logger = logging.getLogger(__name__)

REDUCING_GAP = 2
"""How many times as large as needed a JPEG is at least after it was decoded at reduced scale: the default of Pillow's
`Image.thumbnail`, which calls the result very close to that of all pixels."""
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of grey values of more than 8 bits."""
GREY = ("1", "L", "LA", "La", *DEEP)
"""Pillow's modes of grey values."""
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
"""Pillow's modes of colours that are multiplied by their opacity, and those they convert to."""

UNREADABLE = (Exception,)
"""Exceptions of Pillow for unreadable files: its own, and those that broken bytes cause in its decoders, such as
TypeError, IndexError and struct.error."""


def find_images(place: str | Path) -> list[Path]:
    """List the images of a folder, recursively, sorted by path, and log what is left out.

    Links are followed, and hidden files and folders are skipped, as in every reader of folders.

    Args:
        place: A folder, or one image file.

    Returns:
        The paths.

    Raises:
        DataError: If the path does not exist, or has no images.
    """
    root = Path(place)
    # The functions of os.path answer for names that no system takes too.
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise DataError(f"There is no folder and no image {str(root)!r}. Give a folder of images, or one image.")
    left = LeftOut(root)
    paths: list[Path] = []
    for path in walk(root, left):
        if is_image(path):
            paths.append(Path(path))
        else:
            left.add("ending", path)
    if not paths:
        found = left.line() if left else f"Looked for {', '.join(EXTENSIONS)} and found nothing"
        raise DataError(f"There is no image in {str(root)!r}. {found}.")
    if left:
        logger.log(logging.WARNING if left.level == "warning" else logging.INFO, "%s: %s.", root, left.line())
    return sorted(paths)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the pixels of image files become RGB; settings of the data modules, stored with the adapter."""

    transparency: tuple[int, int, int] | None = None
    """Colour that transparent images are laid on; None drops the transparency, and hidden colours become visible."""
    value_range: tuple[float, float] | None = None
    """Values of files of more than 8 bits that become black and white; None takes all values that the file could
    hold."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image or mask; larger ones are refused before they are decoded."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        for name in ("transparency", "value_range"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        colour, values = self.transparency, self.value_range
        if colour is not None and (len(colour) != 3 or any(value not in range(256) for value in colour)):
            raise ConfigError(f"transparency={list(colour)}: give red, green and blue from 0 to 255, or leave it out.")
        if values is not None and (len(values) != 2 or not -math.inf < values[0] < values[1] < math.inf):
            raise ConfigError(
                f"value_range={list(values)}: give the value that becomes black and a larger one that becomes white, "
                "such as [0, 4095] for 12 bits."
            )
        if self.max_pixels < 1:
            raise ConfigError(f"max_pixels={self.max_pixels}: at least one pixel is needed.")

    def notes(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, for the adapter's file.

        No file of others switches the limit of pixels off: `READ_PIXELS` are the most that are written and accepted.
        """
        if self.max_pixels > READ_PIXELS:
            return replace(self, max_pixels=READ_PIXELS).notes()
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Reading:
        """Read the notes of an adapter.

        Args:
            notes: Its notes, with the result of `notes` under ``output`` and ``reading``.
        """
        known = {field.name for field in fields(cls)}
        stored = (notes.get("output") or {}).get("reading") or {}
        found = cls(**{name: value for name, value in stored.items() if name in known})
        return replace(found, max_pixels=min(found.max_pixels, READ_PIXELS))


PLAIN = Reading()
"""The default settings."""


def read_image(
    file: str | Path | BinaryIO,
    name: str | None = None,
    reading: Reading = PLAIN,
    least: tuple[int, int] | None = None,
) -> Tensor:
    """Read an image as RGB, rotated upright according to its metadata.

    Grey values are repeated, values of more than 8 bits scaled to 8 bits, CMYK is converted, and transparency is
    dropped, or laid on a colour.

    Args:
        file: A path, or an open file.
        name: Its name in messages; by default its path.
        reading: The settings.
        least: Height and width that are needed; a JPEG may then be decoded to a half, a quarter or an eighth of its
            sides, as long as `REDUCING_GAP` times as much is left. None decodes all pixels.

    Returns:
        uint8 values (3, H, W).

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open_image(file, reading.max_pixels) as image:
            if least is not None:
                _reduce(image, least)
            pixels = rgb_pixels(image, file, reading)
    except UNREADABLE as error:
        raise DataError(f"{name or file} cannot be read as an image ({why(error)}).") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reduce(image: ImageFile, least: tuple[int, int]) -> None:
    """Have a JPEG decoded at reduced scale; other formats stay as they are."""
    if image.format in ("JPEG", "MPO"):
        height, width = reversed(least) if exif_orientation(image) in QUARTER_TURNS else least
        image.draft(None, (width * REDUCING_GAP, height * REDUCING_GAP))


def read_size(file: str | Path | BinaryIO, reading: Reading = PLAIN) -> tuple[int, int]:
    """Read the height and width of an image as `read_image` returns it, without its pixels.

    Args:
        file: A path, or an open file.
        reading: The settings.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open_image(file, reading.max_pixels) as image:
            width, height = stored_size(image)
            return (width, height) if exif_orientation(image) in QUARTER_TURNS else (height, width)
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read as an image ({why(error)}).") from error


def rgb_pixels(image: ImageFile, file: str | Path | BinaryIO, reading: Reading = PLAIN) -> np.ndarray:
    """Convert an opened image to RGB, upright and without clipping.

    Args:
        image: An image that was not loaded yet.
        file: Its file.
        reading: The settings.

    Returns:
        uint8 colours (H, W, 3).

    Raises:
        ValueError: If the range of its values is unknown.
        OSError: If it is damaged.
    """
    if image.format == "PPM" and image.mode == "RGB":
        white = netpbm_white(image)
        return _eight_bits(netpbm_values(image), white, reading)
    if image.mode in DEEP or image.format == "PPM" or (image.mode in GREY and _is_odd(image)):
        return _grey_as_rgb(grey_values(image), reading)
    if reading.value_range is not None and is_wide(image):
        wide = wide_colours(image, file)
        colours = _eight_bits(wide[..., :3], 65_535, reading)
        return _laid(colours, wide[..., 3] >> 8, reading) if wide.shape[2] == 4 else colours
    image.load()
    return upright(_converted(image, reading), image)


def _is_odd(image: ImageFile) -> bool:
    """Whether grey values mean something else than Pillow's conversion takes them for."""
    return isinstance(image, StoredTiff) and (image.white_is_zero or image.samples != "unsigned")


def to_rgb(image: Image.Image, reading: Reading = PLAIN) -> Image.Image:
    """Convert an image that was not opened by `open_image`, such as one of a data set of torchvision.

    Args:
        image: A loaded image of any mode.
        reading: The settings.

    Raises:
        ValueError: If the range of its values is unknown.
    """
    if image.mode in DEEP:
        white = 65_535 if image.mode.startswith("I;16") else 0
        return Image.fromarray(_grey_as_rgb(Grey(np.asarray(image), white, False), reading))
    return Image.fromarray(_converted(image, reading))


def _converted(image: Image.Image, reading: Reading) -> np.ndarray:
    """Convert a loaded image of 8 bits to uint8 colours (H, W, 3)."""
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if reading.transparency is not None and image.has_transparency_data:
        four = np.asarray(image.convert("RGBA"))
        return _laid(four[..., :3], four[..., 3], reading)
    return np.array(image.convert("RGB"))


def _laid(colours: np.ndarray, alpha: np.ndarray, reading: Reading) -> np.ndarray:
    """Lay colours (H, W, 3) of an opacity (H, W) from 0 to 255 on the colour of the settings, if there is one."""
    if reading.transparency is None:
        return colours
    share = alpha[..., None].astype(np.uint16)
    behind = np.array(reading.transparency, np.uint16) * (255 - share)
    return ((colours * share + behind + 127) // 255).astype(np.uint8)


def _grey_as_rgb(grey: Grey, reading: Reading) -> np.ndarray:
    values = _eight_bits(grey.values, grey.white, reading)
    values = 255 - values if grey.inverted else values
    return np.repeat(values[..., None], 3, 2)


def _eight_bits(values: np.ndarray, white: int, reading: Reading) -> np.ndarray:
    """Scale values of any shape to 8 bits.

    Args:
        values: Integers or floats.
        white: Largest value there can be; 0 if it is not known.
        reading: The settings.

    Raises:
        PixelError: If the range is not known.
    """
    if white == 255 and values.dtype == np.uint8:
        return values
    if reading.value_range is None or 0 < white < 255:
        if not white:
            raise PixelError(
                "unsupported",
                f"its numbers ({values.dtype.name}) have no known range; set value_range, or save it with 8 or 16 bits",
            )
        if white == 65_535:
            return (values >> 8).astype(np.uint8)
        return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if not np.isfinite(values).all():
        raise PixelError("unsupported", "it has values that are not finite; replace them by numbers")
    low, high = reading.value_range
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return scaled.clip(0, 255).round().astype(np.uint8)


def why(error: BaseException) -> str:
    """Summarise why an image cannot be read.

    Args:
        error: Pillow's exception.
    """
    # Pillow's message repeats the path of a file it cannot identify; its first words suffice.
    return str(error).split(" '")[0].split(" <")[0] or type(error).__name__


class ImageFiles(Dataset[Tensor]):
    """Image files, read on access."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Tensor], Tensor], reading: Reading = PLAIN) -> None:
        """Store the paths.

        Args:
            paths: The files.
            transform: Function of uint8 values (3, H, W).
            reading: How pixels become RGB.
        """
        self.paths, self.transform, self.reading = list(paths), transform, reading

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one image."""
        return self.transform(read_image(self.paths[index], reading=self.reading))
