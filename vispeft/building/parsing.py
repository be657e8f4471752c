"""jsonargparse, which checks types and values of a class's arguments and creates the object."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import ArgumentError, set_dumper, set_loader

from vispeft.building.config_files import dump_config, parse_text
from vispeft.errors import ConfigError, VispeftError

__all__ = ["MODE", "parser_errors"]

MODE = "vispeft"
"""The `parser_mode` of parsers that read values as config files are read, and write them likewise."""

_KEY = re.compile(r'Parser key "([^"]+)":')


def _load(text: str) -> Any:
    """Read a value; ``{a}`` and ``a:`` are text, as for the other modes of jsonargparse."""
    value = parse_text(text, "A value")
    bare = isinstance(value, dict) and not any(sign in text for sign in ("null", "~", "\n"))
    return text if bare and value and all(inner is None for inner in value.values()) else value


set_loader(MODE, _load, (yaml.YAMLError, ConfigError))
set_dumper(MODE, dump_config)


@contextlib.contextmanager
def parser_errors(source: str) -> Iterator[None]:
    """Turn an error of the parser into a `VispeftError`.

    The parser wraps errors raised by the class it creates; the class's own error is raised instead. For a value of the
    wrong type, the parser's text is kept, with the key before it.

    Args:
        source: Where the values came from, for the message.

    Raises:
        ConfigError: If the parser refused a value.
        VispeftError: If the class refused one.
    """
    try:
        yield
    except (ArgumentError, argparse.ArgumentError, ValueError) as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, VispeftError):
            behind = behind.__cause__ or behind.__context__
        if behind is not None:
            raise behind from error
        text = str(error).strip()
        key = ".".join(_KEY.findall(text))
        raise ConfigError(f"{source}{': ' + key if key else ''}: the value cannot be used.\n{text}") from error
