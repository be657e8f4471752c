"""An adapter's files: ``adapter.json``, ``adapter.safetensors`` and, with a classifier, ``head.safetensors``.

The JSON file lists every tensor file with its sha256 and contains a digest of itself, so that a truncated or altered
file is detected before anything is built from it. Loading reads JSON and safetensors only and cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from vispeft.errors import FileError, UnknownNameError, brief
from vispeft.storage import quantize  # noqa: F401  (registers the codecs of a few bits)
from vispeft.storage.codecs import RAW, decode_tensors, known_codecs
from vispeft.storage.disk import earlier, read_regular, regular_size, write_atomically
from vispeft.storage.form import FormError, check_form, shown
from vispeft.storage.strict_json import named_once, parse_json

__all__ = [
    "ADAPTER_FILE",
    "DECODER",
    "HEAD",
    "HEAD_FILE",
    "JSON_FILE",
    "SCHEMA",
    "UnknownTensorError",
    "check_tensors",
    "check_values",
    "dtype_name",
    "read_adapter",
    "read_decoder",
    "read_encoded",
    "write_adapter",
]

SCHEMA = 1
"""Version of the layout. It is raised when an older version of vispeft could misread a file."""
JSON_FILE, ADAPTER_FILE, HEAD_FILE = "adapter.json", "adapter.safetensors", "head.safetensors"
HEAD = "head/"
"""Name prefix of the tensors of an adapter's own classifier."""
DECODER = "decoder/"
"""Name prefix of a decoder's tensors."""
LARGEST_JSON = 2**23
"""Bytes of an ``adapter.json``; 1,000 classes on a model of 1,000 tensors take a fiftieth of it."""
LARGEST_TENSORS_JSON = 2**23
"""Bytes of the header of a tensor file, which has about 100 for each tensor."""
MOST_PER_BYTE = 64
"""Entries of a classifier for each byte of its code; those of 1 bit have 8."""
_READS = 100
"""Number of times that an adapter is read again because it was saved meanwhile."""


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
    header = json.loads(json.dumps(header))  # as it will be read: keys are strings, tuples are lists
    header["digest"] = _digest(header)
    _check_form(folder / JSON_FILE, header)
    text = json.dumps(header, indent=1, ensure_ascii=False).encode()
    new = {**{folder / name: content for name, content in contents.items()}, folder / JSON_FILE: text}
    write_atomically(new, without=[] if head else [folder / HEAD_FILE])


