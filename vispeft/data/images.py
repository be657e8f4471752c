"""Finding and reading image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.errors import DataError

__all__ = ["EXTENSIONS", "ImageFiles", "find_images", "read_image"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name endings taken for images."""


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


def read_image(path: str | Path) -> Tensor:
    """Read an image as RGB, turned upright as its metadata says.

    Grey values are repeated, 16-bit ones scaled to 8 bits, and transparency is dropped.

    Args:
        path: The file.

    Returns:
        uint8 values (3, H, W).

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would clip 16-bit values at 255 instead of scaling them.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            pixels = np.array(upright.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's message repeats the path where it cannot identify a file; its first words are enough.
        reason = str(error).split(" '")[0] or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}).") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
