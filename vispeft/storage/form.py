"""The form of ``adapter.json`` and of a zoo's index: one check of everything in it, before anything of it is used.

A check takes a value and raises on one that does not fit; the check of its list or mapping adds the place.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from vispeft.errors import CONTROL, FileError, printable

__all__ = [
    "READ_PIXELS",
    "FormError",
    "check_class_names",
    "check_form",
    "check_index",
    "check_notes",
    "escaped",
    "shown",
]

Check = Callable[[Any], None]

LONGEST = 1000
"""Letters of a text, such as the name of a class."""
DEEPEST = 32
"""Levels of nested lists and mappings."""
LARGEST = 2**40
"""Entries of one side of a tensor."""
PIXELS = 2**26
"""Pixels of an image that is given to a model."""
READ_PIXELS = 2**30
"""Pixels of an image file that an adapter may have been trained to read."""
_HUGE = sys.float_info.max
_CONTROL = re.compile(f"[{CONTROL}]")
_SHA = re.compile("[0-9a-f]{64}")


class FormError(FileError):
    """A value in a file does not have the form that is needed."""

    def __init__(self, says: str, place: str = "") -> None:
        """Compose the message.

        Args:
            says: The message without the place.
            place: Where the value stands; `inside` completes it on the way out.
        """
        super().__init__(f"{place.removeprefix('.')} {says}")
        self.says, self.place = says, place

    def inside(self, place: str) -> FormError:
        """Return the same error with a place in front of its own.

        Args:
            place: Such as ``.head`` or ``[3]``.
        """
        return FormError(self.says, place + self.place)


def _unfit(value: Any, needed: str) -> FormError:
    return FormError(f"is {shown(value)}; {needed} is needed.")


def shown(value: Any, at_most: int = 80) -> str:
    """Write a value of a file for a message: on one line, short, with control characters escaped.

    Args:
        value: The value.
        at_most: Largest number of letters.
    """
    if isinstance(value, str):
        text = repr(value[: at_most + 1])
    elif isinstance(value, list | dict) and len(value) > 8:
        text = f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value):,}"
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # a number of thousands of digits, or nesting without an end
            text = f"a {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= at_most else text[:at_most] + " ..."


def escaped(value: Any) -> Any:
    """Return plain values whose texts can stand in a file: control characters are escaped, long texts are cut.

    Args:
        value: A text, number, list or mapping.
    """
    if isinstance(value, str):
        return printable(value)[:LONGEST]
    if isinstance(value, Mapping):
        return {key: escaped(inside) for key, inside in value.items()}
    return [escaped(inside) for inside in value] if isinstance(value, list | tuple) else value


def check_class_names(names: Any, classes: int | None = None, unique: bool = True) -> None:
    """Check names of classes: texts that can be shown, all different, one for each output.

    Args:
        names: The names, in the order of the classifier.
        classes: Number of its outputs; None if it is not known.
        unique: Whether equal names are refused. Files may have some: ImageNet-1k has two classes called crane.

    Raises:
        FormError: If they are anything else.
    """
    _TEXTS(list(names) if isinstance(names, tuple) else names)
    if classes is not None and len(names) != classes:
        raise FormError(f"has {len(names)} names, and the classifier has {classes} outputs.")
    if unique and len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise FormError(f"has {shown(twice)} twice; every class needs a name of its own.")


# ------------------------------------------------------------------ single values


def _text(value: Any) -> None:
    if not isinstance(value, str):
        raise _unfit(value, "a text")
    if not value or len(value) > LONGEST:
        raise _unfit(value, f"a text of 1 to {LONGEST} letters")
    if _CONTROL.search(value):
        raise _unfit(value, "a text without control characters")


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _unfit(value, f"a whole number from {low} to {high}")

    return check


def _number(low: float = -_HUGE, high: float = _HUGE) -> Check:
    limit = f" from {low:g} to {high:g}" if high < _HUGE else f" of at least {low:g}" if low >= 0 else ""

    def check(value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise _unfit(value, f"a finite number{limit}")

    return check


def _truth(value: Any) -> None:
    if not isinstance(value, bool):
        raise _unfit(value, "true or false")


def _sha(value: Any) -> None:
    if not isinstance(value, str) or not _SHA.fullmatch(value):
        raise _unfit(value, "a sha256 in hexadecimal digits")


def _dtype(value: Any) -> None:
    if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
        raise _unfit(value, "the name of a dtype of PyTorch")


def _string(value: Any) -> None:
    if value != "":
        _text(value)


def _plain(value: Any, depth: int = 0) -> None:
    """Check values of any kind inside: texts, numbers, lists and mappings."""
    if depth > DEEPEST:
        raise FormError(f"is nested deeper than {DEEPEST} levels.")
    if isinstance(value, Mapping):
        _mapping(lambda inside: _plain(inside, depth + 1))(value)
    elif isinstance(value, list):
        _listed(lambda inside: _plain(inside, depth + 1))(value)
    elif isinstance(value, str):
        _string(value)
    elif value is not None and not isinstance(value, bool):
        _FINITE(value)


def _measured(value: Any) -> None:
    """Check notes of measurements, whose numbers may be infinite or undefined."""
    if not isinstance(value, Mapping):
        raise _unfit(value, "a mapping")


# ------------------------------------------------------------------ values made of others


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _listed(check: Check, at_least: int = 0, at_most: int = 10**6) -> Check:
    counts = f"{at_least}" if at_least == at_most else f"{at_least} to {at_most}"

    def each(value: Any) -> None:
        if not isinstance(value, list) or not at_least <= len(value) <= at_most:
            raise _unfit(value, f"a list of {counts}")
        for index, inside in enumerate(value):
            try:
                check(inside)
            except FormError as error:
                raise error.inside(f"[{index}]") from None

    return each


def _mapping(check: Check) -> Check:
    def each(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _unfit(value, "a mapping")
        for key, inside in value.items():
            try:
                _text(key)
                check(inside)
            except FormError as error:
                raise error.inside(f"[{shown(key)}]") from None

    return each


def _record(needed: Mapping[str, Check], allowed: Mapping[str, Check] | None = None) -> Check:
    """Check a mapping by keys, some of them needed; further ones, as of later versions, hold plain values."""
    checks = {**needed, **(allowed or {})}

    def each(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _unfit(value, "a mapping")
        for key in needed:
            if key not in value:
                raise FormError("is missing.", f".{key}")
        for key, inside in value.items():
            try:
                _text(key)
                checks.get(key, _plain)(inside)
            except FormError as error:
                raise error.inside(f".{key}" if key in checks else f"[{shown(key)}]") from None

    return each


_FINITE = _number()
_TEXTS = _listed(_text, at_most=100_000)
_SHAPE = _listed(_whole(0, LARGEST), at_most=8)
_DIGESTS = _record({"float32": _text, "bfloat16": _text, "float16": _text})
_FINGERPRINT = _record(
    {
        "function": _record({"pool": _string, "heads": _listed(_whole(0, 2**20))}),
        "class": _text,
        "dtype": _dtype,
        "parts": _mapping(_DIGESTS),
        "bound": _mapping(_record({"shape": _SHAPE, "digests": _DIGESTS})),
    }
)
_BACKBONE = _record({"name": _optional(_string), "args": _mapping(_plain), "fingerprint": _FINGERPRINT})
_PREPROCESSING = _record(
    {},
    {
        # Beyond these limits of values in [0, 1], float32 could not hold the results.
        "mean": _listed(_number(-1e6, 1e6), at_least=1, at_most=64),
        "std": _listed(_number(1e-6, 1e6), at_least=1, at_most=64),
        "input_size": _listed(_whole(1, 2**20), at_least=3, at_most=3),
        "size": _listed(_whole(1, 2**20), at_least=2, at_most=2),
        "interpolation": _text,
        "crop_pct": _optional(_number(1e-3, 1)),
        "decode": _text,
    },
)
_COLOUR = _listed(_whole(0, 255), at_least=3, at_most=3)
_READING = _record(
    {},
    {
        "transparency": _optional(_COLOUR),
        "value_range": _optional(_listed(_FINITE, at_least=2, at_most=2)),
        "max_pixels": _whole(1, LARGEST),  # earlier versions wrote more than are read
    },
)
_OUTPUT = _record(
    {},
    {
        "reading": _READING,
        "palette": _optional(_listed(_COLOUR)),
        "evaluation": _optional(_text),
        "short_side": _optional(_whole(1, 2**16)),
        "target": _optional(_text),
        "temperature": _number(1e-3, 1e3),
        "mean": _listed(_FINITE),
        "deviation": _listed(_number(low=0)),
        "decoder": _optional(_record({"name": _text})),
    },
)
_HEADER = _record(
    {
        "schema": _whole(1, 2**31),
        "digest": _text,
        "vispeft": _text,
        "timm": _text,
        "method": _record({"name": _text, "fields": _mapping(_plain)}),
        "backbone": _BACKBONE,
        "tasks": _optional(_listed(_text, at_least=1, at_most=10_000)),
        "seed": _whole(0, 2**63 - 1),
        "head": _optional(_mapping(_SHAPE)),
        "preprocessing": _PREPROCESSING,
        "class_names": _optional(_TEXTS),
        "metrics": _optional(_measured),
        "tensors": _mapping(_record({"codec": _text, "dtype": _dtype, "shape": _SHAPE})),
        "merge_error": _optional(_number(low=0)),
        "files": _mapping(_sha),
    },
    {"per_task": _truth, "output": _optional(_OUTPUT)},
)
_FIGURES = _mapping(_FINITE)
_ENTRY = _record(
    {
        "task": _text,
        "data": _text,
        "needs": _string,
        "backbone": _text,
        "method": _text,
        "figures": _FIGURES,
        "baseline": _optional(_FIGURES),
        "trainable": _whole(0, LARGEST),
        "license": _text,
        "source": _optional(_text),
        "files": _mapping(_record({"bytes": _whole(0, LARGEST), "sha256": _sha})),
    },
    {"named_there": _text},
)
_INDEX = _record({"schema": _whole(1, 2**31), "adapters": _mapping(_ENTRY), "digest": _text})


def check_index(index: Any) -> None:
    """Check the content of a zoo's ``index.json``: every key, its kind and range.

    Args:
        index: The content.

    Raises:
        FormError: If something in it is missing, of another kind or out of range.
    """
    _INDEX(index)


def check_notes(notes: Mapping[str, Any]) -> None:
    """Check notes of an adapter: class names, preprocessing, metrics and the reading of outputs.

    Args:
        notes: The notes by name; None for one that is not given.

    Raises:
        FormError: If one of them has another form.
    """
    checks: dict[str, Callable[[Any], None]] = {
        "class_names": partial(check_class_names, unique=False),
        "preprocessing": _PREPROCESSING,
        "metrics": _measured,
        "output": _OUTPUT,
    }
    _record({}, {key: _optional(check) for key, check in checks.items()})(notes)
    pixels = notes.get("preprocessing") or {}
    if len({len(pixels[key]) for key in ("mean", "std") if key in pixels}) > 1:
        means = len(pixels["mean"])
        raise _unfit(pixels["std"], f"one number for each of the {means} means").inside(".preprocessing.std")
    for key in ("input_size", "size"):
        if key in pixels and pixels[key][-2] * pixels[key][-1] > PIXELS:
            raise _unfit(pixels[key], f"a height and a width of at most {PIXELS:,} pixels").inside(
                f".preprocessing.{key}"
            )


def check_form(header: Any) -> None:
    """Check the content of ``adapter.json``: every key, its kind and range, and what belongs together.

    Args:
        header: The content.

    Raises:
        FormError: If something in it is missing, of another kind or out of range.
    """
    _HEADER(header)
    check_notes({"preprocessing": header["preprocessing"]})
    if len(set(header["tasks"] or ())) < len(header["tasks"] or ()):
        raise _unfit(header["tasks"], "a list of different names").inside(".tasks")
    rows = (header["head"] or {}).get("weight")
    _at(".class_names", _optional(lambda names: check_class_names(names, rows[0] if rows else None, unique=False)))(
        header["class_names"]
    )
    for key, values in header["backbone"]["fingerprint"]["function"].items():
        if key not in ("pool", "heads"):
            _at(f".backbone.fingerprint.function[{shown(key)}]", _TEXTS)(values)


def _at(place: str, check: Check) -> Check:
    def placed(value: Any) -> None:
        try:
            check(value)
        except FormError as error:
            raise error.inside(place) from None

    return placed