def read_adapter(
    folder: Path, check: Callable[[dict[str, Any]], None] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read, check and decode an adapter directory.

    Args:
        folder: The directory.
        check: Called with the content of ``adapter.json`` before any tensor is read. For files of others it has to
            raise on tensors of other shapes than the method makes on the model: a few bytes may describe one of any
            size.

    Returns:
        The content of ``adapter.json``, the values of the units' tensors and those of classifier and decoder.

    Raises:
        FileError: If a file is missing, truncated, altered, of another schema or form, or uses an unknown codec.
    """
    header, units, head = read_encoded(folder, check)
    return header, decode_tensors(units, header["tensors"]), decode_tensors(head, header["tensors"])


def read_encoded(
    folder: Path, check: Callable[[dict[str, Any]], None] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read and check an adapter directory without decoding its tensors.

    Where the directory is saved again meanwhile, description and tensors are read again, so that they belong together.

    Args:
        folder: The directory.
        check: Called with the content of ``adapter.json`` before any tensor is read; it may raise.

    Returns:
        The content of ``adapter.json``, the units' tensors and the classifier's; decode them with `decode_tensors`.

    Raises:
        FileError: If a file is missing, truncated, altered, of another schema or form, or uses an unknown codec.
    """
    if folder.name == JSON_FILE:
        folder = folder.parent
    for _ in range(_READS):
        content = _read(folder / JSON_FILE, LARGEST_JSON)
        try:
            return _read_files(folder, _parsed(folder / JSON_FILE, content), check)
        except FileError:
            if _read(folder / JSON_FILE, LARGEST_JSON) == content:
                raise
    raise FileError(f"{folder} was saved again {_READS} times while it was read. Read it when its training has ended.")


def _read_files(
    folder: Path, header: dict[str, Any], check: Callable[[dict[str, Any]], None] | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    unknown = {entry["codec"] for entry in header["tensors"].values()}.difference(known_codecs())
    if unknown:
        raise FileError(
            f"{folder / JSON_FILE} holds tensors coded as {', '.join(sorted(unknown))}, and no such codec is known; "
            "upgrade vispeft, or import the package that registers it (register_codec)."
        )
    if check is not None:
        check(header)
    tensors: dict[str, dict[str, Tensor]] = {ADAPTER_FILE: {}, HEAD_FILE: {}}
    for name, sha in header["files"].items():
        content = _matching(folder / name, sha)
        try:
            tensors[name] = load_bytes(content)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{folder / name} is no safetensors file that can be read ({brief(error)})") from error
    _check_described(folder, header, tensors[ADAPTER_FILE], tensors[HEAD_FILE])
    return header, tensors[ADAPTER_FILE], tensors[HEAD_FILE]


def _matching(path: Path, sha: str) -> bytes:
    """Read a tensor file, or the one before it where a save was interrupted between this file and the JSON file."""
    for place in (path, earlier(path)):
        if (place is path or place.is_file()) and _is_whole(place):
            content = _read(place)
            if hashlib.sha256(content).hexdigest() == sha:
                return content
    raise FileError(
        f"{path} is truncated or was altered: its sha256 is not the one in {JSON_FILE}, or its length not the one in "
        "its header. Copy the directory again from where it came from."
    )


def _is_whole(path: Path) -> bool:
    """Return whether a tensor file is as long as its own header tells, so that no other one is read into memory."""
    try:
        size = regular_size(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size and length <= LARGEST_TENSORS_JSON else b"null"
        header: Any = json.loads(text, object_pairs_hook=lambda pairs: named_once(path, pairs, "in its header"))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return bool(8 + length + max(ends, default=0) == size)
    except OSError:
        return True  # the reader says why
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False


def _check_described(
    folder: Path, header: Mapping[str, Any], units: Mapping[str, Tensor], head: Mapping[str, Tensor]
) -> None:
    """Raise if the tensors of the files are not those that the description lists."""
    listed = header["tensors"]
    wanted = {key: entry for key, entry in listed.items() if not key.startswith(HEAD)}
    wanted |= {f"{HEAD}{key}": {"codec": RAW, "shape": shape} for key, shape in (header["head"] or {}).items()}
    wanted |= {key: entry for key, entry in listed.items() if key.startswith(HEAD)}
    found = {**units, **{key: tensor for key, tensor in head.items() if not key.startswith(DECODER)}}
    other = found.keys() ^ wanted.keys()
    if other:
        where = "has" if min(other) in found else "lacks"
        raise FileError(f"{folder} {where} the tensor {shown(min(other))}, in disagreement with its {JSON_FILE}.")
    for key, tensor in found.items():
        coded = wanted[key]["codec"] != RAW
        kind = "uint8" if coded else wanted[key].get("dtype", dtype_name(tensor.dtype))
        fits = tensor.ndim == 1 if coded else list(tensor.shape) == wanted[key]["shape"]
        if dtype_name(tensor.dtype) != kind or not fits:
            raise FileError(
                f"{key} in {folder} is a {dtype_name(tensor.dtype)} tensor of shape {tuple(tensor.shape)}; "
                f"{JSON_FILE} describes it as {shown(wanted[key])}."
            )
        if coded and key.startswith(HEAD) and prod(wanted[key]["shape"]) > MOST_PER_BYTE * len(tensor):
            raise FileError(
                f"{key} in {folder} has {len(tensor)} bytes, and {JSON_FILE} describes it as {shown(wanted[key])}, "
                "which no code of a classifier makes of them."
            )


def read_decoder(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of the decoder saved with an adapter.

    Args:
        folder: The adapter's directory.

    Returns:
        Tensors by their names in the decoder; empty if there is none.

    Raises:
        FileError: If a file is missing, truncated or altered.
    """
    _, _, head = read_encoded(Path(folder))  # a decoder's tensors are never coded
    return {key.removeprefix(DECODER): tensor for key, tensor in head.items() if key.startswith(DECODER)}


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    """Read the content of an ``adapter.json`` and check it."""
    header = parse_json(path, content, finite=False)  # notes of measurements of earlier versions
    if not isinstance(header, dict) or "schema" not in header or "digest" not in header:
        raise FileError(f"{path} is not an adapter's description: it has no schema and no digest.")
    if header["schema"] != SCHEMA:
        raise FileError(
            f"{path} has schema {shown(header['schema'])}, and this version of vispeft reads {SCHEMA}. Upgrade vispeft."
        )
    try:
        digest = _digest({**header, "digest": ""})
    except (ValueError, RecursionError) as error:  # halves of characters, nesting without an end
        raise FileError(f"{path} holds text or nesting that no adapter has ({brief(error)})") from error
    if digest != header["digest"]:
        raise FileError(f"{path} was altered: its digest does not fit its content. Copy the directory again.")
    _check_form(path, header)
    return header


def _check_form(path: Path, header: dict[str, Any]) -> None:
    try:
        check_form(header)
    except FormError as error:
        raise FileError(f"{path} has not the form of an adapter's description: {error}") from error
    for name in header["files"]:
        if name not in (ADAPTER_FILE, HEAD_FILE):
            raise FileError(f"{path} names a file {shown(name)} that no adapter has.")
    if ADAPTER_FILE not in header["files"]:
        raise FileError(f"{path} names no {ADAPTER_FILE}, which every adapter has.")


def _read(path: Path, at_most: int | None = None) -> bytes:
    try:
        return read_regular(path, at_most)
    except (OSError, ValueError) as error:
        listing = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) if path.parent.is_dir() else "no folder"
        raise FileError(
            f"{path} could not be read ({brief(error)[:-1]}). An adapter is a directory with {JSON_FILE} and "
            f"{ADAPTER_FILE}; found there: {listing or 'nothing'}."
        ) from error


def _digest(header: dict[str, Any]) -> str:
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
        check_values(key, tensor, own[key].dtype)


def check_values(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise on values that are not finite, or that another dtype holds as something else.

    Args:
        key: Name of the tensor.
        tensor: The tensor.
        dtype: The dtype it is converted to. Rounding to fewer digits is no loss; fractions as whole numbers are.

    Raises:
        FileError: If there is such a value.
    """
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # PyTorch cannot ask numbers of 8 bits whether they are finite
    if not torch.isfinite(tensor).all():
        raise FileError(f"{key} is not finite.")
    if tensor.dtype == dtype:
        return
    own = tensor.real.to(dtype)
    rounds = tensor.is_floating_point() and own.is_floating_point()
    if not torch.isfinite(own).all() or not (rounds or torch.equal(own.to(tensor.dtype), tensor)):
        raise FileError(
            f"{key} is of dtype {dtype_name(tensor.dtype)}, and its values cannot be held as {dtype_name(dtype)}."
        )


class UnknownTensorError(FileError, UnknownNameError):
    """A tensor in a file matches no tensor of the adapter or model."""

    def __init__(self, key: str, own: Iterable[str]) -> None:
        """Compose the message.

        Args:
            key: The tensor's name.
            own: Names of the existing tensors.
        """
        UnknownNameError.__init__(self, "tensor", key, own)
