"""Comparison of the config of a run with the one it was begun with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from vispeft.building.config_files import Node
from vispeft.cli.config import ConfigCLI

__all__ = ["differing", "is_free", "told", "without_free"]

FREE = re.compile(
    r"trainer\.(accelerator|devices|num_nodes|enable_progress_bar|logger|profiler)(\..*)?"
    r"|data\.(init_args\.)?num_workers|checkpoints\..*|memory"
)
"""Keys that may change when a run is resumed, as none affects the result."""


def is_free(key: str) -> bool:
    """Whether a key may change when a run is resumed.

    Args:
        key: The dotted key.
    """
    return FREE.fullmatch(key) is not None


def without_free(tree: Node) -> Node:
    """Copy a config without the keys that may change.

    Args:
        tree: The config.
    """
    return _pruned(tree, "")


def _pruned(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if not is_free(f"{path}{key}")}
    return {
        key: _pruned(value, f"{path}{key}.") if isinstance(value, Mapping) else value for key, value in kept.items()
    }


def differing(cli: ConfigCLI, earlier: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the keys in which a config differs from an earlier one, apart from those that may change.

    Args:
        cli: The present config.
        earlier: The earlier one; keys that are newer than it have their defaults.

    Returns:
        The earlier and the present value by dotted key.
    """
    before = dict(_flat(cli.completed(dict(earlier))))
    now = dict(_flat(yaml.safe_load(cli.resolved())))
    return {
        key: (before.get(key), now.get(key))
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not is_free(key)
    }


def told(other: Mapping[str, tuple[Any, Any]], at_most: int = 4) -> str:
    """Name keys that differ, with their values.

    Args:
        other: The result of `differing`.
        at_most: Largest number of keys to name.
    """
    named = [f"{key} was {was!r} and is {now!r}" for key, (was, now) in list(other.items())[:at_most]]
    more = len(other) - len(named)
    return ", ".join(named) + (f", and {more} more" if more > 0 else "")


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of a config by dotted key."""
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))
