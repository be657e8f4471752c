"""jsonargparse, which checks types and values of a class's arguments and creates the object."""

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
