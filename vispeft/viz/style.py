"""Style and saving, shared by all plots."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vispeft.storage.disk import write_atomically

__all__ = ["COLOURS", "SETTINGS", "save"]

# Distinguishable with any kind of colour vision (Okabe and Ito, 2008).
COLOURS = {"train": "#0072B2", "validation": "#D55E00", "note": "#555555"}
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
