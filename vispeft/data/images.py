"""Finding and reading image files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.formats import open_image
from vispeft.data.trees import EXTENSIONS, LeftOut, is_image, walk
from vispeft.errors import DataError

__all__ = ["UNREADABLE", "ImageFiles", "find_images", "read_image", "to_rgb", "why"]

logger = logging.getLogger(__name__)

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


def read_image(file: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image as RGB, rotated upright according to its metadata.

    Grey values are repeated, 16-bit ones scaled to 8 bits, CMYK is converted, and transparency is dropped.

    Args:
        file: A path, or an open file.
        name: Its name in messages; by default its path.

    Returns:
        uint8 values (3, H, W).

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open_image(file) as image:
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
        ValueError: If the range of its values is unknown.
    """
    # Pillow would clip values above 255 instead of scaling them. It reads 16-bit PGM (and PNG, in older releases) as
    # "I", already scaled to 16 bits; in other formats "I" and "F" say nothing about the range of their values.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def why(error: BaseException) -> str:
    """Summarise why an image cannot be read.

    Args:
        error: Pillow's exception.
    """
    # Pillow's message repeats the path of a file it cannot identify; its first words suffice.
    return str(error).split(" '")[0].split(" <")[0] or type(error).__name__


class ImageFiles(Dataset[Tensor]):
    """Image files, read on access."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Tensor], Tensor]) -> None:
        """Store the paths.

        Args:
            paths: The files.
            transform: Function of uint8 values (3, H, W).
        """
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one image."""
        return self.transform(read_image(self.paths[index]))
