"""The errors vispeft raises: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from numbers import Integral

__all__ = [
    "BackboneError",
    "BaseMismatchError",
    "ConfigError",
    "DataError",
    "ExportError",
    "FileError",
    "MergeError",
    "SiteError",
    "TrainingError",
    "UnknownNameError",
    "VerificationError",
    "VispeftError",
    "brief",
    "check_count",
    "check_object",
    "counted",
    "is_misspelt",
    "is_utf8",
    "near_names",
    "printable",
    "printable_lines",
]


def check_object(owner: str, name: str, value: object, wanted: type) -> None:
    """Refuse a dictionary or a name where an object is needed, as configs build it and scripts do not.

    Args:
        owner: Name of the class with the argument.
        name: The argument.
        value: The value that was given; None counts as left out.
        wanted: The class of the object.

    Raises:
        ConfigError: If it is of another class.
    """
    if value is None or isinstance(value, wanted):
        return
    fields = ", ".join(f"{key}={item!r}" for key, item in value.items()) if isinstance(value, dict) else "..."
    raise ConfigError(
        f"{owner}({name}={value!r}): configs take this, and a script gives an object, {wanted.__name__}({fields}). "
        f"It is a {type(value).__name__} here."
    )


class VispeftError(Exception):
    """Root of every error vispeft raises on purpose."""


class ConfigError(VispeftError, ValueError):
    """A field of a method, a task or a config file has a value that cannot work."""


class UnknownNameError(ConfigError):
    """A name (method, adapter, role, key, backbone) is not known; the message lists near ones."""

    def __init__(self, what: str, asked: str, known: Iterable[str], hint: str = "") -> None:
        """Compose the message.

        Args:
            what: The kind of thing that was named, such as ``"method"``.
            asked: The name that was given.
            known: Every name that would have been accepted.
            hint: One more sentence on what to do.
        """
        super().__init__(f"Unknown {what} {asked!r}. {near_names(asked, known)}{' ' + hint if hint else ''}")


class BackboneError(VispeftError):
    """The model, one of its blocks or its input size is not supported."""


class SiteError(VispeftError):
    """A role is missing in a backbone, or a unit has no stated form at a site."""


class MergeError(VispeftError):
    """No plain layer computes the same as the adapted one, or the values are not finite."""


class ExportError(VispeftError):
    """A model cannot be traced or written in a format, or what was written computes something else."""


class VerificationError(VispeftError):
    """A trainable tensor receives no gradient."""


class FileError(VispeftError):
    """A file is missing, truncated, altered or of another format."""


class BaseMismatchError(FileError):
    """An adapter belongs to another backbone."""


class DataError(VispeftError):
    """Images, labels or splits cannot be used as given."""


class TrainingError(VispeftError):
    """Training cannot go on, for example because a loss is not finite."""


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number from 1 on.

    Args:
        name: Name of the setting.
        value: The value that was given.

    Raises:
        ConfigError: If it is another one.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"{name} is {value!r}; a whole number, at least 1, is needed.")


def near_names(asked: str, known: Iterable[str], at_most: int = 12) -> str:
    """Suggest the names closest to the one asked for.

    Args:
        asked: The name that was given.
        known: Every accepted name.
        at_most: How many names to list when none is close.

    Returns:
        One sentence: the near names, or else the first known ones.
    """
    asked, names = str(asked), sorted(set(known))  # a script may have given any object
    near = [name for name in names if name.lower() == asked.lower()]
    near = near or difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    if not near:
        lowered = {name.lower(): name for name in names}
        near = [lowered[name] for name in difflib.get_close_matches(asked.lower(), lowered, n=3, cutoff=0.5)]
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    if not names:
        return "There are none here."
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"Known: {', '.join(names[:at_most])}{more}."


def is_misspelt(asked: str, known: Iterable[str]) -> bool:
    """Return whether a name is so near to a known one that nothing else can have been meant.

    Args:
        asked: The name that was given.
        known: Every accepted name.
    """
    return bool(difflib.get_close_matches(asked.lower(), [name.lower() for name in known], n=1, cutoff=_MISSPELT))


def brief(error: BaseException | None, at_most: int = 400) -> str:
    """Shorten the text of another package's error so that it fits into a message.

    Args:
        error: The error.
        at_most: Longest text, in characters.

    Returns:
        The text on one line, ending in a full stop; the error's class where it has no text.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > at_most:
        text = text[:at_most].rsplit(" ", 1)[0] + " ..."
    return text if text.endswith(".") else text + "."


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun, such as ``1 image`` or ``1,200 images``.

    Args:
        count: The number.
        noun: The noun in the singular.
        plural: Its plural; by default with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    """Escape the characters that a terminal would obey or a file cannot hold.

    These are control characters, ends of lines, lone surrogates and marks that turn the order of letters.

    Args:
        text: The text, such as the name of a file whose bytes are no UTF-8.
    """
    return _OBEYED.sub(lambda found: _escaped(found[0]), text)


def is_utf8(text: str) -> bool:
    """Return whether a text can be written in UTF-8, which has no place for bytes of another encoding.

    Args:
        text: The text, such as the name of a file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_lines(text: str) -> str:
    """Escape the same characters in a text of several lines.

    Args:
        text: The text; its lines and tabs stay.
    """
    return "".join(part if part in ("\n", "\t") else printable(part) for part in re.split(r"([\n\t])", text))


_MISSPELT = 0.75
"""Share of letters in order that a misspelt name has in common with the right one (difflib's ratio): one wrong letter
of four, or two letters of six that changed places."""
CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
"""Characters, as a range of a regular expression, that no name has: ends of lines among them, and halves of others."""
_OBEYED = re.compile(f"[{CONTROL}\u202a-\u202e\u2066-\u2069]")
"""Those, and marks that turn the order of the letters behind them, which a name may have."""


def _escaped(character: str) -> str:
    code = ord(character)
    # Python reads a byte that is no UTF-8 as one of these surrogates (PEP 383).
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
