"""Lookup of adapters: in the zoo, in the directory of a run, or in a directory of their own."""

from __future__ import annotations

import os
from pathlib import Path

from vispeft.errors import FileError, UnknownNameError
from vispeft.storage.files import JSON_FILE
from vispeft.zoo.folder import zoo_folder

__all__ = ["ADAPTER", "find_adapter"]

ADAPTER = "adapter"
"""Name of the adapter's directory inside the directory of a run."""


def find_adapter(source: str) -> Path:
    """Find the directory of an adapter.

    Args:
        source: ``zoo:NAME``, or the directory of an adapter or a run.

    Returns:
        The directory that holds ``adapter.json``.

    Raises:
        UnknownNameError: If the zoo has no such adapter.
        FileError: If there is no adapter in the directory.
    """
    if source.startswith("zoo:"):
        name, zoo = source.removeprefix("zoo:"), zoo_folder()
        known = sorted(path.parent.name for path in zoo.glob(f"*/{JSON_FILE}"))
        if name not in known:
            raise UnknownNameError("adapter of the zoo", name, known, f"They are in {zoo}.")
        return zoo / name
    for place in (Path(source), Path(source) / ADAPTER):
        if os.path.isfile(place / JSON_FILE):
            return place
    raise FileError(
        f"There is no adapter in {source!r}: no {JSON_FILE}, and no {ADAPTER}/{JSON_FILE}. Name the directory of "
        "an adapter or of a run, or zoo:NAME."
    )
