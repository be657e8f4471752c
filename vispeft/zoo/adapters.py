"""Lookup of adapters: in the zoo, in the directory of a run, or in a directory of their own."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.storage.files import JSON_FILE
from vispeft.zoo.folder import own_zoo, zoo_folder
from vispeft.zoo.index import INDEX, ZooEntry, check_files, read_index

__all__ = [
    "ADAPTER",
    "PREFIX",
    "ZooAdapter",
    "backbone_names",
    "find_adapter",
    "find_zoo_adapter",
    "list_zoo_adapters",
    "zoo_hint",
]

ADAPTER = "adapter"
"""Name of the adapter's directory inside the directory of a run."""
PREFIX = "zoo:"
"""Begin of the name of a model or an adapter of the zoo."""


@dataclass(frozen=True)
class ZooAdapter:
    """An adapter of a zoo on this machine."""

    entry: ZooEntry
    """Its description."""
    zoo: Path
    """Folder of the zoo."""

    @property
    def folder(self) -> Path:
        """Its own folder."""
        return self.zoo / self.entry.name

    def verify(self) -> None:
        """Compare all of its files with their digests.

        Raises:
            FileError: If one is missing or was changed.
        """
        check_files(self.zoo, self.entry)


def list_zoo_adapters() -> dict[str, ZooAdapter]:
    """List the adapters that ship with the package and those that were added or pulled, by name.

    Raises:
        FileError: If an index is damaged.
    """
    found = {name: ZooAdapter(entry, own_zoo()) for name, entry in read_index(own_zoo()).items()}
    shipped = zoo_folder()
    return dict(
        sorted({**found, **{n: ZooAdapter(entry, shipped) for n, entry in read_index(shipped).items()}}.items())
    )


def find_zoo_adapter(name: str) -> ZooAdapter:
    """Find an adapter of the zoo; its files are not looked at.

    Args:
        name: Its name, without ``zoo:``.

    Returns:
        The adapter.

    Raises:
        UnknownNameError: If there is none.
        ConfigError: If a backbone has the name.
        FileError: If the index is damaged.
    """
    shipped = read_index(zoo_folder())  # first, so that a damaged zoo of the user's own is in nobody's way
    if name in shipped:
        return ZooAdapter(shipped[name], zoo_folder())
    known = list_zoo_adapters()
    if name in known:
        return known[name]
    if name in backbone_names():
        raise ConfigError(
            f"{PREFIX}{name} is a backbone, and an adapter was asked for. vispeft.create_model('{PREFIX}{name}') "
            "creates it; `vispeft zoo list` names the adapters."
        )
    raise UnknownNameError("adapter of the zoo", name, known, f"They are in {zoo_folder() / INDEX} and {own_zoo()}.")


def zoo_hint(text: str) -> str:
    """Return a question that names the adapter of the zoo which a text names without ``zoo:``, to end a message.

    Args:
        text: What was given as a folder, and is none.
    """
    with contextlib.suppress(FileError):  # a damaged index is no reason for another message
        if text in list_zoo_adapters():
            return f" Did you mean '{PREFIX}{text}'?"
    return ""


def backbone_names() -> list[str]:
    """List the backbones of the zoo by name."""
    return sorted(path.parent.name for path in zoo_folder().glob("backbones/*/config.json"))


def find_adapter(source: str) -> Path:
    """Find the directory of an adapter; one of the zoo is compared with its digests.

    Args:
        source: ``zoo:NAME``, or the directory of an adapter or a run.

    Returns:
        The directory that holds ``adapter.json``.

    Raises:
        UnknownNameError: If the zoo has no such adapter.
        FileError: If there is no adapter in the directory, or one of the zoo is not whole.
    """
    if source.startswith(PREFIX):
        found = find_zoo_adapter(source.removeprefix(PREFIX))
        found.verify()
        return found.folder
    for place in (Path(source), Path(source) / ADAPTER):
        if os.path.isfile(place / JSON_FILE):
            return place
    raise FileError(
        f"There is no adapter in {source!r}: no {JSON_FILE}, and no {ADAPTER}/{JSON_FILE}. Name the directory of "
        f"an adapter or of a run, or zoo:NAME.{zoo_hint(source)}"
    )
