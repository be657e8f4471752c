"""Names of classes and labels in pictures: any letters, any length."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

from vispeft.errors import printable
from vispeft.viz.style import SETTINGS

__all__ = ["drawn_names", "settings_for"]

logger = logging.getLogger(__name__)

_LONGEST = 36
"""Letters of a name above which its middle is left out; a longer one would leave no room for the picture."""
_BOXES = "last resort"
"""Beginning of the name of a font that has a box for every letter."""


def settings_for(names: Sequence[str], **further: Any) -> dict[str, Any]:
    """Return the settings for `matplotlib.rc_context` of a picture with these names.

    Args:
        names: Names in the picture.
        further: Settings in addition to `SETTINGS`, with underscores for dots.
    """
    fonts, _ = _fonts(_letters(names))
    more = {name.replace("_", "."): value for name, value in further.items()}
    return {**SETTINGS, **more, "font.family": [*matplotlib.rcParams["font.family"], *fonts]}


def drawn_names(names: Sequence[str], longest: int = _LONGEST) -> list[str]:
    """Return names as a picture shows them.

    Control characters are escaped, the middle of long names is left out, and an empty name is said to be empty. Where
    no installed font has a letter of a name, its place in the list stands for it, and a warning says so once.

    Args:
        names: Names of all classes, in their order.
        longest: Letters of a name above which its middle is left out.
    """
    _, missing = _fonts(_letters(names))
    lost = [name for name in names if missing & set(name)]
    if lost:
        _say_lost(tuple(lost))
    return [f"#{index}" if missing & set(name) else _short(name, longest) for index, name in enumerate(names)]


def _short(name: str, longest: int) -> str:
    shown = " ".join(printable(_visible(name)).split()) or "(empty)"
    if len(shown) > longest:
        half = longest // 2
        shown = f"{shown[:half]}…{shown[-half + 1 :]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves out labels that start with it


def _visible(name: str) -> str:
    """Remove joiners and marks of direction, for which fonts have no picture."""
    return "".join(letter for letter in name if unicodedata.category(letter) != "Cf")


def _letters(names: Sequence[str]) -> frozenset[str]:
    """Return the letters that a font has to have: all printable ones."""
    return frozenset(letter for name in names for letter in _visible(name) if letter.isprintable() and letter != " ")


@lru_cache(maxsize=16)
def _fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find installed fonts for letters that the chosen ones lack.

    Returns:
        Names of further fonts, and the letters that no font has.
    """
    missing = set(letters)
    for family in matplotlib.rcParams["font.family"]:
        missing -= _has(findfont(FontProperties(family=[family])))
    found: list[str] = []
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", str(font.weight), font.name)):
        if not missing:
            break
        if font.name in found or font.name.lower().startswith(_BOXES):
            continue
        if missing & (letters_of := _has(font.fname)):
            found.append(font.name)
            missing -= letters_of
    return tuple(found), frozenset(missing)


@cache
def _has(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # a font that was removed, or is broken
        return frozenset()


@cache
def _say_lost(names: tuple[str, ...]) -> None:
    """Warn that names are replaced, once for the same names."""
    listing = ", ".join(names[:3])
    logger.warning(
        "No installed font has all letters of %s, so pictures show %d %s as a number, such as #0. Install "
        "a font that has them, such as Noto Sans CJK.",
        listing,
        len(names),
        "name" if len(names) == 1 else "names",
    )
