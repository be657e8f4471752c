"""Checks of the arguments of a class that come from a config, before any parser sees them.

An argument whose annotation names plain types only takes plain values, at any depth. One that is annotated with a class
takes a class on the closed list (`vispeft.building.known`) with arguments of its own. Anything else is refused, so that
no parser imports a module or makes an object because a value says so.
"""

from __future__ import annotations

import datetime
import enum
import importlib.util
import json
import os
import sys
import typing
from collections import abc
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import yaml

from vispeft.building.annotations import argument_type
from vispeft.building.classes import argument_names, check_argument, class_path, find_class, import_class
from vispeft.building.config_files import Node, parse_text
from vispeft.building.known import known_classes
from vispeft.errors import ConfigError, UnknownNameError, near_names
from vispeft.storage.form import shown

__all__ = [
    "CLASS_KEYS",
    "check_arguments",
    "check_class",
    "check_keys",
    "check_plain",
    "check_value",
    "class_node",
    "classes_in",
]

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a class in a config."""

_SIMPLE = {NoneType, bool, int, float, complex, str, bytes, os.PathLike, PurePath, Path, datetime.timedelta}
_LISTS = {list, tuple, set, frozenset, abc.Iterable, abc.Collection, abc.Sequence, abc.Set}
_CONTAINERS = {*_LISTS, dict, abc.Mapping}


def classes_in(annotation: Any) -> list[Any]:
    """List the parts of an annotation that are no plain types: classes, functions, and names that cannot be resolved.

    Args:
        annotation: The annotation.

    Returns:
        They; empty for plain values.
    """
    if any(annotation is plain for plain in (Any, None, object, ...)) or get_origin(annotation) is Literal:
        return []
    if parts := get_args(annotation):
        # Of Callable[...] the parts say nothing; of a container they are its values.
        origin = get_origin(annotation)
        if origin in (typing.Union, UnionType) or origin in _CONTAINERS:
            return [found for part in parts for found in classes_in(part)]
        return [annotation]
    if isinstance(annotation, type):
        plain = annotation in _SIMPLE or annotation in _CONTAINERS or issubclass(annotation, enum.Enum)
        return [] if plain else [annotation]
    return [annotation]


def check_arguments(cls: type, arguments: Mapping[str, Any], place: str) -> Node:
    """Check the arguments of a class.

    Args:
        cls: The class.
        arguments: Values by name.
        place: Where they stand in the config.

    Returns:
        The same values, with class names written out.

    Raises:
        UnknownNameError: If an argument or a class does not exist.
        ConfigError: If a value makes an object where none is taken.
    """
    known = argument_names(cls)
    for key, value in arguments.items():
        check_argument(place, str(key), known)
        check_keys(cls, str(key), value, place)
    return {key: check_value(value, argument_type(cls, key), f"{place}.{key}") for key, value in arguments.items()}


def check_keys(cls: type, name: str, value: Any, place: str) -> None:
    """Refuse keys with values for an argument that takes none, and name one that does and is called alike.

    Args:
        cls: The class.
        name: The argument.
        value: Its value, from a file or as typed.
        place: Where the class stands in the config.

    Raises:
        ConfigError: If the argument takes no keys.
    """
    found = _values_in(value, place) if isinstance(value, str) else value
    typed = isinstance(found, Mapping) and any(inner is not None for inner in found.values())  # {a} is a text
    if not typed or "class_path" in found or _takes_keys(argument_type(cls, name)):  # `check_plain` refuses classes
        return
    alike = [other for other in argument_names(cls) if name in other and _takes_keys(argument_type(cls, other))]
    advice = f"Did you mean {place}.{alike[0]}?" if alike else "Give a single value."
    raise ConfigError(f"{place}.{name} was given keys with values ({shown(found)}), and takes none. {advice}")


def check_value(value: Any, annotation: Any, place: str) -> Any:
    """Check the value of one argument.

    Args:
        value: The value, from a file or as typed.
        annotation: The argument's annotation.
        place: Where it stands in the config.

    Returns:
        The value, with class names written out.

    Raises:
        UnknownNameError: If it names a class that is not on the list, or is none of the choices.
        ConfigError: If it makes an object where none is taken, or is a text where a list is needed.
    """
    taken = classes_in(annotation)
    if not taken:
        check_plain(value, place)
        value = _checked_choice(value, annotation, place)
        if isinstance(value, str):
            _check_text(value, annotation, place)
            _check_list(value, annotation, place)
        return value
    if isinstance(value, str):
        inner = _values_in(value, place)
        if not isinstance(inner, str):
            return check_value(inner, annotation, place)
        if _takes_text(annotation) and not _names_an_object(value, taken):
            return value
    if isinstance(value, (list, tuple)):
        inside = _inside(annotation) or annotation
        return [check_value(part, inside, place) for part in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping) and get_origin(annotation) in (dict, abc.Mapping):
        return {key: check_value(part, get_args(annotation)[1], f"{place}.{key}") for key, part in value.items()}
    return _check_object(value, taken, place)


def _check_object(value: Any, taken: Sequence[Any], place: str) -> Node:
    """Check the name of a class, or a class with arguments, or the arguments of the class that is taken."""
    bases = [part for part in taken if isinstance(part, type) and known_classes(part, itself=True)]
    if not bases:
        names = " or ".join(getattr(part, "__name__", str(part)) for part in taken)
        raise ConfigError(
            f"{place} is {value!r}, and takes an object ({names}) that a config cannot name. Leave it out."
        )
    base = bases[0]
    if isinstance(value, Mapping) and "class_path" not in value and base in known_classes(base, itself=True):
        return check_arguments(base, value, place)
    return check_class(value, base, base.__name__.lower(), place)


def check_class(value: Any, base: type, kind: str, place: str) -> Node:
    """Check a class with its arguments.

    Args:
        value: Its name, or ``class_path`` with ``init_args``.
        base: The class it is derived from.
        kind: Noun for the class, for messages.
        place: Where it stands in the config.

    Returns:
        ``class_path``, as configs write it, and the arguments.

    Raises:
        UnknownNameError: If the class, a key or an argument does not exist.
        ConfigError: If the class is not on the list, or an argument makes an object where none is taken.
    """
    node = class_node(value, kind, place)
    cls = import_class(find_class(str(node["class_path"]), base, kind=kind, place=place, itself=True))
    checked: Node = {}
    for key in ("init_args", "dict_kwargs"):
        arguments = node.get(key) or {}
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"{place}.{key} is {arguments!r}; keys with values are needed there.")
        if arguments:
            checked[key] = check_arguments(cls, arguments, place)
    return {"class_path": class_path(cls), **checked}


def class_node(value: Any, kind: str, place: str) -> Mapping[str, Any]:
    """Return the keys of a class in a config, of which its name may stand alone.

    Args:
        value: Its name, or ``class_path`` with ``init_args``.
        kind: Noun for the class, for messages.
        place: Where it stands in the config.

    Raises:
        UnknownNameError: If there is another key.
        ConfigError: If no class is named.
    """
    node = {"class_path": value} if isinstance(value, str) else value
    for key in node if isinstance(node, Mapping) else ():
        if key not in CLASS_KEYS:
            raise UnknownNameError("key", f"{place}.{key}", [f"{place}.{known}" for known in CLASS_KEYS])
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise ConfigError(
            f"{place} is {shown(value)}, which has no class_path; the name of a {kind} is needed, alone or as "
            "class_path with init_args."
        )
    return node


def check_plain(value: Any, place: str) -> None:
    """Refuse a value that a parser would make an object of, at any depth and inside of texts, too.

    Args:
        value: The value.
        place: Where it stands in the config.

    Raises:
        ConfigError: If it is none of numbers, texts, lists and keys with values, or has the key ``class_path``.
    """
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise ConfigError(
                f"{place} has the key class_path, and only plain values are taken there: nothing in them makes an "
                "object. Leave it out."
            )
        for key, inner in value.items():
            check_plain(inner, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            check_plain(inner, f"{place}[{number}]")
    elif isinstance(value, str):
        inner = _values_in(value, place)
        if not isinstance(inner, str):
            check_plain(inner, place)


def _values_in(text: str, place: str) -> Any:
    """Return the list or the keys with values that a parser finds in a text; otherwise the text."""
    if not any(sign in text for sign in "{[:?-&*!\n"):
        return text
    try:
        found = parse_text(text, f"The value of {place}")
    except yaml.YAMLError:
        return text
    return found if isinstance(found, (dict, list)) else text


def _check_text(text: str, annotation: Any, place: str) -> None:
    """Refuse a text where a parser would take it for something else than is written.

    YAML 1.1 takes 1:04 for the number 64; and the parser reads a list from a file whose name is given in its place.
    """
    if _takes_text(annotation):
        return
    try:
        written, elsewhere = parse_text(text, place), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return
    if isinstance(written, str) and (not isinstance(elsewhere, str) or os.path.exists(text)):
        raise ConfigError(f"{place} is {text!r}, which is no value for it. Write the number or the list itself.")


def _checked_choice(value: Any, annotation: Any, place: str) -> Any:
    """Return the choice that a value stands for; a value of an annotation without choices stays as it is.

    YAML 1.1 reads the text ``off`` as false, so false stands for the choice ``off``.
    """
    kinds = _alternatives(annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    others = [kind for kind in kinds if get_origin(kind) is not Literal and kind is not NoneType]
    lists = bool(others) and all((get_origin(kind) or kind) in _LISTS for kind in others)
    if not choices or (others and not lists) or (value is None and NoneType in kinds):
        return value
    read = value if not isinstance(value, str) or value in choices else _read(value, place)
    if any(read == choice and type(read) is type(choice) for choice in choices):
        return value
    if (read is None and NoneType in kinds) or (lists and isinstance(read, (list, tuple))):
        return value
    for choice in choices:
        if isinstance(read, bool) and isinstance(choice, str) and _read(choice, place) is read:
            return choice
    raise _no_choice(value, [*map(str, choices)], lists, place)


def _no_choice(value: Any, names: list[str], lists: bool, place: str) -> UnknownNameError:
    """Make the error for a value that is none of the choices, and no list where one is taken as well."""
    written = value if isinstance(value, str) else json.dumps(value)
    taken = [*names, *["a list"] * lists]
    listed = near_names(written, names).startswith("Known:")
    told = "" if listed and not lists else f", which takes {', '.join(taken[:-1])} or {taken[-1]}"
    return UnknownNameError("value", written, names, f"It was given for {place}{told}.")


def _check_list(text: str, annotation: Any, place: str) -> None:
    """Refuse a text where a list is needed."""
    kinds = [part for part in _alternatives(annotation) if part is not NoneType]
    if kinds and all((get_origin(kind) or kind) in _LISTS for kind in kinds) and _stays_text(text, place):
        raise ConfigError(f"{place} is {text!r}, and a list is needed, such as [{text}].")


def _read(text: str, place: str) -> Any:
    """Return what a parser takes a text for: a number, a list or keys; one that it cannot read is a text."""
    try:
        return parse_text(text, place)
    except yaml.YAMLError:
        return text


def _stays_text(text: str, place: str) -> bool:
    """Whether a parser takes a text for no number, list or keys."""
    return bool(_read(text, place) == text)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the parts of a union; of anything else itself."""
    return get_args(annotation) if get_origin(annotation) in (typing.Union, UnionType) else (annotation,)


