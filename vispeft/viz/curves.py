"""Learning curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vispeft.errors import DataError, FileError
from vispeft.viz.style import COLOURS, SETTINGS, save

__all__ = ["History", "curve_figures", "learning_curves", "read_history"]

_COLUMNS = 4
"""Largest number of metrics drawn side by side."""
_MOST_MARKED = 40
"""Epochs above which points have no mark: marks would touch, and make an SVG several times as large."""

History = Mapping[str, Sequence[tuple[int, float]]]
"""Per metric, pairs of epoch (from zero) and value."""


def read_history(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read a log of Lightning's CSV logger.

    Args:
        path: ``metrics.csv``.

    Returns:
        Per metric, pairs of epoch (from zero) and value; the last value of an epoch counts.

    Raises:
        FileError: If the file cannot be read or has no epochs.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise FileError(f"The log {path} could not be read ({error.strerror}).") from error
    history: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row.get("epoch"):
            continue
        for name, value in row.items():
            if name not in ("epoch", "step") and value:
                history.setdefault(name, {})[int(row["epoch"])] = float(value)
    if not history:
        raise FileError(f"The log {path} has no values by epoch; is it the metrics.csv of a training?")
    return {name: sorted(values.items()) for name, values in history.items()}


def learning_curves(
    history: str | Path | History,
    path: str | Path,
    best_epoch: int | None = None,
    metrics: Sequence[str] | None = None,
) -> Path:
    """Draw the metrics of training and validation over the epochs.

    Args:
        history: ``metrics.csv``, or the result of `read_history`.
        path: The PNG file.
        best_epoch: Epoch of the checkpoint that was kept, counted from zero.
        metrics: Names of the metrics to draw, without the split's name; None draws all.

    Returns:
        The PNG file.

    Raises:
        FileError: If the log cannot be read, or the picture cannot be written.
        DataError: If there is nothing to draw.
    """
    values = history if isinstance(history, Mapping) else read_history(history)
    kinds = [kind for kind in _kinds(values) if metrics is None or kind in metrics]
    if not kinds:
        raise DataError(f"There are no metrics of training or validation; found {', '.join(values) or 'nothing'}.")
    with matplotlib.rc_context(SETTINGS):
        columns = min(len(kinds), _COLUMNS)
        rows = -(-len(kinds) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for kind, axes in zip(kinds, places, strict=False):
            _draw(axes, kind, values, best_epoch)
        for axes in places:
            axes.remove()
        return save(figure, path)


def curve_figures(history: History, best_epoch: int | None = None) -> dict[str, Figure]:
    """Draw each metric of training and validation over the epochs, as a figure of its own.

    Args:
        history: The result of `read_history`.
        best_epoch: Epoch of the checkpoint that was kept, counted from zero.

    Returns:
        Figures by the name of the metric, without the split's; the loss first. Empty where nothing was logged.
    """
    found = {}
    for kind in _kinds(history):
        with matplotlib.rc_context(SETTINGS):
            found[kind] = figure = Figure(figsize=(4.4, 3.1), layout="constrained")
            _draw(figure.subplots(), kind, history, best_epoch)
    return found


def _kinds(history: History) -> list[str]:
    """List the metrics of training and validation, without the split's name; the loss first."""
    splits = ("train/", "validation/")
    kinds = dict.fromkeys(name.partition("/")[2] for name in history if name.startswith(splits))
    return sorted(kinds, key=lambda kind: kind != "loss")


def _draw(axes: Axes, kind: str, values: History, best_epoch: int | None) -> None:
    for split in ("train", "validation"):
        points = values.get(f"{split}/{kind}")
        if points:
            epochs = [epoch + 1 for epoch, _ in points]
            heights = [value if math.isfinite(value) else math.nan for _, value in points]  # a gap in the line
            mark = "o" if len(points) <= _MOST_MARKED else ""
            axes.plot(epochs, heights, color=COLOURS[split], label=split, linewidth=1.8, marker=mark, markersize=3)
    if best_epoch is not None:
        axes.axvline(best_epoch + 1, color=COLOURS["note"], linewidth=1, linestyle=":", label="epoch kept")
    axes.set(xlabel="epoch", ylabel=kind.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len({epoch for split in ("train", "validation") for epoch, _ in values.get(f"{split}/{kind}", ())}) == 1:
        axes.margins(x=1)  # else the axis of a single epoch has no whole number but one, and no width
    if kind == "loss":
        axes.set_ylim(0, 1.03 * axes.get_ylim()[1])  # whole marks at the upper end too
    axes.legend()
