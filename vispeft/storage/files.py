"""The adapter's files: ``adapter.json``, ``adapter.safetensors`` and, where there is a head, ``head.safetensors``.

Every tensor file is named with its sha256 in the JSON file, and the JSON file holds a digest of itself, so that a
truncated or altered file is recognised before anything is built from it. Loading reads JSON and safetensors only: it
cannot run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from vispeft.errors import FileError, UnknownNameError
from vispeft.storage import quantize  # noqa: F401  (registers the codecs of a few bits)
from vispeft.storage.codecs import decode_tensors, known_codecs

__all__ = [
    "ADAPTER_FILE",
    "DECODER",
    "HEAD_FILE",
    "JSON_FILE",
    "SCHEMA",
    "UnknownTensorError",
    "check_tensors",
    "dtype_name",
    "read_adapter",
    "read_decoder",
    "read_encoded",
    "write_adapter",
    "write_atomically",
]

SCHEMA = 1
"""Version of the layout. It rises when an older version of vispeft could misread a file."""
JSON_FILE, ADAPTER_FILE, HEAD_FILE = "adapter.json", "adapter.safetensors", "head.safetensors"
DECODER = "decoder/"
"""What the names of a decoder's tensors begin with; those of an adapter's own classifier begin with ``head/``."""


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write files so that either all of them are new or all of them are as they were.

    All contents are on disk under other names before the first one gets its own, and what had the names before stays
    beside them until the last one has. A process killed in between leaves the earlier files to `read_adapter`.

    Args:
        files: Contents by path; they get their names in this order.

    Raises:
        FileError: If they cannot be written, for example because the disk is full.
    """
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            staged.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        for _, path in staged:
            if path.exists():
                _earlier(path).unlink(missing_ok=True)
                os.link(path, _earlier(path))
        for name, path in staged:
            os.replace(name, path)
        for _, path in staged:
            _earlier(path).unlink(missing_ok=True)
    except OSError as error:
        for name, path in staged:
            with contextlib.suppress(OSError):
                os.unlink(name)
            with contextlib.suppress(OSError):
                os.replace(_earlier(path), path)
                _earlier(path).unlink(missing_ok=True)  # renaming one name of a file to another leaves both
        raise FileError(
            f"{', '.join(str(path) for path in files)} could not be written ({error.strerror or error}). What was "
            "there before is still there; free some space or choose another place."
        ) from error


def _earlier(path: Path) -> Path:
    """Name what stood at a path while something new is put there."""
    return path.with_name(f".{path.name}.earlier")


