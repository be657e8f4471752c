"""Arguments of a call, held against its annotations.

The parser of configs does this for configs; in a script, a number given as text would fail somewhere behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from vispeft.errors import ConfigError

__all__ = ["ChecksArguments", "check_arguments"]

_NONE = type(None)
_ONE: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    dict: "a dictionary",
    Mapping: "a dictionary",
    _NONE: "None",
}
"""Words for the kinds that are checked, beside lists of them; any other kind is left to the call itself."""
_MANY: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
_LISTS = (list, tuple, Sequence, Iterable)
_SHOWN = 60
"""Letters of a value in a message."""


class ChecksArguments:
    """A class whose arguments are held against their annotations, before its `__init__` and those of its bases run."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Check the arguments that are given by name.

        Raises:
            ConfigError: If one is of another kind than its annotation.
        """
        check_arguments(cls, given)
        return super().__new__(cls)


def check_arguments(owner: type | Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments of another kind than their annotations: numbers, texts, paths, dictionaries, and lists of them.

    A path counts as a text, and a text never as a list of its letters.

    Args:
        owner: The function, or the class whose `__init__` takes them, or passes them on to that of a base.
        given: Values by name; other names than those of arguments are left to the call.

    Raises:
        ConfigError: If one is of another kind.
    """
    for name, value in given.items():
        kinds = _kinds(owner, name)
        if kinds and not any(_fits(value, kind) for kind in kinds):
            shown = repr(value)
            shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
            raise ConfigError(f"{owner.__name__}({name}={shown}): {' or '.join(map(_word, kinds))} is needed.")


@cache
def _kinds(owner: type | Callable[..., Any], name: str) -> tuple[Any, ...]:
    """Return the kinds of an argument; none if it has no annotation that can be read."""
    for function in _functions(owner):
        if name in getattr(function, "__annotations__", {}):
            # One at a time: names that are imported for type checking only cannot be read.
            one: Any = SimpleNamespace(__annotations__={name: function.__annotations__[name]})
            with suppress(NameError):
                return _parts(get_type_hints(one, globalns=getattr(function, "__globals__", {}))[name])
            return ()
    return ()


def _functions(owner: type | Callable[..., Any]) -> Iterator[Any]:
    if not isinstance(owner, type):
        yield owner
        return
    for part in owner.__mro__:
        if "__init__" in vars(part):
            yield vars(part)["__init__"]


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _items(kind: Any) -> tuple[Any, ...]:
    """Return the kinds of the items of a list."""
    return tuple(part for item in get_args(kind) if item is not Ellipsis for part in _parts(item))


def _is_list(kind: Any) -> bool:
    return (get_origin(kind) or kind) in _LISTS


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; of one that is not checked, every value is."""
    if _is_list(kind):
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
            return False
        items = _items(kind)
        return not isinstance(value, (list, tuple)) or not items or all(any(_fits(v, k) for k in items) for v in value)
    if get_origin(kind) is Literal:  # which of its values it may be, a class says itself
        return any(isinstance(value, type(choice)) for choice in get_args(kind))
    kind = get_origin(kind) or kind
    if kind not in _ONE:
        return True
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind in (str, Path):
        return isinstance(value, (str, os.PathLike))
    truth = type(value).__name__ in ("bool", "bool_")  # numpy has one of its own
    if kind is bool:
        return truth or (isinstance(value, Integral) and value in (0, 1))
    if kind is _NONE:
        return value is None
    return not truth and isinstance(value, Integral if kind is int else Real)


def _word(kind: Any) -> str:
    if _is_list(kind):
        items = [_MANY[item] for item in dict.fromkeys(_items(kind)) if item in _MANY]
        return f"a list of {' or '.join(items)}" if items else "a list"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _ONE.get(get_origin(kind) or kind, str(kind))
