"""JSON of files that come from others: no key twice, no endless nesting, and an error that names the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vispeft.errors import FileError, brief
from vispeft.storage.form import shown

__all__ = ["named_once", "parse_json"]


class RefusedJsonError(FileError):
    """A key twice, or a number that JSON does not have; told apart from errors of the library."""


def named_once(path: Path, pairs: Sequence[tuple[str, Any]], place: str = "") -> dict[str, Any]:
    """Make a mapping of keys and values, and refuse a key twice: Python's reader takes the last one without a word.

    Args:
        path: The file, for the message.
        pairs: Keys and values.
        place: Where in the file, for the message, such as ``in its header``.

    Raises:
        FileError: If a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RefusedJsonError(
            f"{path} has the key {shown(twice)} twice{' ' * bool(place)}{place}. Copy it again from where it came from."
        )
    return found


def parse_json(path: Path, content: bytes, *, finite: bool = True) -> Any:
    """Read JSON that anybody may have written.

    Args:
        path: The file, for messages.
        content: Its content.
        finite: Whether ``NaN`` and ``Infinity`` are refused, which JSON does not have and Python writes.

    Returns:
        Plain values.

    Raises:
        FileError: If it is no JSON, is nested too deeply, or has a key twice.
    """

    def constant(name: str) -> NoReturn:
        raise RefusedJsonError(f"{path} holds {name}, which is no number of JSON. Copy it from where it came from.")

    settings: dict[str, Any] = {"parse_constant": constant} if finite else {}
    try:
        return json.loads(content, object_pairs_hook=lambda pairs: named_once(path, pairs), **settings)
    except RefusedJsonError:
        raise
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise FileError(f"{path} is truncated or was altered: it is not valid JSON ({brief(error)})") from error
