"""Writing of an index, batch by batch: a build that was killed goes on behind its last whole batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vispeft.data.reading import BrokenImage, ReadBatch
from vispeft.errors import ConfigError, DataError, FileError, check_count, counted
from vispeft.metrics.similarity import make_similarity
from vispeft.retrieval.approximate import build, check_kind
from vispeft.retrieval.collection import Collection
from vispeft.retrieval.index import DESCRIPTION, IMAGES, Index, Model, described, table_of
from vispeft.storage.disk import write_atomically
from vispeft.storage.pieces import PARTS, PLAN, Pieces

__all__ = ["Builder", "Built"]

SHARD = 2**28
"""Largest size in bytes of one file of embeddings."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Read(Protocol):
    """What reads the files; see `vispeft.data.reading.FileReader`."""

    def batches(self, groups: Sequence[Sequence[Path]]) -> Iterator[ReadBatch]:
        """Read groups of files, in order."""
        ...

    def mark_of(self, path: str) -> str:
        """Return the mark of a file."""
        ...


class Built(NamedTuple):
    """A finished index."""

    index: Index
    """The index."""
    left_out: list[BrokenImage]
    """Images that could not be read and are not in it."""


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Embeds a collection of images into a directory.

    Each batch is a file of its own until the last one is written; then they become shards. Batches always begin at the
    same images, so that embeddings do not depend on where a build was interrupted.
    """

    place: Path
    """Directory of the index."""
    model: Model
    """What the embeddings are made by."""
    run: str
    """Directory of the run."""
    collection: Collection
    """The images."""
    batch_size: int = 64
    """Images that are embedded at once."""
    dtype: str = "float32"
    """Type in which embeddings are stored: float32 or float16."""
    kind: str = "exact"
    """How the index is searched: ``exact``, ``ivf`` or ``hnsw``."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: If one cannot work, or an index is there.
        """
        check_count("--batch_size", self.batch_size)
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: choose {' or '.join(DTYPES)}.")
        check_kind(self.kind, make_similarity(self.model.similarity))
        self._check_place()

    def _check_place(self) -> None:
        try:
            found = sorted(path.name for path in self.place.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileError(f"--out is {self.place}, where nothing can be written ({error.strerror}).") from error
        if DESCRIPTION in found:
            self._pieces().clear_behind_a_kill()
        self._refuse_finished()
        if found not in ([], [PARTS]) and PLAN not in found:  # the pieces' folder is made before the plan
            raise ConfigError(f"{self.place} is not empty (found {', '.join(found[:4])}). Choose another --out.")

    def build(self, read: Read, embed: Callable[[Any], Tensor], progress: Callable[..., Any] = iter) -> Built:
        """Embed what is not embedded yet, and write the index of the images that could be read.

        Args:
            read: Reader of the files, whose marks are digests.
            embed: Computes embeddings (B, d) of images as they were read.
            progress: Passes on the starts of the batches, and may show them.

        Raises:
            ConfigError: If the directory holds an unfinished index of other images or another model.
            DataError: If no image can be read, or an embedding is not finite.
            FileError: If files cannot be written, or another process builds the same index.
        """
        pieces = self._pieces()
        with pieces.held(self._refuse_finished, IMAGES, DESCRIPTION, ".safetensors", ".faiss"):
            paths, starts = self.collection.paths, range(0, len(self.collection), self.batch_size)
            groups = {start: paths[start : start + self.batch_size] for start in starts}
            missing = [start for start in starts if not self._is_kept(pieces.path(start), groups[start], read)]
            batches = read.batches([groups[start] for start in missing])
            for start, batch in zip(progress(missing), batches, strict=True):
                names = [str(groups[start][position]) for position in batch.kept]
                pieces.write(start, _packed(batch, self._embedded(embed(batch.images), names) if names else None))
            left_out = self._finish(pieces, starts)
        return Built(Index.open(self.place), left_out)

    def _pieces(self) -> Pieces:
        names = hashlib.sha256(json.dumps([self.collection.names, self.collection.labels]).encode()).hexdigest()
        plan = {
            "model": asdict(self.model),
            "images": {"root": str(self.collection.root), "number": len(self.collection), "digest": names},
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }
        return Pieces(place=self.place, what="index", plan=plan, ending=".safetensors")

    def _refuse_finished(self) -> None:
        if (self.place / DESCRIPTION).exists():
            raise ConfigError(f"{self.place} holds a finished index, which is not overwritten. Choose another --out.")

    def _is_kept(self, path: Path, files: Sequence[Path], read: Read) -> bool:
        """Whether a batch was written whole, of the files as they are now."""
        try:
            with safe_open(path, "pt") as file:
                file.get_tensor("embeddings")
                marks, left_out = (json.loads(file.metadata()[key]) for key in ("images", "left_out"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False
        # What could not be read is tried again: another limit on pixels may hold now.
        return not left_out and bool(marks == [read.mark_of(str(path)) for path in files])

    def _embedded(self, found: Tensor, names: Sequence[str]) -> Tensor:
        found = found.float().cpu()
        stored = found.to(DTYPES[self.dtype])
        broken = [name for name, row in zip(names, stored, strict=True) if not row.isfinite().all()]
        if broken:
            hint = "" if not found.isfinite().all() else " in float16; leave --dtype out"
            raise DataError(
                f"The embeddings of {', '.join(broken[:5])} are not finite{hint}. The batches before are kept."
            )
        return stored

    def _finish(self, pieces: Pieces, starts: range) -> list[BrokenImage]:
        """Join the batches in shards, and describe them; with the description the index is finished."""
        shards: dict[str, str] = {}
        held: list[Tensor] = []
        vectors: list[Tensor] = []
        kept: list[int] = []
        digests: list[str] = []
        left_out: list[BrokenImage] = []
        for start in starts:
            with safe_open(pieces.path(start), "pt") as file:
                notes = {key: json.loads(value) for key, value in file.metadata().items()}
                held += [file.get_tensor("embeddings")] if notes["kept"] else []
            kept += [start + position for position in notes["kept"]]
            digests += [notes["images"][position] for position in notes["kept"]]
            left_out += [BrokenImage(*entry) for entry in notes["left_out"]]
            if held and (start == starts[-1] or sum(part.nbytes for part in held) + held[-1].nbytes > SHARD):
                joined = torch.cat(held)
                name, content = f"embeddings-{len(shards):05d}.safetensors", tensors_to_bytes({"embeddings": joined})
                write_atomically({self.place / name: content})
                shards[name] = hashlib.sha256(content).hexdigest()
                vectors += [] if self.kind == "exact" else [joined.float()]
                held = []
        if not kept:
            pieces.clear()
            raise DataError(f"None of {counted(len(self.collection), 'image')} can be used: {left_out[0].reason}")
        collection = self.collection.take(kept)
        files = {IMAGES: table_of(collection, digests)}
        if vectors:
            prepared = make_similarity(self.model.similarity).prepare(torch.cat(vectors))
            files[f"{self.kind}.faiss"] = build(self.kind, prepared)
        description = described(self.model, self.run, collection, self.kind, files, shards)
        contents = {self.place / name: content for name, content in files.items()}
        write_atomically({**contents, self.place / DESCRIPTION: json.dumps(description, indent=1).encode()})
        pieces.clear()
        return left_out


def _packed(batch: ReadBatch, embeddings: Tensor | None) -> bytes:
    """Make the file of a batch: its embeddings, and what is known about its images."""
    found = torch.empty(0) if embeddings is None else embeddings
    notes = {"images": batch.marks, "kept": batch.kept, "left_out": batch.left_out}
    return tensors_to_bytes(
        {"embeddings": found.contiguous()}, {key: json.dumps(value) for key, value in notes.items()}
    )
