"""Confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.style import SETTINGS, save

__all__ = ["confusion_matrix"]

_MOST_NUMBERED = 30
"""Number of classes above which only colours are drawn, as counts would not be legible."""


def confusion_matrix(counts: Tensor, class_names: Sequence[str], path: str | Path) -> Path:
    """Draw how often images of each class were predicted as each other class.

    Colours show fractions of the true class; numbers are counts.

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
    shares = numbers / np.maximum(1, numbers.sum(axis=1, keepdims=True))
    numbered = classes <= _MOST_NUMBERED
    size = 1.6 + (0.42 * classes if numbered else 6.5)
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(size + 0.9, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{int(np.trace(numbers)):,} of {int(numbers.sum()):,} right", fontsize=10)
        if numbered:
            slanted = max(map(len, class_names)) > 3
            axes.set_xticks(
                range(classes), class_names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
            )
            axes.set_yticks(range(classes), class_names)
            for row, column in zip(*np.nonzero(numbers), strict=True):
                colour = "white" if shares[row, column] > 0.55 else "black"
                axes.text(column, row, int(numbers[row, column]), ha="center", va="center", color=colour, fontsize=8)
        return save(figure, path)
