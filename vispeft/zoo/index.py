"""A zoo's ``index.json``: what each adapter is for, and the digest of every file of it.

A zoo is a folder with an index and one folder for each adapter. The index is written in one way only, and is read only
if its bytes are exactly these: whatever byte of it, or of a file that it lists, is changed, the adapter is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError, brief
from vispeft.storage.disk import read_regular, regular_size, write_atomically
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE
from vispeft.storage.form import FormError, check_index, shown
from vispeft.storage.strict_json import parse_json

__all__ = [
    "CARD",
    "CONFIG",
    "FILES",
    "INDEX",
    "LARGEST_FILE",
    "LARGEST_INDEX",
    "METRICS",
    "ZooEntry",
    "check_files",
    "check_name",
    "describe_file",
    "index_bytes",
    "parse_index",
    "read_index",
    "write_index",
]

SCHEMA = 1
"""Version of the index. It is raised when an older version of vispeft could misread one."""
INDEX, CARD, CONFIG, METRICS = "index.json", "CARD.md", "config.yaml", "metrics.json"
LARGEST_INDEX = 2**24
"""Bytes of an index; that of a thousand adapters takes a tenth of it."""
LARGEST_FILE: Mapping[str, int] = {
    JSON_FILE: 2**23,
    ADAPTER_FILE: 2**30,
    HEAD_FILE: 2**30,
    CONFIG: 2**20,
    METRICS: 2**22,
    CARD: 2**20,
}
"""Largest size in bytes of each file that the folder of an adapter has."""
FILES = tuple(LARGEST_FILE)
"""The files of an adapter. All but that of a classifier or decoder are always there."""
_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """An adapter of a zoo, as its index describes it."""

    name: str
    """Its name, without ``zoo:``; also that of its folder."""
    task: str
    """Kind of task, such as ``classification``."""
    data: str
    """The data it was trained on."""
    needs: str
    """What must be fetched to measure it; empty for nothing."""
    backbone: str
    """Its backbone, for `create_model`."""
    method: str
    """Name of its method."""
    figures: dict[str, float]
    """Figures on the test images, by name; the first one counts."""
    baseline: dict[str, float] | None
    """The same figures of the linear probe, where there is one."""
    trainable: int
    """Trained parameters, without those of the classifier or decoder."""
    license: str
    """Licence of the adapter."""
    source: str | None = None
    """Where it was pulled from; None for one that was made here."""
    named_there: str | None = None
    """Its name at the source, where it is another one; only then it stands in the index."""
    files: dict[str, dict[str, Any]]
    """``bytes`` and ``sha256`` of each file."""

    @property
    def size(self) -> int:
        """Bytes of the adapter and its classifier or decoder."""
        return sum(self.files[name]["bytes"] for name in (ADAPTER_FILE, HEAD_FILE) if name in self.files)

    def same_content(self, other: ZooEntry) -> bool:
        """Return whether another entry has the same files, wherever each came from."""
        return self.files == other.files


def check_name(name: str) -> None:
    """Refuse a name that no adapter of a zoo may have; it is the name of a folder.

    Args:
        name: The name.

    Raises:
        ConfigError: If it is another one.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{shown(name)} is no name for an adapter of a zoo: it has 1 to 64 small letters, digits, - and _, and "
            "begins with a letter or a digit, such as digits_ssf."
        )


def index_bytes(entries: Mapping[str, ZooEntry]) -> bytes:
    """Write an index, in the only way there is for its content.

    Args:
        entries: The adapters by name.
    """
    adapters = {}
    for name, entry in entries.items():
        values = asdict(entry)
        del values["name"]
        if entry.named_there is None:
            del values["named_there"]
        adapters[name] = values
    content: dict[str, Any] = {"schema": SCHEMA, "adapters": adapters}
    return _written({**content, "digest": hashlib.sha256(_written(content)).hexdigest()})


