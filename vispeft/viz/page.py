"""Pages of HTML that need no other file: pictures inside, no code, no request."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from vispeft.errors import FileError, brief, printable_lines
from vispeft.viz.style import as_svg

__all__ = ["Picture", "draw_page", "photograph", "vector"]

_MOST_BYTES = 200_000
"""Size above which a picture is kept as JPEG: one with photographs in it is many times smaller so."""
_MOST_PIXELS = 1600
"""Largest width of a picture; a page is 1,100 pixels wide, and some screens have two for each."""
_NARROW = 600
"""Largest width of pictures that stand side by side."""
_LEAST = 640
"""Width below which no picture with a line of its own is shown."""
_DENSITY = 0.72
"""Pixels of a page for each of a picture: at 150 dots per inch, letters of 10 points are as small as 14 pixels."""
_QUALITY = 88
"""Quality of JPEG, at which frames and letters over photographs stay clean."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture inside a page."""

    source: str
    """The picture as a ``data:`` address."""
    title: str
    """The line below it, which is read out where it is not seen."""
    width: int
    """Largest width on the page, in its pixels, above which letters would be larger than those of the page."""

    @property
    def narrowest(self) -> int:
        """Width of a wide one on a narrow screen, in pixels: its letters stay larger than 11 of them."""
        return min(max(_LEAST, round(0.8 * self.width)), 1000)

    @property
    def wide(self) -> bool:
        """Whether it has a line of its own; a narrow screen shows a part of it, and the rest by scrolling."""
        return self.width > _NARROW


def vector(figure: Figure, title: str) -> Picture:
    """Take a figure into a page, as SVG.

    Args:
        figure: The figure.
        title: The line below it.
    """
    width = round(figure.get_figwidth() * 108)  # letters of 10 points are then 15 pixels high
    return Picture(source=_address("image/svg+xml", as_svg(figure)), title=title, width=width)


def photograph(path: Path, title: str) -> Picture:
    """Take a picture file into a page: as PNG where that is small, else as JPEG.

    Args:
        path: The file.
        title: The line below it.

    Raises:
        FileError: If it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"The picture {path} could not be read: {brief(error)}") from error
    width = round(image.width * _DENSITY)
    if image.width > _MOST_PIXELS:
        image = image.resize((_MOST_PIXELS, round(image.height * _MOST_PIXELS / image.width)))
    kind, content = "image/png", _encoded(image, "PNG", optimize=True)
    if len(content) > _MOST_BYTES:
        kind, content = "image/jpeg", _encoded(image, "JPEG", quality=_QUALITY, subsampling=0)
    return Picture(source=_address(kind, content), title=title, width=width)


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def draw_page(template: str, values: Mapping[str, Any]) -> bytes:
    """Fill a template of this folder. Whatever the values hold is text on the page and never code.

    Args:
        template: Name of the file.
        values: Values by the names in the template.
    """
    return _environment().get_template(template).render(values).encode("utf-8", "backslashreplace")


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable_lines(value) if type(value) is str else value,
    )  # fmt: skip
    made.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    return made
