"""The formats of images that are read: a closed list, so that no file starts another program.

Pillow chooses a decoder by a file's first bytes, whatever its name says. One of them, that of EPS, runs Ghostscript.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from PIL import EpsImagePlugin, Image

__all__ = ["FORMATS", "open_image", "start_no_program"]

FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats. All are decoded within this process; a phone's MPO file is a JPEG to it."""


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """Open an image of one of the formats, without reading its pixels.

    Every image and mask is opened by this function.

    Args:
        file: A path, or an open file.

    Returns:
        Pillow's image. It is a context manager, which closes the file.

    Raises:
        ValueError: If the path names no regular file, such as a pipe or a device, which might never end.
        OSError: If the file is missing, or an image of none of these formats.
    """
    if isinstance(file, str | Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    return Image.open(file, formats=FORMATS)


def start_no_program() -> None:
    """Keep Pillow from running Ghostscript in this process, for data sets of torchvision, which open files themselves.

    An EPS file then fails as it does where Ghostscript is not installed.
    """
    EpsImagePlugin.gs_binary = False
