"""Finding and reading image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.errors import DataError

__all__ = ["EXTENSIONS", "UNREADABLE", "ImageFiles", "find_images", "read_image", "to_rgb", "why"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name endings taken for images."""

UNREADABLE = (Exception,)
"""What Pillow raises for files it cannot read: besides its own errors also what broken bytes lead its decoders to, such
as TypeError, IndexError and struct.error."""


def find_images(place: str | Path) -> list[Path]:
    """List the images of a folder and of the folders in it, sorted by path.

    Args:
        place: A folder, or one image file.

    Returns:
        The paths.

    Raises:
        DataError: If there is no such place, or no image in it.
    """
    root = Path(place)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"There is no folder and no image {str(root)!r}. Give a folder of images, or one image.")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not paths:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise DataError(f"There is no image in {str(root)!r}; found {found}. Looked for {', '.join(EXTENSIONS)}.")
    return paths


def read_image(file: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image as RGB, turned upright as its metadata says.

    Grey values are repeated, 16-bit ones scaled to 8 bits, CMYK is converted, and transparency is dropped.

    Args:
        file: A path, or an open file.
        name: What to call it in messages; by default its path.

    Returns:
        uint8 values (3, H, W).

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(file) as image:
            image.load()
            pixels = np.array(to_rgb(ImageOps.exif_transpose(image), image.format))
    except UNREADABLE as error:
        raise DataError(f"{name or file} cannot be read as an image ({why(error)}).") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert an image to RGB without clipping.

    Args:
        image: A loaded image of any mode.
        file_format: Pillow's name of the format of its file.

    Raises:
        ValueError: If its values have no known range.
    """
    # Pillow would clip values above 255 instead of scaling them. It reads 16-bit PGM (and PNG, in older releases) as
    # "I", already scaled to 16 bits; in other formats "I" and "F" say nothing about the range of their values.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def why(error: BaseException) -> str:
    """Say shortly why an image cannot be read.

    Args:
        error: What Pillow raised.
    """
    # Pillow's message repeats the path where it cannot identify a file; its first words are enough.
    return str(error).split(" '")[0].split(" <")[0] or type(error).__name__


class ImageFiles(Dataset[Tensor]):
    """Image files, read when they are asked for."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Tensor], Tensor]) -> None:
        """Keep the paths.

        Args:
            paths: The files.
            transform: Takes uint8 values (3, H, W).
        """
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one image."""
        return self.transform(read_image(self.paths[index]))
