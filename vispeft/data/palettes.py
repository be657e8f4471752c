"""Classes and colours of published segmentation data sets, and generated colours for other classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["ClassTable", "Colour", "class_table", "make_palette", "read_palette"]

Colour = tuple[int, int, int]
"""Red, green and blue from 0 to 255."""


@dataclass(frozen=True)
class ClassTable:
    """Classes of a published data set."""

    title: str
    """Name of the data set."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    palette: tuple[Colour, ...]
    """Colour of each class."""


@cache
def class_table(name: str) -> ClassTable:
    """Return the classes of a published data set, as in mmsegmentation 1.2.2.

    Args:
        name: ade20k, cityscapes, pascal_context (60 classes, the first is the background) or voc.

    Raises:
        UnknownNameError: If there is no such data set.
    """
    text = resources.files("vispeft.data").joinpath("palettes.json").read_text(encoding="utf-8")
    tables = {key: value for key, value in json.loads(text).items() if isinstance(value, dict)}
    if name not in tables:
        raise UnknownNameError("table of classes", name, tables)
    found = tables[name]
    palette = tuple(tuple(bytes.fromhex(colour)) for colour in found["palette"])
    return ClassTable(found["title"], tuple(found["classes"]), palette)  # type: ignore[arg-type]


def make_palette(count: int) -> tuple[Colour, ...]:
    """Generate colours that are easy to distinguish; the first is black.

    Args:
        count: Number of colours, up to 256.

    Returns:
        The colours of PASCAL VOC (VOClabelcolormap.m of its development kit): the bits of the class index, from the
        lowest, go to red, green and blue in turn, from the highest bit of each.
    """
    return tuple(_voc_colour(index) for index in range(count))


def _voc_colour(index: int) -> Colour:
    red = green = blue = 0
    for shift in range(7, -1, -1):
        red |= (index & 1) << shift
        green |= (index >> 1 & 1) << shift
        blue |= (index >> 2 & 1) << shift
        index >>= 3
    return red, green, blue


def read_palette(palette: Sequence[Sequence[int]], count: int, owner: str) -> tuple[Colour, ...]:
    """Validate given colours.

    Args:
        palette: Red, green and blue for each class.
        count: Number of classes.
        owner: The object they were given to, for messages.

    Raises:
        ConfigError: If their number is wrong, or one is not a colour.
    """
    if len(palette) != count:
        raise ConfigError(f"{owner}: palette has {len(palette)} colours for {count} classes; give one for each.")
    wrong = [list(colour) for colour in palette if len(colour) != 3 or not all(0 <= part <= 255 for part in colour)]
    if wrong:
        raise ConfigError(f"{owner}: palette has {wrong[0]}; a colour is red, green and blue, each from 0 to 255.")
    return tuple((int(red), int(green), int(blue)) for red, green, blue in palette)