def _written(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_index(path: Path, content: bytes) -> dict[str, ZooEntry]:
    """Read the content of an index and check all of it.

    Args:
        path: The file, for messages.
        content: Its bytes.

    Returns:
        The adapters by name.

    Raises:
        FileError: If it is truncated or altered, of another schema or form, or names a file that no adapter has.
    """
    index = parse_json(path, content)
    if not isinstance(index, dict) or "adapters" not in index or "schema" not in index:
        raise FileError(f"{path} is no index of a zoo: it has no schema and no adapters.")
    if index["schema"] != SCHEMA:
        raise FileError(
            f"{path} has schema {shown(index['schema'])}, and this version of vispeft reads {SCHEMA}. Upgrade vispeft."
        )
    try:
        check_index(index)
        return _entries(path, index, content)
    except FormError as error:
        raise FileError(f"{path} has not the form of a zoo's index: {error}") from error
    except UnicodeEncodeError as error:  # half of a character
        raise FileError(f"{path} holds text that no index has ({brief(error)})") from error


def _entries(path: Path, index: Mapping[str, Any], content: bytes) -> dict[str, ZooEntry]:
    """Make the entries of an index of the right form, and refuse one that was not written by `index_bytes`."""
    entries = {}
    for name, entry in index["adapters"].items():
        check_name(name)
        _check_listed(path, name, entry["files"])
        _check_figures(path, name, entry)
        known = {key: value for key, value in entry.items() if key in ZooEntry.__dataclass_fields__}
        if len(known) < len(entry):
            raise FileError(f"{path} has the key {shown(min(set(entry) - set(known)))} in {name}, which none has.")
        entries[name] = ZooEntry(name=name, **known)
    if index_bytes(entries) != content:
        raise FileError(f"{path} was altered: its digest does not fit its content. Copy the zoo again.")
    return entries


def _check_listed(path: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse names of files that no adapter has, files that are missing, and sizes that none may have."""
    for file, described in files.items():
        if file not in LARGEST_FILE:
            raise FileError(f"{path} lists a file {shown(file)} of {name} that no adapter has.")
        if described["bytes"] > LARGEST_FILE[file]:
            raise FileError(
                f"{path} says that {file} of {name} has {described['bytes']:,} bytes; at most {LARGEST_FILE[file]:,} "
                "are read."
            )
    lacking = [file for file in FILES if file != HEAD_FILE and file not in files]
    if lacking:
        raise FileError(f"{path} lists no {lacking[0]} of {name}, which every adapter has.")


def _check_figures(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Refuse figures of which no table can be made: none, not finite, or compared with others."""
    figures, baseline = entry["figures"], entry.get("baseline")
    if not figures or not all(math.isfinite(value) for value in figures.values()):
        raise FileError(f"{path} has the figures {shown(figures)} of {name}; at least one, all finite, is needed.")
    if baseline is None:
        return
    if set(baseline) != set(figures) or not all(math.isfinite(value) and value > 0 for value in baseline.values()):
        raise FileError(
            f"{path} has the baseline {shown(baseline)} of {name}; finite numbers above 0 are needed, of the "
            f"same names as its figures ({shown(sorted(figures))})."
        )


def read_index(zoo: Path) -> dict[str, ZooEntry]:
    """Read the index of a zoo.

    Args:
        zoo: Its folder.

    Returns:
        The adapters by name; none where there is no index.

    Raises:
        FileError: If it cannot be read; see `parse_index`.
    """
    path = zoo / INDEX
    try:
        content = read_regular(path, LARGEST_INDEX)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read ({brief(error)[:-1]}).") from error
    return parse_index(path, content)


def write_index(zoo: Path, entries: Mapping[str, ZooEntry]) -> None:
    """Write the index of a zoo, by name.

    Args:
        zoo: Its folder.
        entries: The adapters by name.

    Raises:
        FileError: If it cannot be written, or would be none that can be read.
    """
    content = index_bytes(dict(sorted(entries.items())))
    parse_index(zoo / INDEX, content)
    write_atomically({zoo / INDEX: content})


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and digest of a file as an index has them.

    Args:
        path: The file.
    """
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def check_files(zoo: Path, entry: ZooEntry) -> None:
    """Compare every file of an adapter with the index.

    Args:
        zoo: The zoo's folder.
        entry: The adapter.

    Raises:
        FileError: If a file is missing, or not the one that is listed.
    """
    for name, described in entry.files.items():
        path = zoo / entry.name / name
        try:
            whole = regular_size(path) == described["bytes"] and _digest(path) == described["sha256"]
        except FileNotFoundError as error:
            raise FileError(
                f"zoo:{entry.name} is listed in {zoo / INDEX}, and its {name} is not there ({path}). {_remedy(entry)}"
            ) from error
        except OSError as error:
            raise FileError(f"{path} of zoo:{entry.name} could not be read ({brief(error)[:-1]}).") from error
        if not whole:
            raise FileError(
                f"{path} is not the file that {INDEX} lists for zoo:{entry.name}: it was truncated or altered. "
                f"{_remedy(entry)}"
            )


def _remedy(entry: ZooEntry) -> str:
    if entry.source is None:
        return "Restore it from where the zoo came from."
    return f"Pull it again: vispeft zoo pull {entry.name}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
