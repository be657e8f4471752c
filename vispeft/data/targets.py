"""Conversion of labels in files to training targets."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vispeft.data.listing import Finding, Target, gather
from vispeft.errors import ConfigError, counted

__all__ = ["Entry", "LabelError", "check_labelling", "encode"]


class LabelError(ValueError):
    """Error for an invalid label, with the code and text of its finding."""

    def __init__(self, code: str, text: str) -> None:
        """Store code and text of the finding.

        Args:
            code: Short name of its kind.
            text: The problem and its remedy.
        """
        super().__init__(text)
        self.code, self.text = code, text


class Entry(NamedTuple):
    """One image of a list: its name, its label as read, and its place in the list."""

    name: str
    label: Any
    where: str


DIGITS = 18
"""Largest number of digits of a class index, which then fits into 64 bits."""

UNNAMED = 1000
"""Number of unnamed classes always accepted; more need at least as many images."""

SHOWN = 80
"""Largest number of characters of a label in a message."""

MISSING = LabelError("label-missing", "without a label; give one, or leave the image out")


def check_labelling(owner: str, target: str, names: Sequence[str] | None) -> None:
    """Validate the settings of labels.

    Args:
        owner: The data module, for messages.
        target: Kind of targets.
        names: Names of the classes, or None.

    Raises:
        ConfigError: If one of them is invalid.
    """
    if target not in ("class", "multilabel", "regression"):
        raise ConfigError(f"{owner}(target={target!r}): the choices are class, multilabel and regression.")
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"{owner}: names has the same name twice.")


def encode(
    entries: Mapping[str, Sequence[Entry]],
    target: Target,
    class_names: Sequence[str] | None = None,
    renumber: bool = False,
) -> tuple[tuple[str, ...], dict[str, tuple[list[Entry], Tensor]], list[Finding]]:
    """Encode the labels of all splits.

    Classes are whole numbers from 0, or words; words become classes in sorted order.

    Args:
        entries: Entries by split.
        target: Kind of targets.
        class_names: Names of the classes; None derives them from the labels.
        renumber: Whether to number the occurring classes 0, 1, ... in sorted order.

    Returns:
        Names of the classes (or the numbers), entries with a valid label and their targets by split, and findings about
        the other entries.
    """
    read = _number if target == "regression" else _labels if target == "multilabel" else _one_label
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    good: dict[str, list[tuple[Entry, Any]]] = {}
    for split, listed in entries.items():
        good[split] = []
        for entry in listed:
            try:
                good[split].append((entry, read(entry.label)))
            except LabelError as error:
                problems[error.code, f"{{n}} {error.text}"].append(entry.where)
    doubts = _doubt(good, problems) if class_names is None and target != "regression" else []
    names, place = _vocabulary([value for pairs in good.values() for _, value in pairs], target, class_names, renumber)
    encoded: dict[str, tuple[list[Entry], Tensor]] = {}
    for split, pairs in good.items():
        kept, rows = [], []
        for entry, value in pairs:
            try:
                rows.append(place(value))
                kept.append(entry)
            except LabelError as error:
                problems[error.code, f"{{n}} {error.text}"].append(f"{entry.where} ({_shown(value)})")
        shape = (0,) if target == "class" else (0, len(names))
        kind = torch.long if target == "class" else torch.float32
        encoded[split] = (kept, torch.tensor(rows, dtype=kind) if rows else torch.empty(shape, dtype=kind))
    found = {(c, text.replace("{n}", counted(len(places), "image"))): places for (c, text), places in problems.items()}
    return names, encoded, [*gather("error", found), *doubts]


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


# ------------------------------------------------------------------ doubtful labels


def _doubt(good: dict[str, list[tuple[Entry, Any]]], problems: dict[tuple[str, str], list[str]]) -> list[Finding]:
    """Find labels that are hardly names of classes, and take out those that are certainly none.

    Args:
        good: Entries and their parsed labels by split; numerals among whole numbers are removed.
        problems: Receives the removed ones.
    """
    labels = Counter(one for pairs in good.values() for _, value in pairs for one in _parts(value))
    words = [one for one in labels if isinstance(one, str)]
    numerals = {one for one in words if _is_numeral(one)}
    if len(words) < len(labels):
        text = "{n} with a number that is not whole, or not in plain digits, among whole numbers"
        for split, pairs in good.items():
            odd = [pair for pair in pairs if not numerals.isdisjoint(_parts(pair[1]))]
            problems["label-kind", text] += [f"{entry.where} ({_shown(value)})" for entry, value in odd]
            good[split] = [pair for pair in pairs if numerals.isdisjoint(_parts(pair[1]))]
        text = "Labels are whole numbers and words, and each of these words is a class of its own"
        places = [f"{_shown(word)} ({counted(labels[word], 'image')})" for word in sorted(set(words) - numerals)]
        return gather("warning", {("labels-mixed", text): places})
    places = [f"{_shown(one)} ({counted(labels[one], 'image')})" for one in sorted(numerals)]
    if len(numerals) < len(words):
        text = "Labels are words and numbers, and each of these numbers is a class of its own"
        return gather("warning", {("labels-mixed", text): places})
    text = "Labels are numbers and become classes of their own; for numbers to predict set target: regression"
    return gather("warning", {("numbers-as-classes", text): places})


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_numeral(word: str) -> bool:
    """Whether a word is a number in another form than plain digits, such as 1e5, 2.0, nan or ²."""
    try:
        float(word)
    except ValueError:
        return word.isnumeric()
    return True


# ------------------------------------------------------------------ reading


def whole_number(digits: str) -> int | str:
    """Parse a whole number; one too long for a class index stays text.

    Args:
        digits: Decimal digits, with a minus in front of a negative number.
    """
    return int(digits) if len(digits) <= DIGITS else digits


def _one_label(raw: Any) -> int | str:
    """Parse the class of an image."""
    if isinstance(raw, (list, tuple)) and raw and all(isinstance(one, (int, str)) for one in raw):
        raise LabelError("label-kind", "with a list of labels; set target: multilabel, or leave one of them")
    return _label(raw)


def _label(raw: Any) -> int | str:
    """Parse one class: a whole number, or a word."""
    if raw is None or raw == "" or raw == []:
        raise MISSING
    if isinstance(raw, (bool, list, tuple, dict)):
        raise LabelError("label-kind", "with a label that is neither a whole number nor a word")
    if isinstance(raw, float):
        if not raw.is_integer():
            raise LabelError("label-kind", "with a label that is no whole number; for numbers set target: regression")
        raw = str(int(raw))
    if not isinstance(raw, str):
        return int(raw)
    text = raw.strip()
    if not text.removeprefix("-").isdecimal():
        return text
    if len(text) > DIGITS:
        raise LabelError("label-range", f"with a label of more than {DIGITS} digits")
    return int(text)


def _labels(raw: Any) -> tuple[int | str, ...]:
    """Parse any number of labels: a list, or text with commas; ``-`` or an empty list means none."""
    if raw is None or raw == "":
        raise LabelError("label-missing", "without a label; write - (in JSON []) for an image without any")
    if isinstance(raw, str):
        raw = [] if raw.strip() == "-" else raw.split(",")
    found = [_label(one) for one in (raw if isinstance(raw, (list, tuple)) else [raw])]
    if len(set(found)) < len(found):
        raise LabelError(
            "label-kind", "with a label twice; list the labels that hold, since a table of 0 and 1 for each is not read"
        )
    return tuple(found)


def _number(raw: Any) -> tuple[float, ...]:
    """Parse one number or several."""
    if raw is None or raw == "" or raw == []:
        raise MISSING
    if isinstance(raw, str):
        raw = raw.split(",")
    try:
        numbers = tuple(float(one) for one in (raw if isinstance(raw, (list, tuple)) else [raw]))
    except (TypeError, ValueError):
        raise LabelError("label-kind", "with a label that is no number, and target is regression") from None
    if not all(math.isfinite(number) for number in numbers):
        raise LabelError("label-kind", "with a number that is not finite")
    return numbers


# ------------------------------------------------------------------ giving numbers


def _vocabulary(values: Sequence[Any], target: Target, given: Sequence[str] | None, renumber: bool) -> Any:
    """Return the names, and the function from a parsed label to its target."""
    if target == "regression":
        return _numbers(values, given)
    found = {one for value in values for one in value} if target == "multilabel" else set(values)
    names, index = _classes(found, given, renumber, limit=max(UNNAMED, len(values)))

    def place(label: Any) -> int:
        if label in index:
            return index[label]
        if isinstance(label, int):
            raise LabelError("label-range", f"with a label outside 0 to {len(names) - 1}")
        raise LabelError("label-range", f"with a label that is none of the {counted(len(names), 'class name')}")

    if target == "class":
        return names, place

    def place_all(labels: tuple[Any, ...]) -> list[float]:
        row = [0.0] * len(names)
        for label in labels:
            row[place(label)] = 1.0
        return row

    return names, place_all


def _classes(
    found: set[Any], given: Sequence[str] | None, renumber: bool, limit: int
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return class names and the index of each label; a stray number from `limit` on adds no classes below it."""
    words = sorted(one for one in found if isinstance(one, str))
    numbers = sorted(one for one in found if isinstance(one, int))
    if renumber and (given is None or not words):  # labels that are names are matched with given names, never counted
        # By value if all are numbers, as in the published code; otherwise by text.
        ordered = numbers if not words else sorted(found, key=str)
        names = tuple(given) if given is not None else tuple(str(one) for one in ordered)
        return names, {one: index for index, one in enumerate(ordered) if index < len(names)}
    if given is None and words:
        given = sorted({*words, *(str(number) for number in numbers)})
        return tuple(given), {**{int(n): i for i, n in enumerate(given) if n.isdecimal()}, **_by_name(given)}
    names = (
        tuple(given)
        if given is not None
        else tuple(str(n) for n in range(max([-1, *(n for n in numbers if n < limit)]) + 1))
    )
    return names, {**{index: index for index in range(len(names))}, **_by_name(names)}


def _by_name(names: Sequence[str]) -> dict[Any, int]:
    return {name: index for index, name in enumerate(names)}


def _numbers(values: Sequence[tuple[float, ...]], given: Sequence[str] | None) -> Any:
    # The most common length: a single longer label must not invalidate all others.
    lengths = Counter(len(value) for value in values).most_common(1)
    width = len(given) if given is not None else lengths[0][0] if lengths else 1
    names = tuple(given) if given is not None else _default_names(width)

    def place(value: tuple[float, ...]) -> list[float]:
        if len(value) != width:
            raise LabelError("label-kind", f"without {counted(width, 'number')}")
        return list(value)

    return names, place


def _default_names(width: int) -> tuple[str, ...]:
    return ("value",) if width == 1 else tuple(f"value {index}" for index in range(width))
