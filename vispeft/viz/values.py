"""Plots of scores per label and of predicted values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.style import COLOURS, SETTINGS, save

__all__ = ["bars", "predicted_against_true"]

_MOST_BARS = 60
"""Number of bars above which only the lowest are drawn, as names would not be legible."""
_MOST_PANELS = 12
"""Number of targets above which only the first are drawn."""


def bars(
    heights: Mapping[str, float], marks: Mapping[str, float], path: str | Path, *, label: str, mark_label: str
) -> Path:
    """Draw a score per label, lowest first, with a mark for comparison.

    Args:
        heights: Scores from 0 to 1, keyed by label.
        marks: Values to compare with, keyed by label.
        path: The PNG file.
        label: Name of the bars' quantity.
        mark_label: Name of the marks' quantity.

    Returns:
        The PNG file.

    Raises:
        DataError: If there is nothing to draw.
        FileError: If the picture cannot be written.
    """
    if not heights:
        raise DataError(f"There is no label whose {label} could be drawn.")
    names = sorted(heights, key=lambda name: heights[name])[:_MOST_BARS]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.5, 1.4 + 0.24 * len(names)), layout="constrained")
        axes = figure.subplots()
        places = range(len(names))
        axes.barh(places, [heights[name] for name in names], color=COLOURS["train"], height=0.7, label=label)
        axes.plot([marks[name] for name in names], places, "|", color=COLOURS["validation"], ms=11, label=mark_label)
        axes.set_yticks(places, names)
        axes.set(xlim=(0, 1), xlabel=label)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        if len(names) < len(heights):
            axes.set_title(f"the lowest {len(names)} of {len(heights)}", fontsize=10)
        return save(figure, path)


def predicted_against_true(predicted: Tensor, true: Tensor, names: Sequence[str], path: str | Path) -> Path:
    """Draw predicted over true values, one panel per target.

    Args:
        predicted: Values (N, targets).
        true: Values (N, targets).
        names: Names of the targets.
        path: The PNG file to write.

    Returns:
        The PNG file.

    Raises:
        DataError: If shapes do not match.
        FileError: If the picture cannot be written.
    """
    if predicted.shape != true.shape or predicted.ndim != 2 or predicted.shape[1] != len(names):
        raise DataError(
            f"Predicted values have shape {tuple(predicted.shape)}, true ones {tuple(true.shape)}, and there are "
            f"{len(names)} names; (images, targets) is needed for both."
        )
    shown = min(len(names), _MOST_PANELS)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(0.4 + 3.6 * columns, 0.4 + 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for index, axes in enumerate(panels):
            if index >= shown:
                axes.axis("off")
                continue
            x, y = true[:, index].tolist(), predicted[:, index].tolist()
            low, high = min(x + y), max(x + y)
            axes.plot([low, high], [low, high], color=COLOURS["note"], linewidth=1, linestyle=":")
            axes.scatter(x, y, s=9, alpha=0.5, color=COLOURS["train"], linewidths=0)
            axes.set(title=names[index], xlabel="true", ylabel="predicted")
        return save(figure, path)
