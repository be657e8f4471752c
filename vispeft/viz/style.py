"""Style and saving, shared by all plots."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vispeft.storage.disk import write_atomically

__all__ = ["COLOURS", "SERIES", "SETTINGS", "as_svg", "save"]

# Distinguishable with any kind of colour vision (Okabe and Ito, 2008).
COLOURS = {"train": "#0072B2", "validation": "#D55E00", "note": "#555555"}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
"""Colours of things that are compared, such as runs; the same source."""
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.usetex": False,
}
"""Settings for `matplotlib.rc_context`; the user's own are unchanged."""


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG atomically, without a display.

    Args:
        figure: The figure.
        path: The file.

    Returns:
        The file.
    """
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(content, format="png", dpi=150)
    write_atomically({Path(path): content.getvalue()})
    return Path(path)


def as_svg(figure: Figure) -> bytes:
    """Draw a figure as SVG, whose letters are outlines, so that it needs no font. Equal figures give equal bytes.

    Args:
        figure: The figure.
    """
    content = io.BytesIO()
    with matplotlib.rc_context({**SETTINGS, "svg.fonttype": "path", "svg.hashsalt": "vispeft"}):
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return content.getvalue()
