"""What a killed process leaves behind: files under temporary names, and saves that stopped between two files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE

__all__ = ["finish_save", "remove_partial"]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?:part|earlier|[a-z0-9_]{8})")
"""Names that `write_atomically` gives to files until they are complete, and to earlier ones until it is done. Earlier
versions ended them in eight random letters."""


def remove_partial(folder: Path, *endings: str) -> None:
    """Remove files that were being written when a process was killed.

    The caller sees to it that nobody writes there at present.

    Args:
        folder: The folder; it need not exist.
        endings: Ends of the names of files that are written there.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match and match["name"].endswith(endings) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def finish_save(folder: Path) -> None:
    """Finish a save of an adapter that was stopped between two of its files, or undo it.

    The files belong together that ``adapter.json`` lists, by their digests: each is looked for under its own name and
    under that of an earlier file.

    Args:
        folder: The adapter's directory; it need not exist.
    """
    if not folder.is_dir():
        return
    header = folder / JSON_FILE
    listed = _listed(header)
    for name in (ADAPTER_FILE, HEAD_FILE):
        earlier = folder / f".{name}.earlier"
        wanted = listed.get(name)
        if wanted is not None and earlier.is_file() and _sha256(folder / name) != wanted == _sha256(earlier):
            os.replace(earlier, folder / name)
    if all(_sha256(folder / name) == sha for name, sha in listed.items()):
        remove_partial(folder, ADAPTER_FILE, HEAD_FILE, JSON_FILE)


def _listed(header: Path) -> dict[str, str]:
    """Return the digests of an adapter's files; none where there is no description that can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(header.read_text(encoding="utf-8")) if header.is_file() else {}
        files = content.get("files") if isinstance(content, dict) else None
        if isinstance(files, dict):
            return {name: sha for name, sha in files.items() if name in (ADAPTER_FILE, HEAD_FILE)}
    return {}


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
