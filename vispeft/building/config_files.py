"""Reading and writing config files: plain values in YAML, nothing else.

The reader is stricter than YAML 1.1, where a file may say something else than it seems to:

- a key that is given twice is refused, instead of the last one winning;
- ``0100``, ``1:04`` and ``2024-01-01`` are text, as they are written, not 64 or a date;
- values that grow when they are read (aliases of aliases) or are nested too deeply are refused before they are built.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vispeft.errors import ConfigError, FileError

__all__ = ["Node", "dump_config", "parse_text", "read_config"]

Node = dict[str, Any]
"""Keys of a config, or of a part of one, with their values."""

LARGEST = 2**18
"""Bytes of the largest config file; those of runs have a few thousand."""
MOST = 50_000
"""Values of the largest config, with aliases written out."""
DEEPEST = 50
"""Levels of the deepest config."""

_PLAIN = (bool, int, float, str, type(None))
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, with numbers as they are written."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` and jsonargparse's loader read back as the same values, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _construct_float(loader: Any, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _set_numbers() -> None:
    """Replace YAML 1.1's forms of numbers and dates."""
    tag = "tag:yaml.org,2002:"
    forms = {f"{tag}int": (_INTEGER, "-+0123456789"), f"{tag}float": (_FLOAT, "-+.0123456789")}
    others = {
        first: [(name, form) for name, form in known if name not in (*forms, f"{tag}timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.yaml_implicit_resolvers = others
    for name, (form, first) in forms.items():
        _Loader.add_implicit_resolver(name, re.compile(f"(?:{form.pattern})$"), list(first))
        # Text such as "1e5" is quoted in the files that are written, since readers take it for a number.
        _Dumper.add_implicit_resolver(name, re.compile(f"(?:{form.pattern})$"), list(first))
    _Loader.add_constructor(f"{tag}float", _construct_float)


_set_numbers()


def read_config(path: Path) -> Node:
    """Read a config file.

    Args:
        path: A YAML or JSON file.

    Returns:
        Its keys and values.

    Raises:
        ConfigError: If its suffix is neither, or it holds more or other values than a config can.
        FileError: If it is missing, no regular file, or not valid YAML.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"The config {str(path)!r} is no YAML file; its name should end in .yaml.")
    try:
        text = _read(path)
    except (OSError, ValueError) as error:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
        raise FileError(
            f"The config {str(path)!r} could not be read ({getattr(error, 'strerror', None) or error}). "
            f"{'There are: ' + ', '.join(beside) + '.' if beside else 'There are no configs in that folder.'}"
        ) from error
    try:
        tree = parse_text(text, f"The config {str(path)!r}")
    except yaml.YAMLError as error:
        raise FileError(f"The config {str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise FileError(f"The config {str(path)!r} has no keys; it needs the sections model and data.")
    return tree


def _read(path: Path) -> str:
    """Read a text file, but no pipe or device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, encoding="utf-8") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > LARGEST:
            raise ValueError(f"it has {found.st_size:,} bytes, and a config has at most {LARGEST:,}")
        return file.read()


def parse_text(text: str, place: str) -> Any:
    """Read the values of a YAML text.

    Args:
        text: The text.
        place: Where it stands, for messages.

    Returns:
        A plain value: None, a boolean, a number or text, or lists and dictionaries of them, which share nothing.

    Raises:
        ConfigError: If a key is given twice, or there are more or other values than a config can have.
        yaml.YAMLError: If it is no YAML.
    """
    loader = None
    try:
        _check_depth(text, place)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, place)
        return _written_out(loader.construct_document(node), place)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} holds a value that cannot be read: {error}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str, place: str) -> None:
    """Count levels before they are built: PyYAML's fast reader does so recursively, without a limit."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if depth > DEEPEST:
            raise ConfigError(f"{place} is nested more than {DEEPEST} levels deep, which no config needs.")


def _check_nodes(root: yaml.Node, place: str) -> None:
    """Refuse keys that are given twice, and count the values with aliases written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above or len(above) > DEEPEST:
            raise ConfigError(f"{place} has an alias (*) inside of the value it stands for. Write the value out.")
        if id(node) not in sizes:
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                _check_twice(node, place)
                inner = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            sizes[id(node)] = 1 + sum(size(part, (*above, id(node))) for part in inner)
        return sizes[id(node)]

    if (count := size(root, ())) > MOST:
        raise ConfigError(f"{place} has {count:,} values once its aliases are written out; at most {MOST:,} are read.")


def _check_twice(node: yaml.MappingNode, place: str) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            raise ConfigError(
                f"{place} has the key {str(key.value)!r} twice in one place (line {key.start_mark.line + 1}). "
                "Keep one of them."
            )
        seen.add(name)


def _written_out(value: Any, place: str) -> Any:
    """Copy a value, so that nothing is shared, and refuse objects that tags of YAML make."""
    if isinstance(value, dict):
        return {_written_out(key, place): _written_out(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [_written_out(inner, place) for inner in value]
    if not isinstance(value, _PLAIN):
        raise ConfigError(f"{place} has a {type(value).__name__}; numbers, text, lists and keys with values are read.")
    return value


def dump_config(tree: Node, *, one_line: bool = False) -> str:
    """Write values as YAML, which `read_config` reads back as the same values.

    Args:
        tree: Plain values.
        one_line: Whether to write them in one line.
    """
    if one_line:
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6).strip()
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
