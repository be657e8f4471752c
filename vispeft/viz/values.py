"""Plots of scores per label and of predicted values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import COLOURS, save

__all__ = ["bars", "predicted_against_true"]

_MOST_BARS = 60
"""Number of bars above which only the lowest are drawn, as names would not be legible."""
_MOST_PANELS = 12
"""Number of targets above which only the first are drawn."""


def bars(
    heights: Mapping[str, float | None],
    marks: Mapping[str, float | None],
    path: str | Path,
    *,
    label: str,
    mark_label: str,
) -> Path:
    """Draw a score per label, lowest first, with a mark for comparison.

    Labels that were not measured stand above the others, and say so.

    Args:
        heights: Scores from 0 to 1, keyed by label; None where not measured.
        marks: Values to compare with, keyed by label; a label may have none.
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
    scores = {name: math.inf if score is None else score for name, score in heights.items()}
    names = sorted(scores, key=scores.__getitem__)[:_MOST_BARS]
    drawn = dict(zip(heights, drawn_names([*heights]), strict=True))
    with matplotlib.rc_context(settings_for([*heights])):
        figure = Figure(figsize=(5.5, 1.4 + 0.24 * len(names)), layout="constrained")
        axes = figure.subplots()
        places = range(len(names))
        widths = [score if math.isfinite(score := scores[name]) else 0 for name in names]
        axes.barh(places, widths, color=COLOURS["train"], height=0.7, label=label)
        compared = [math.nan if (mark := marks.get(name)) is None else mark for name in names]
        axes.plot(compared, places, "|", color=COLOURS["validation"], ms=11, label=mark_label)
        for place, name in enumerate(names):
            if not math.isfinite(scores[name]):
                axes.text(0.01, place, "not measured", va="center", color=COLOURS["note"], fontsize=8)
        axes.set_yticks(places, [drawn[name] for name in names])
        axes.set(xlim=(0, 1), xlabel=label)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        if len(names) < len(heights):
            axes.set_title(f"the lowest {len(names)} of {len(heights)}", fontsize=10)
        return save(figure, path)


def predicted_against_true(predicted: Tensor, true: Tensor, names: Sequence[str], path: str | Path) -> Path:
    """Draw predicted over true values, one panel per target; values that are not finite are left out.

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
    shown, titles = min(len(names), _MOST_PANELS), drawn_names(names)
    columns = min(shown, 4)
    rows = -(-shown // columns)
    with matplotlib.rc_context(settings_for(names)):
        figure = Figure(figsize=(0.4 + 3.6 * columns, 0.4 + 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for index, axes in enumerate(panels):
            if index >= shown:
                axes.axis("off")
                continue
            known = true[:, index].isfinite() & predicted[:, index].isfinite()
            x, y = true[known, index].tolist(), predicted[known, index].tolist()
            low, high = min(x + y, default=0), max(x + y, default=1)
            axes.plot([low, high], [low, high], color=COLOURS["note"], linewidth=1, linestyle=":")
            axes.scatter(x, y, s=9, alpha=0.5, color=COLOURS["train"], linewidths=0)
            axes.set(title=titles[index], xlabel="true", ylabel="predicted")
        return save(figure, path)