def _inside(annotation: Any) -> Any:
    """Return the annotation of the values in a container; None where there is none."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, UnionType):
        parts = tuple(found for found in map(_inside, parts) if found is not None)
    elif origin not in _CONTAINERS:
        return None
    return typing.Union[tuple(part for part in parts if part is not ...)] if parts else None  # noqa: UP007


def _names_an_object(text: str, taken: Sequence[Any]) -> bool:
    """Whether a parser would import a text, or make an object of the class with that name."""
    parts = text.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    if len(parts) > 1:
        return parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None
    waiting = [part for part in taken if isinstance(part, type)]
    while waiting:
        cls = waiting.pop()
        if cls.__name__ == text:
            return True
        waiting += type.__subclasses__(cls)
    return False


def _takes_keys(annotation: Any) -> bool:
    """Whether keys with values may be a value for an annotation: a dictionary, or an object with arguments."""
    if annotation is Any or annotation is object or classes_in(annotation):
        return True
    return any((get_origin(part) or part) in (dict, abc.Mapping) for part in _alternatives(annotation))


def _takes_text(annotation: Any) -> bool:
    """Whether text is a value for an annotation, outside of containers."""
    if annotation is Any or annotation is object:
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    if get_origin(annotation) in (typing.Union, UnionType):
        return any(_takes_text(part) for part in get_args(annotation))
    return isinstance(annotation, type) and (
        annotation in (str, os.PathLike, PurePath, Path) or issubclass(annotation, enum.Enum)
    )
