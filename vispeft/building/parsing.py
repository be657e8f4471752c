"""jsonargparse: it checks types and values of the arguments of a class, and makes the object."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator

from jsonargparse import ArgumentError

from vispeft.errors import ConfigError, VispeftError

__all__ = ["parser_errors"]

_KEY = re.compile(r'Parser key "([^"]+)":')


@contextlib.contextmanager
def parser_errors(source: str) -> Iterator[None]:
    """Turn an error of the parser into one of ours.

    The parser wraps an error raised by a class it makes; the class's own error is raised then. About a value of the
    wrong type the parser's text is handed on as it is, with the key in front.

    Args:
        source: Where the values came from, for the message.

    Raises:
        ConfigError: If the parser refused a value.
        VispeftError: If a class refused one.
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
