"""Confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import save

__all__ = ["confusion_matrix"]

_MOST_NUMBERED = 30
"""Number of classes above which only colours are drawn, as counts would not be legible."""


def confusion_matrix(counts: Tensor, class_names: Sequence[str], path: str | Path) -> Path:
    """Draw how often images of each class were predicted as each other class.

    Colours show fractions of the true class; numbers are counts. The row of a class without images is grey.

    Args:
        counts: Images by true and predicted class (classes, classes).
        class_names: Names of the classes, in that order.
        path: The PNG file to write.

    Returns:
        The PNG file.

    Raises:
        DataError: If the matrix does not match the names.
        FileError: If the picture cannot be written.
    """
    classes = len(class_names)
    if tuple(counts.shape) != (classes, classes):
        raise DataError(f"The matrix has shape {tuple(counts.shape)}, and there are {classes} class names.")
    numbers = counts.cpu().numpy()
    with np.errstate(invalid="ignore"):
        shares = numbers / numbers.sum(axis=1, keepdims=True)
    numbered = classes <= _MOST_NUMBERED
    size = 1.6 + (0.42 * classes if numbered else 6.5)
    names = drawn_names(class_names)
    with matplotlib.rc_context(settings_for(class_names, axes_grid=False)):
        figure = Figure(figsize=(size + 0.9, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap=matplotlib.colormaps["Blues"].with_extremes(bad="#DDDDDD"), vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{int(np.trace(numbers)):,} of {int(numbers.sum()):,} right", fontsize=10)
        if numbered:
            slanted = max(map(len, names)) > 3
            axes.set_xticks(range(classes), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
            axes.set_yticks(range(classes), names)
            for row, column in zip(*np.nonzero(numbers), strict=True):
                colour = "white" if shares[row, column] > 0.55 else "black"
                axes.text(column, row, int(numbers[row, column]), ha="center", va="center", color=colour, fontsize=8)
        return save(figure, path)