def write_adapter(folder: Path, header: dict[str, Any], units: dict[str, Tensor], head: dict[str, Tensor]) -> None:
    """Write an adapter directory.

    Args:
        folder: The directory; made where it is missing.
        header: Everything ``adapter.json`` says besides file digests.
        units: Tensors by name in the file.
        head: Tensors of the head by name; empty for none.

    Raises:
        FileError: If it cannot be written.
    """
    contents = {ADAPTER_FILE: _to_bytes(units)}
    if head:
        contents[HEAD_FILE] = _to_bytes(head)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    header = {"schema": SCHEMA, **header, "files": files, "digest": ""}
    header["digest"] = _digest(header)
    text = json.dumps(header, indent=1, ensure_ascii=False).encode()
    write_atomically({**{folder / name: content for name, content in contents.items()}, folder / JSON_FILE: text})
    if not head:
        (folder / HEAD_FILE).unlink(missing_ok=True)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read, check and decode an adapter directory.

    Args:
        folder: The directory.

    Returns:
        The content of ``adapter.json``, the values of the units' tensors and those of the head's.

    Raises:
        FileError: If a file is missing, truncated, altered, of a later schema, or coded in an unknown way.
    """
    header, units, head = read_encoded(folder)
    return header, decode_tensors(units, header["tensors"]), decode_tensors(head, header["tensors"])


def read_encoded(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read and check an adapter directory, and leave tensors as they are coded there.

    Args:
        folder: The directory.

    Returns:
        The content of ``adapter.json``, the units' tensors and the head's; `decode_tensors` makes values of them.

    Raises:
        FileError: If a file is missing, truncated, altered, of a later schema, or coded in an unknown way.
    """
    if folder.name == JSON_FILE:
        folder = folder.parent
    header = _read_header(folder)
    unknown = {entry["codec"] for entry in header["tensors"].values()}.difference(known_codecs())
    if unknown:
        raise FileError(
            f"{folder / JSON_FILE} holds tensors coded as {', '.join(sorted(unknown))}, and no such codec is known; "
            "upgrade vispeft, or import the package that registers it (register_codec)."
        )
    tensors: dict[str, dict[str, Tensor]] = {ADAPTER_FILE: {}, HEAD_FILE: {}}
    for name, sha in header["files"].items():
        if name not in tensors:
            raise FileError(f"{folder / JSON_FILE} names a file {name!r} that no adapter has.")
        content = _read(folder / name)
        earlier = _earlier(folder / name)
        if hashlib.sha256(content).hexdigest() != sha and earlier.is_file():
            content = _read(earlier)  # saving was cut off between this file and the description
        if hashlib.sha256(content).hexdigest() != sha:
            raise FileError(
                f"{folder / name} is truncated or was altered: its sha256 is not the one in {JSON_FILE}. "
                "Copy the directory again from where it came from."
            )
        try:
            tensors[name] = load_bytes(content)
        except SafetensorError as error:
            raise FileError(f"{folder / name} is no safetensors file ({error}).") from error
    return header, tensors[ADAPTER_FILE], tensors[HEAD_FILE]


def read_decoder(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a task's decoder that stand beside an adapter.

    Args:
        folder: The adapter's directory.

    Returns:
        Tensors by their names in the decoder; empty where there is none.

    Raises:
        FileError: If a file is missing, truncated or altered.
    """
    _, _, head = read_adapter(Path(folder))
    return {key.removeprefix(DECODER): tensor for key, tensor in head.items() if key.startswith(DECODER)}


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / JSON_FILE
    content = _read(path)
    try:
        header = json.loads(content)
    except ValueError as error:
        raise FileError(f"{path} is truncated or was altered: it is not valid JSON ({error}).") from error
    if not isinstance(header, dict) or "schema" not in header or "digest" not in header:
        raise FileError(f"{path} is not an adapter's description: it has no schema and no digest.")
    if header["schema"] != SCHEMA:
        raise FileError(
            f"{path} has schema {header['schema']!r}, and this version of vispeft reads {SCHEMA}. Upgrade vispeft."
        )
    if _digest({**header, "digest": ""}) != header["digest"]:
        raise FileError(f"{path} was altered: its digest does not fit its content. Copy the directory again.")
    return header


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        listing = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) if path.parent.is_dir() else "no folder"
        raise FileError(
            f"{path} could not be read ({error.strerror}). An adapter is a directory with {JSON_FILE} and "
            f"{ADAPTER_FILE}; found there: {listing or 'nothing'}."
        ) from error


def _digest(header: dict[str, Any]) -> str:
    header = json.loads(json.dumps(header))  # as it will be read: keys are strings, tuples are lists
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save_bytes(plain, metadata={"format": "vispeft"})


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type as in JSON, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not fit, before the first one is copied."""
    missing = [key for key in own if key not in given]
    if missing:
        raise FileError(f"{len(missing)} of {len(own)} tensors are missing, first {', '.join(missing[:3])}.")
    for key, tensor in given.items():
        if key not in own:
            raise UnknownTensorError(key, own)
        if tensor.shape != own[key].shape:
            raise FileError(f"{key} has shape {tuple(tensor.shape)}; {tuple(own[key].shape)} is needed.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileError(f"{key} is not finite.")


class UnknownTensorError(FileError, UnknownNameError):
    """A tensor in a file belongs to nothing here."""

    def __init__(self, key: str, own: Mapping[str, Tensor]) -> None:
        """Compose the message.

        Args:
            key: The tensor's name.
            own: What there is.
        """
        UnknownNameError.__init__(self, "tensor", key, own)
