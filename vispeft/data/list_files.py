"""Reading of list files: text with a path and a label per line, and JSON from path to label."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vispeft.data.listing import Finding, gather
from vispeft.data.targets import Entry, whole_number
from vispeft.data.trees import EXTENSIONS, is_image, open_regular
from vispeft.errors import DataError

__all__ = ["LIST_ENDINGS", "read_json", "read_lines", "read_text"]

LIST_ENDINGS = (".txt", ".csv", ".tsv", ".lst", ".list")
"""Suffixes of text lists."""

SEPARATORS = ("\t", " ", ",", ";")
"""Separators of a path and its label, in the order in which they are tried."""
SAMPLE = 1000
"""Lines that are looked at to find the separator of a list."""

HEADERS = ("file", "file_name", "filename", "id", "image", "image_id", "image_path", "img", "name", "path")
"""Names of the first column, for lists whose paths have no ending."""

GOES_ON = re.compile(rf"({'|'.join(map(re.escape, EXTENSIONS))})[\s,;]", re.IGNORECASE)
"""The end of an image's name inside of a path."""


def read_lines(path: Path, findings: list[Finding]) -> list[Entry]:
    """Read a text list: a path and a label per line.

    Tabs, spaces, commas or semicolons separate them: whichever gives paths that end like images in most lines. Spaces
    may be part of a path, and the last one counts; paths and labels may stand in quotation marks.

    Args:
        path: The file.
        findings: Receives what is remarkable about the list.

    Raises:
        DataError: If it cannot be read, or labels stand in front of the paths.
    """
    stripped = enumerate(map(str.strip, read_text(path).split("\n")), start=1)
    lines = [(number, text) for number, text in stripped if text and not text.startswith("#")]
    separator = _separator([text for _, text in lines[:SAMPLE]])
    rows = [(number, _fields(text, separator)) for number, text in lines]
    if len(rows) > 1 and _is_header(rows[0][1], [fields for _, fields in rows[1:SAMPLE]]):
        text = "A first line that is no image is taken for a header"
        findings.append(Finding("warning", "list-header", text, (f"{path.name}:{lines[0][0]} ({lines[0][1]})",)))
        del rows[0]
    _check_order(path, [fields for _, fields in rows])
    text = "Lines whose path goes on behind an image's ending; a label of several words stands behind a tab"
    odd = [f"{path.name}:{n} ({f[0]})" for n, f in rows if not is_image(f[0]) and GOES_ON.search(f[0])]
    findings += gather("error", {("list-format", text): odd})
    return [Entry(fields[0], _label(fields), f"{path.name}:{number}") for number, fields in rows]


def _label(fields: Sequence[str]) -> str | list[str] | None:
    """Return the label of a line: text, a list if it has several columns, or None."""
    if len(fields) < 3:
        return fields[1] if len(fields) == 2 else None
    return list(fields[1:])


def _separator(lines: Sequence[str]) -> str:
    """Choose the separator that gives paths that end like images in most lines."""
    scores = dict.fromkeys(SEPARATORS, 0)
    for separator in SEPARATORS:
        split = (_fields(text, separator) for text in lines)
        scores[separator] = sum(is_image(fields[0]) for fields in split if len(fields) > 1)
    best = max(SEPARATORS, key=lambda separator: scores[separator])
    if scores[best]:
        return best
    # No path has a known ending: the first separator that every line has, and a space otherwise.
    return next((separator for separator in SEPARATORS if all(separator in text for text in lines)), " ")


def _fields(text: str, separator: str) -> list[str]:
    """Split a line; a line without the separator is a path without a label."""
    if separator != " ":
        try:
            fields = [field.strip() for field in next(csv.reader([text], delimiter=separator, skipinitialspace=True))]
        except csv.Error:
            return [text]
        while len(fields) > 2 and not fields[-1]:
            fields.pop()  # spreadsheets fill lines up
        return fields
    name, _, label = _between_quotes(text) or text.replace("\t", " ").rpartition(" ")
    return [name.strip(), label] if name else [label]


def _between_quotes(text: str) -> tuple[str, str, str] | None:
    """Split a line whose path or label, or both, stand in quotation marks."""
    if text[0] not in "\"'" and text[-1] not in "\"'":
        return None
    found = re.fullmatch(r"""(?:(["'])(.+)\1|(.+?))\s+(?:(["'])(.*)\4|(\S+))""", text)
    if found is None:
        return None
    return found[2] or found[3], " ", found[5] if found[4] else found[6]


def _is_header(first: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether the first line names the columns."""
    if is_image(first[0]):
        return False
    if first[0].lower() in HEADERS:
        return True
    return all(is_image(fields[0]) for fields in others)


def _check_order(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Refuse a list whose labels stand in front of the paths.

    Raises:
        DataError: If they do in every line.
    """
    if rows and all(not is_image(fields[0]) and any(map(is_image, fields[1:])) for fields in rows):
        found = next(field for field in rows[0][1:] if is_image(field))
        raise DataError(
            f"{path} has the label, or another column, in front of the path, such as {rows[0][0]!r} and {found!r}. "
            "Write the path first, and then its label."
        )


def read_json(path: Path) -> list[Entry]:
    """Read a JSON object from path to label.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read, or is not such an object.
    """
    try:
        pairs = json.loads(read_text(path), object_pairs_hook=lambda pairs: pairs, parse_int=whole_number)
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from error
    except RecursionError:
        raise DataError(f"{path} is no JSON object from path to label: it is nested too deeply.") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f'{path} is no JSON object from path to label, such as {{"birds/1.jpg": 3}}.')
    return [Entry(name, label, f"{path.name} {name}") for name, label in pairs]


def read_text(path: Path) -> str:
    """Read a text file; line ends become newlines.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read, or is no text in UTF-8.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, ValueError) as error:  # a path with a zero byte raises ValueError
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:8] if os.path.isdir(path.parent) else []
        hint = f" There are: {', '.join(beside)}." if beside else ""
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"The list {str(path)!r} could not be read ({reason}).{hint}") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else error.reason
        raise DataError(f"{path} is no text in UTF-8 ({kind}). Save it as UTF-8.") from error
