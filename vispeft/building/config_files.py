"""Reading config files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vispeft.errors import ConfigError, FileError

__all__ = ["Node", "read_config"]

Node = dict[str, Any]
"""Keys of a config, or of a part of one, with their values."""


def read_config(path: Path) -> Node:
    """Read a config file.

    Args:
        path: A YAML or JSON file.

    Returns:
        Its keys and values.

    Raises:
        ConfigError: If its suffix is neither.
        FileError: If it is missing, or not valid YAML.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"The config {str(path)!r} is no YAML file; its name should end in .yaml.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileError(
            f"The config {str(path)!r} could not be read ({error.strerror}). "
            f"{'There are: ' + ', '.join(beside) + '.' if beside else 'There are no configs in that folder.'}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"The config {str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise FileError(f"The config {str(path)!r} has no keys; it needs the sections model and data.")
    return tree
