"""Decoders of label files of one's own and of NYUD_MT: ``.npy`` files of numbers, and images that hold them.

Files that end in ``.npy`` are read as arrays, all others as images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vispeft.data.formats import PixelError, open_image
from vispeft.data.images import GREY, Reading
from vispeft.data.label_files import read_array, read_colours, read_shades
from vispeft.data.masks import IGNORE, read_codes
from vispeft.data.pixels import grey_values

__all__ = ["read_binary", "read_binary_codes", "read_depth", "read_normals", "read_values"]

UNIT = 0.05
"""How far the length of a normal may be from 1; half precision, 8 bits and interpolation stay well below."""
NO_NORMAL = 0.02
"""Length below which a normal of an image is grey, for none: 127 and 128 of 255 have the length 0.007."""
MILLIMETRES = 1000
"""Millimetres of a metre, in images of depth."""
WORD = 65_535
"""White of an image of 16 bits."""


def read_binary(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read saliency or edges, float32 (1, H, W): 0, 1 and `IGNORE`.

    Args:
        paths: An array of 0 and 1, and 255 for no label; or a grey image of black and white, where white is 1.
        reading: The limit on pixels.

    Raises:
        PixelError: If there are other values.
    """
    if _is_array(paths[0]):
        return _planes(_zeros_and_ones(read_array(paths[0], 1, reading)))
    shades = read_shades(paths[0], reading)
    between = shades[(shades > 0) & (shades < 1)]
    if len(between):
        text = f"it has grey values of {between.min():.3g} to {between.max():.3g} of white, and black and white alone "
        raise PixelError("unsupported", f"{text}are read; if it holds 0, 1 and 255, set zero_one of the task")
    return _planes(shades[..., None])


def read_binary_codes(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read saliency or edges, float32 (1, H, W): 0, 1 and `IGNORE`.

    Args:
        paths: An array or an image with 0 and 1, and 255 for no label.
        reading: The limit on pixels.

    Raises:
        PixelError: If there are other values.
    """
    if _is_array(paths[0]):
        return read_binary(paths, reading)
    codes = read_codes(paths[0], reading=reading)
    if codes.ndim != 2:
        raise PixelError("unsupported", "it has colours, and 0, 1 and 255 are read from a grey image")
    return _planes(_zeros_and_ones(codes.astype(np.float32)[..., None]))


def read_depth(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read depths in metres, float32 (1, H, W), 0 for none.

    Args:
        paths: An array of metres, or a grey image of 16 bits of millimetres, as `vispeft predict` writes.
        reading: The limit on pixels.

    Raises:
        PixelError: If one is negative, an array holds whole numbers, or an image has not 16 bits.
    """
    if not _is_array(paths[0]):
        return _planes(_words(paths[0], reading).astype(np.float32)[..., None] / MILLIMETRES)
    depth = read_array(paths[0], 1, reading, "as of millimetres; save metres, as floating-point numbers")
    if depth.min(initial=0) < 0:
        raise PixelError("unsupported", f"it has {depth.min():g}, and depths are metres from 0, which means none")
    return _planes(depth)


def read_normals(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read unit normals, float32 (3, H, W), zero for none.

    Args:
        paths: An array of vectors; or an image of red, green and blue v with n = 2 v / 255 - 1, grey or black for none.
        reading: The limit on pixels.

    Raises:
        PixelError: If a length is neither 0 nor about 1.
    """
    if _is_array(paths[0]):
        normals = read_array(paths[0], 3, reading)
    else:
        colours = read_colours(paths[0], reading)
        normals = 2 * colours.astype(np.float32) / 255 - 1
        normals[(colours == 0).all(-1) | (_lengths(normals) < NO_NORMAL)] = 0
    length = _lengths(normals)
    wrong = length[(length > 0) & (abs(length - 1) > UNIT)]
    if len(wrong):
        raise PixelError("unsupported", f"it has vectors of length {wrong[0]:g}; normals are unit vectors, or zero")
    return _planes(normals)


def read_values(paths: Sequence[str], reading: Reading) -> Tensor:
    """Read values of any scale, float32 (1, H, W).

    Args:
        paths: An array, with 255 for no label; or a grey image, whose shares of white are the values.
        reading: The limit on pixels.
    """
    if _is_array(paths[0]):
        return _planes(read_array(paths[0], 1, reading))
    return _planes(read_shades(paths[0], reading)[..., None])


def _is_array(path: str) -> bool:
    return path.lower().endswith(".npy")


def _zeros_and_ones(values: np.ndarray) -> np.ndarray:
    """Return the values.

    Raises:
        PixelError: If one is neither 0 nor 1, nor `IGNORE`.
    """
    strange = values[~np.isin(values, (0, 1, IGNORE))]
    if len(strange):
        text = f"its values go from {values.min():g} to {values.max():g}"
        raise PixelError("unsupported", f"{text}, and saliency and edges are 0 or 1, or {IGNORE} for none")
    return values


def _words(path: str, reading: Reading) -> np.ndarray:
    """Read a grey image of 16 bits (H, W).

    Raises:
        PixelError: If it is of another kind.
    """
    with open_image(path, reading.max_pixels) as image:
        mode, size = image.mode, image.size
        grey = grey_values(image) if mode in GREY else None
    if grey is None or grey.white != WORD:
        text = f"its pixels are {mode}, and depth is a grey image of 16 bits without sign, in millimetres"
        raise PixelError("unsupported", f"{text}, or an array of metres (.npy)", size)
    return grey.values


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt((vectors**2).sum(-1)))


def _planes(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
