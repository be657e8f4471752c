"""An index of embedded images: a directory whose files are checked by their digests."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from vispeft.errors import FileError, brief
from vispeft.retrieval.collection import Collection
from vispeft.storage.disk import read_regular
from vispeft.storage.tables import as_csv

__all__ = ["DESCRIPTION", "IMAGES", "Index", "Model", "described", "table_of"]

DESCRIPTION, IMAGES = "index.json", "images.csv"
SCHEMA = 1
"""Version of the form of the directory."""
COLUMNS = ["path", "label", "sha256"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What embeddings depend on besides the images; two embeddings are comparable if it is equal."""

    adapter: str
    """Digest of the adapter."""
    preprocessing: dict[str, Any]
    """Values of `Preprocessing`."""
    reading: dict[str, Any]
    """Settings of `Reading` that differ from the defaults."""
    similarity: dict[str, Any]
    """Values of `Similarity`."""
    token_merging: dict[str, Any] = field(default_factory=dict)
    """Values of `TokenMerging`; empty where no tokens are merged, and in indices of earlier versions."""

    def differences(self, other: Model) -> list[str]:
        """Say in which respects another model differs.

        Args:
            other: The other model.
        """
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [f"{name} {_short(own)} here, {_short(theirs)} there" for name, own, theirs in pairs if own != theirs]


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class Index:
    """Embeddings of a collection of images, and how to compare them."""

    place: Path
    """Its directory."""
    model: Model
    """What the embeddings were made by."""
    run: str
    """Directory of the run that made them."""
    collection: Collection
    """The images."""
    digests: tuple[str, ...]
    """sha256 of each image file when it was embedded."""
    embeddings: Tensor
    """(N, d), as stored: float32 or float16."""
    kind: str
    """How it is searched: ``exact``, ``ivf`` or ``hnsw``."""
    approximate: bytes
    """Serialised index of faiss; empty for an exact one."""

    @classmethod
    def open(cls, place: str | Path) -> Index:
        """Read and check an index.

        Args:
            place: Its directory.

        Raises:
            FileError: If it is unfinished, a file is missing or was changed, or its content is none of an index.
        """
        folder = Path(place)
        try:
            return cls._read(folder, _description(folder))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise FileError(
                f"{folder} is no index that can be read ({brief(error)}) Embed the images again."
            ) from error

    @classmethod
    def _read(cls, folder: Path, described: Mapping[str, Any]) -> Index:
        outside = [name for name in described["files"] if name != os.path.basename(name) or name in ("", ".", "..")]
        if outside:
            raise FileError(f"{folder} names a file outside of itself, {brief(ValueError(outside[0]))} Do not use it.")
        contents = {name: _checked(folder / name, sha) for name, sha in described["files"].items()}
        rows = list(csv.reader(io.StringIO(contents[IMAGES].decode(), newline="")))[1:]
        shards = [tensors_from_bytes(contents[name])["embeddings"] for name in described["shards"]]
        embeddings = torch.cat(shards)
        if len(embeddings) != len(rows):
            raise FileError(
                f"{folder} has {len(rows)} images and {len(embeddings)} embeddings. Embed the images again."
            )
        names, labels, digests = (tuple(column) for column in zip(*rows, strict=True))
        return cls(
            place=folder,
            model=Model(**described["model"]),
            run=described["run"],
            collection=Collection(Path(described["root"]), names, labels),
            digests=digests,
            embeddings=embeddings,
            kind=described["kind"],
            approximate=contents.get(described.get("approximate", ""), b""),
        )


def described(
    model: Model, run: str, collection: Collection, kind: str, files: Mapping[str, bytes], shards: Mapping[str, str]
) -> dict[str, Any]:
    """Describe an index for its ``index.json``.

    Args:
        model: What the embeddings were made by.
        run: Directory of the run.
        collection: The images.
        kind: How it is searched.
        files: Contents of the other files but the shards; one that ends in ``.faiss`` is the approximate index.
        shards: Digests of the shards by name, in order.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    description = {
        "schema": SCHEMA,
        "model": asdict(model),
        "run": run,
        "root": str(collection.root),
        "images": len(collection),
        "kind": kind,
        "shards": list(shards),
        "approximate": next((name for name in files if name.endswith(".faiss")), ""),
        "files": {**digests, **shards},
    }
    return {**description, "digest": _digest(description)}


def table_of(collection: Collection, digests: list[str]) -> bytes:
    """Write the table of images.

    Args:
        collection: The images.
        digests: The sha256 of each.
    """
    return as_csv([COLUMNS, *zip(collection.names, collection.labels, digests, strict=True)]).encode()


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not os.path.exists(path):  # False also for a name that no file can have
        hint = (
            "It is unfinished: give the same command to `vispeft embed` again."
            if os.path.exists(folder / "parts")
            else "`vispeft embed` makes one."
        )
        raise FileError(f"{folder} is no index: it has no {DESCRIPTION}. {hint}")
    try:
        found = json.loads(read_regular(path))
        digest = found.pop("digest")
        schema = found["schema"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {brief(error)} Embed the images again.") from error
    if schema != SCHEMA:
        raise FileError(f"{path} has the schema {schema}, and this version reads {SCHEMA}. Embed the images again.")
    if digest != _digest(found):
        raise FileError(f"{path} was changed after it was written. Embed the images again.")
    return dict(found)


def _checked(path: Path, sha: str) -> bytes:
    try:
        content = read_regular(path)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}). Embed the images again.") from error
    if hashlib.sha256(content).hexdigest() != sha:
        raise FileError(
            f"{path} was changed after it was written, so it no longer fits its index. Embed the images again."
        )
    return content


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
