"""Pictures of queries beside their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import COLOURS, save

__all__ = ["Neighbour", "NeighbourRow", "draw_neighbours"]

_PANEL = 1.3
"""Width and height of one image in inches."""
_LETTERS = 19
"""Letters of a name that fit over an image."""
_FRAMES = {True: "#009E73", False: COLOURS["validation"]}
"""Green and orange-red of Okabe and Ito; a wrong one has a dashed frame as well."""
_STYLES = {True: "-", False: (0, (3, 1.5))}


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One neighbour in a picture."""

    image: Tensor
    """RGB, uint8 (3, H, W)."""
    score: float
    """Its score, the larger the more similar."""
    right: bool | None = None
    """Whether it has the query's label; None if a label is not known."""
    title: str = ""
    """Name of its class, which is drawn unless it is the query's; empty for none."""


@dataclass(frozen=True, kw_only=True)
class NeighbourRow:
    """A query with its neighbours, the nearest first."""

    image: Tensor
    """RGB, uint8 (3, H, W)."""
    title: str
    """Name of the query, such as its class."""
    neighbours: Sequence[Neighbour]
    """May be fewer than in other rows."""


def draw_neighbours(rows: Sequence[NeighbourRow], path: str | Path) -> Path:
    """Draw a row for each query: the query, then its neighbours with their scores.

    Right ones and wrong ones are framed, and the names of the wrong ones stand below their scores.

    Args:
        rows: The queries; sizes of images may differ.
        path: The PNG file to write.

    Returns:
        The PNG file.

    Raises:
        DataError: If there is no query.
        FileError: If the picture cannot be written.
    """
    if not rows:
        raise DataError("There is no query whose neighbours could be drawn.")
    columns = 1 + max(len(row.neighbours) for row in rows)
    wrong = [n.title for row in rows for n in row.neighbours if _is_named(n)]
    titles = list(dict.fromkeys([*(row.title for row in rows), *wrong]))
    drawn = dict(zip(titles, drawn_names(titles, _LETTERS), strict=True))
    known = sorted({n.right for row in rows for n in row.neighbours if n.right is not None}, reverse=True)
    with matplotlib.rc_context(settings_for(titles, axes_grid=False)):
        above = 0.37 if wrong else 0.25  # two lines or one
        height = (_PANEL + above) * len(rows) + (0.35 if known else 0.1)
        figure = Figure(figsize=(max(_PANEL * columns, 2.5), height), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for places, row in zip(grid, rows, strict=True):
            for place in places:
                place.axis("off")
            _show(places[0], row.image, drawn[row.title])
            for place, neighbour in zip(places[1:], row.neighbours, strict=False):
                name = f"\n{drawn[neighbour.title]}" if _is_named(neighbour) else ""
                _show(place, neighbour.image, f"{neighbour.score:.3f}{name}")
                if neighbour.right is not None:
                    _frame(place, neighbour.right)
        if known:
            labels = {True: "same label", False: "another label"}
            handles = [
                Patch(
                    facecolor="none",
                    edgecolor=_FRAMES[right],
                    linestyle=_STYLES[right],
                    linewidth=2,
                    label=labels[right],
                )
                for right in known
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
        return save(figure, path)


def _is_named(neighbour: Neighbour) -> bool:
    return neighbour.right is not True and neighbour.title != ""


def _show(place: Axes, image: Tensor, title: str) -> None:
    place.imshow(image.cpu().permute(1, 2, 0).numpy())
    place.set_title(title, fontsize=7)


def _frame(place: Axes, right: bool) -> None:
    """Draw a frame on the border of an image, whose axes are off."""
    (left, end), (bottom, top) = place.get_xlim(), place.get_ylim()
    corners = ([left, end, end, left, left], [bottom, bottom, top, top, bottom])
    place.plot(*corners, color=_FRAMES[right], linestyle=_STYLES[right], linewidth=3, clip_on=False)
    place.set(xlim=(left, end), ylim=(bottom, top))
