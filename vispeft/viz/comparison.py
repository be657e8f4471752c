"""Plots that compare runs: a figure of merit against a size, and curves of several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import SERIES

__all__ = ["Point", "compared_curves", "trade_off"]

_MARKS = "osD^vPX*"
"""Shapes of the points, as many as there are colours, so that none is told by its colour alone."""
_MOST_NAMED = 16
"""Things above which a legend is left out: it would be larger than the plot, and colours with shapes repeat."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run, or a method, in a plot."""

    name: str
    """Its name."""
    size: float
    """What it costs, above 0: parameters, or bytes."""
    value: float
    """Its figure of merit."""


def trade_off(points: Sequence[Point], size: str, value: str) -> Figure:
    """Draw a figure of merit against a size, on a logarithmic axis; each point has its number beside it.

    Args:
        points: The runs or methods, in the order of their numbers; those that are not finite, or cost nothing, are
            left out and keep their number.
        size: Name of the horizontal axis.
        value: Name of the vertical axis.
    """
    names = drawn_names([point.name for point in points])
    with matplotlib.rc_context(settings_for([point.name for point in points])):
        figure = Figure(figsize=(5.2, 3.8 + _legend_height(len(points))), layout="constrained")
        axes = figure.subplots()
        for index, (point, name) in enumerate(zip(points, names, strict=True)):
            if not (math.isfinite(point.value) and point.size > 0):
                continue
            axes.plot(point.size, point.value, _MARKS[index % 8], color=SERIES[index % 8], ms=8, label=name)
            told = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(str(index + 1), (point.size, point.value), **told)
        axes.set(xlabel=size, ylabel=value, xscale="log")
        axes.margins(0.12)
        _whole_decades(axes, [point.size for point in points if point.size > 0])
        _legend(figure, len(points))
    return figure


def _whole_decades(axes: Axes, sizes: Sequence[float]) -> None:
    """Label powers of ten as 1 k or 10 M, and widen the axis to two of them, so that it can be read."""
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if not sizes:
        return
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    inside = math.floor(math.log10(max(sizes))) - math.ceil(math.log10(min(sizes))) + 1
    if inside < 2:
        axes.set_xlim(10.0**low * 0.8, 10.0 ** max(high, low + 1) * 1.25)


def compared_curves(curves: Mapping[str, Sequence[tuple[int, float]]], value: str) -> Figure:
    """Draw one metric of several runs over the epochs.

    Args:
        curves: Pairs of epoch (from zero) and value, keyed by the name of the run.
        value: Name of the vertical axis.
    """
    names = drawn_names([*curves])
    with matplotlib.rc_context(settings_for([*curves])):
        figure = Figure(figsize=(5.2, 3.8 + _legend_height(len(curves))), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(zip(names, curves.values(), strict=True)):
            epochs = [epoch + 1 for epoch, _ in points]
            heights = [value if math.isfinite(value) else math.nan for _, value in points]
            style = {"color": SERIES[index % 8], "marker": _MARKS[index % 8], "markevery": -(-len(points) // 20)}
            axes.plot(epochs, heights, ms=4, lw=1.6, label=name, **style)
        axes.set(xlabel="epoch", ylabel=value)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(figure, len(curves))
    return figure


def _legend_height(count: int) -> float:
    """Return the height of a legend in inches."""
    return 0.2 * count + 0.1 if count <= _MOST_NAMED else 0.0


def _legend(figure: Figure, count: int) -> None:
    """Name the things below the plot, one a line, if they are few."""
    if count <= _MOST_NAMED and figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=1, fontsize=8)
