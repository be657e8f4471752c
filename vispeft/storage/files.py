"""An adapter's files: ``adapter.json``, ``adapter.safetensors`` and, with a classifier, ``head.safetensors``.

The JSON file lists every tensor file with its sha256 and contains a digest of itself, so that a truncated or altered
file is detected before anything is built from it. Loading reads JSON and safetensors only and cannot run code.
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
"""Version of the layout. It is raised when an older version of vispeft could misread a file."""
JSON_FILE, ADAPTER_FILE, HEAD_FILE = "adapter.json", "adapter.safetensors", "head.safetensors"
DECODER = "decoder/"
"""Name prefix of a decoder's tensors; the prefix of an adapter's own classifier is ``head/``."""


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write several files, all or none.

    All contents are written under temporary names before the first file is renamed, and the earlier files are kept
    until the last one is renamed. If the process is killed in between, `read_adapter` finds the earlier files.

    Args:
        files: Contents by path, renamed in this order.

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
                _earlier(path).unlink(missing_ok=True)  # renaming onto a hard link of the same file leaves both
        raise FileError(
            f"{', '.join(str(path) for path in files)} could not be written ({error.strerror or error}). The earlier "
            "files are unchanged; free some space or choose another directory."
        ) from error


def _earlier(path: Path) -> Path:
    """Return the name of an earlier file while its path is being overwritten."""
    return path.with_name(f".{path.name}.earlier")


def write_adapter(folder: Path, header: dict[str, Any], units: dict[str, Tensor], head: dict[str, Tensor]) -> None:
    """Write an adapter directory.

    Args:
        folder: The directory; created if missing.
        header: The content of ``adapter.json`` without file digests.
        units: Tensors by name in the file.
        head: Tensors of classifier and decoder by name; empty for none.

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
        The content of ``adapter.json``, the values of the units' tensors and those of classifier and decoder.

    Raises:
        FileError: If a file is missing, truncated, altered, of another schema, or uses an unknown codec.
    """
    header, units, head = read_encoded(folder)
    return header, decode_tensors(units, header["tensors"]), decode_tensors(head, header["tensors"])


def read_encoded(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read and check an adapter directory without decoding its tensors.

    Args:
        folder: The directory.

    Returns:
        The content of ``adapter.json``, the units' tensors and the classifier's; decode them with `decode_tensors`.

    Raises:
        FileError: If a file is missing, truncated, altered, of another schema, or uses an unknown codec.
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
            content = _read(earlier)  # saving was interrupted between this file and the JSON file
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
    """Read the tensors of the decoder saved with an adapter.

    Args:
        folder: The adapter's directory.

    Returns:
        Tensors by their names in the decoder; empty if there is none.

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
    """Return the name of a dtype in JSON, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise on tensors that do not fit, before any is copied."""
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
    """A tensor in a file matches no tensor of the adapter or model."""

    def __init__(self, key: str, own: Mapping[str, Tensor]) -> None:
        """Compose the message.

        Args:
            key: The tensor's name.
            own: The existing tensors.
        """
        UnknownNameError.__init__(self, "tensor", key, own)
