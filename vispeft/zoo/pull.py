"""Pulling an adapter into the user's own zoo: checked before, while and after it is fetched, and put there at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.zoo.adapters import backbone_names
from vispeft.zoo.folder import own_zoo, zoo_folder
from vispeft.zoo.index import INDEX, ZooEntry, check_files, check_name, describe_file, parse_index, read_index
from vispeft.zoo.install import held_zoo, put_in_place
from vispeft.zoo.sources import Source, find_source

__all__ = ["LARGEST_PULL", "Wanted", "pull"]

LARGEST_PULL = 2**29
"""Bytes of an adapter that are fetched unless more are asked for."""
_PULLING = ".pulling"
_PARTS = ".parts"
"""Folder of what was fetched, beside that of the adapter, whose name never begins with a dot."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is pulled."""

    adapter: str | None = None
    """The adapter of the source; None where it has one alone."""
    name: str | None = None
    """Its name here; None for the one it has there."""
    largest: int = LARGEST_PULL
    """Largest size of all its files together, in bytes."""


def pull(given: str, wanted: Wanted, check: Callable[[Path, ZooEntry], None]) -> tuple[ZooEntry, bool]:
    """Pull an adapter.

    Args:
        given: Folder, address or repository; see `find_source`. Or the name of an adapter of this zoo, which is pulled
            again from where it came from.
        wanted: What is pulled.
        check: Called with the fetched folder before it is put into the zoo; it may raise.

    Returns:
        The adapter's entry, and whether anything was fetched.

    Raises:
        ConfigError: If the name is taken by something else, or no name.
        FileError: If the source cannot be had, or something of it is not as it must be.
    """
    zoo = own_zoo()
    listed = read_index(zoo)
    if given.removeprefix("zoo:") in {**listed, **read_index(zoo_folder())}:
        given, wanted = _again(given.removeprefix("zoo:"), listed, wanted)
        if not given:
            entry = read_index(zoo_folder())[str(wanted.name)]
            check_files(zoo_folder(), entry)
            return entry, False
    source = find_source(given)
    offered = parse_index(Path(f"{source.name}/{INDEX}"), source.index())
    there = _chosen(source, offered, wanted)
    name = wanted.name or there.name
    entry = replace(there, name=name, source=source.name, named_there=None if name == there.name else there.name)
    total = sum(described["bytes"] for described in entry.files.values())
    if total > wanted.largest:
        raise FileError(f"{there.name} of {source.name} has {total:,} bytes; at most {wanted.largest:,} are fetched.")
    check_name(name)
    with held_zoo(zoo):
        listed = read_index(zoo)  # another process may have taken the name meanwhile
        _check_taken(entry, listed)
        if name in listed and _is_whole(zoo, listed[name]):
            return listed[name], False
        _fetch(zoo, source, there, entry, check)
    return entry, True


def _again(name: str, listed: dict[str, ZooEntry], wanted: Wanted) -> tuple[str, Wanted]:
    """Say where an adapter that is here came from; an empty text for one that ships."""
    if name not in listed:
        return "", replace(wanted, name=name)
    source = listed[name].source
    if source is None:
        raise ConfigError(f"zoo:{name} was added on this machine, and there is nothing to pull it from.")
    return source, replace(wanted, name=name, adapter=listed[name].named_there or name)


def _chosen(source: Source, offered: dict[str, ZooEntry], wanted: Wanted) -> ZooEntry:
    """Choose the adapter of a source."""
    if wanted.adapter is not None:
        if wanted.adapter not in offered:
            raise UnknownNameError("adapter", wanted.adapter, offered, f"The source is {source.name}.")
        return offered[wanted.adapter]
    if len(offered) == 1:
        return next(iter(offered.values()))
    if wanted.name in offered:
        return offered[str(wanted.name)]
    names = ", ".join(sorted(offered)[:8]) or "none"
    raise ConfigError(f"{source.name} has {len(offered)} adapters ({names}). Choose one: --adapter NAME.")


def _check_taken(entry: ZooEntry, listed: dict[str, ZooEntry]) -> None:
    """Refuse a name that is taken by something else."""
    if entry.name in backbone_names() or entry.name in read_index(zoo_folder()):
        raise ConfigError(f"zoo:{entry.name} ships with the package. Choose another name for this one: --name NAME.")
    if entry.name in listed and not listed[entry.name].same_content(entry):
        raise ConfigError(
            f"zoo:{entry.name} is installed already, with other content. Choose another name for this one: --name "
            f"NAME; or remove that one first: vispeft zoo remove {entry.name}"
        )


def _is_whole(zoo: Path, entry: ZooEntry) -> bool:
    try:
        check_files(zoo, entry)
    except FileError:
        return False
    return True


def _is(part: Path, described: Mapping[str, Any]) -> bool:
    return part.is_file() and describe_file(part) == described


def _fetch(
    zoo: Path, source: Source, there: ZooEntry, entry: ZooEntry, check: Callable[[Path, ZooEntry], None]
) -> None:
    """Fetch all files, keeping whole and partial ones until the adapter is in its place."""
    parts, folder = zoo / _PULLING / _PARTS, zoo / _PULLING / entry.name
    parts.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, described in entry.files.items():
        part = parts / described["sha256"]
        if not _is(part, described):
            source.fetch(there.name, file, described["bytes"], part)
        if not _is(part, described) and source.forget(there.name, file):
            part.unlink(missing_ok=True)
            source.fetch(there.name, file, described["bytes"], part)
        if not _is(part, described):
            part.unlink(missing_ok=True)
            raise FileError(f"{file} of {there.name} from {source.name} is not the one that its {INDEX} lists.")
        shutil.copyfile(part, folder / file)
    try:
        check(folder, entry)
        put_in_place(zoo, folder, entry)
    finally:
        shutil.rmtree(zoo / _PULLING, ignore_errors=True)
