"""A picture of numbers per attention head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.style import save

__all__ = ["head_map"]


def head_map(norms: Mapping[int, Tensor], path: str | Path, label: str = "norm of the head's scales") -> Path:
    """Draw a number for each attention head, blocks from the input upwards and heads from left to right.

    Blocks may have different numbers of heads, as in a Swin; places without a head are grey.

    Args:
        norms: Numbers (heads,) by block, as from `vispeft.methods.head_norms`.
        path: The picture to write.
        label: What the numbers are.

    Returns:
        The path.

    Raises:
        DataError: If there is no head.
        FileError: If the picture cannot be written.
    """
    if not norms:
        raise DataError("A picture of heads was asked for, and there are none.")
    blocks, most = sorted(norms), max(len(own) for own in norms.values())
    grid = np.full((len(blocks), most), np.nan)
    for row, block in enumerate(blocks):
        grid[row, : len(norms[block])] = norms[block].detach().cpu().numpy()
    figure = Figure(figsize=(1.8 + 0.3 * most, 1.2 + 0.26 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#DDDDDD")
    image = axes.imshow(grid, cmap=colours, vmin=0, aspect="auto", origin="lower", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label)
    axes.grid(visible=False)
    axes.set(xlabel="head", ylabel="block")
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    return save(figure, path)
