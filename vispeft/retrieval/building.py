"""Writing of an index, batch by batch: a build that was killed goes on behind its last whole batch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vispeft.errors import ConfigError, DataError, FileError, brief, check_count
from vispeft.metrics.similarity import make_similarity
from vispeft.retrieval.approximate import build, check_kind
from vispeft.retrieval.collection import Collection, file_digest
from vispeft.retrieval.index import DESCRIPTION, IMAGES, Index, Model, described, table_of
from vispeft.storage.disk import read_regular, write_atomically
from vispeft.storage.leftovers import remove_partial
from vispeft.storage.locks import hold

__all__ = ["Builder"]

PARTS, PLAN = "parts", "plan.json"
SHARD = 2**28
"""Largest size in bytes of one file of embeddings."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


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
        self._refuse_finished()
        if found and PLAN not in found:
            raise ConfigError(f"{self.place} is not empty (found {', '.join(found[:4])}). Choose another --out.")

    def build(self, embed: Callable[[list[Path]], Tensor], progress: Callable[..., Any] = iter) -> Index:
        """Embed what is not embedded yet, and write the index.

        Args:
            embed: Computes embeddings (B, d) of files.
            progress: Passes on the starts of the batches, and may show them.

        Raises:
            ConfigError: If the directory holds an unfinished index of other images or another model.
            DataError: If an image cannot be read, or its embedding is not finite.
            FileError: If files cannot be written, or another process builds the same index.
        """
        with self._held():
            self._begin()
            digests: list[str] = []
            for start in progress(range(0, len(self.collection), self.batch_size)):
                paths = self.collection.paths[start : start + self.batch_size]
                now = [file_digest(path) for path in paths]
                digests += now
                if self._kept(start) != now:
                    self._write_part(start, self._embedded(embed, paths), now)
            self._finish(digests)
        return Index.open(self.place)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        try:
            (self.place / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"--out is {self.place}, where nothing can be written ({error.strerror}).") from error
        with hold(self.place / ".lock", f"The index {self.place}"):
            self._refuse_finished()  # another process may have finished it meanwhile
            remove_partial(self.place, PLAN, IMAGES, DESCRIPTION, ".safetensors", ".faiss")
            remove_partial(self.place / PARTS, ".safetensors")
            yield

    def _refuse_finished(self) -> None:
        if (self.place / DESCRIPTION).exists():
            raise ConfigError(f"{self.place} holds a finished index, which is not overwritten. Choose another --out.")

    def _begin(self) -> None:
        """Write the plan, or compare it with that of the build before."""
        names = hashlib.sha256(json.dumps([self.collection.names, self.collection.labels]).encode()).hexdigest()
        plan = {
            "model": asdict(self.model),
            "images": {"root": str(self.collection.root), "number": len(self.collection), "digest": names},
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }
        path = self.place / PLAN
        if not path.exists():
            write_atomically({path: json.dumps(plan, indent=1).encode()})
            return
        try:
            before = json.loads(read_regular(path))
            other = [key for key in plan if before.get(key) != plan[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise FileError(f"{path} cannot be read: {brief(error)} Choose another --out.") from error
        if other:
            raise ConfigError(
                f"{self.place} holds an unfinished index of another {' and another '.join(other)}. Give the settings "
                "of that build to go on with it, or choose another --out."
            )

    def _part(self, start: int) -> Path:
        return self.place / PARTS / f"{start:09d}.safetensors"

    def _kept(self, start: int) -> list[str] | None:
        """Return the digests of the images of a batch that was written; None if there is none that can be read."""
        path = self._part(start)
        try:
            with safe_open(path, "pt") as file:
                file.get_tensor("embeddings")
                return list(json.loads(file.metadata()["images"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _embedded(self, embed: Callable[[list[Path]], Tensor], paths: list[Path]) -> Tensor:
        found = embed(paths).float().cpu()
        stored = found.to(DTYPES[self.dtype])
        broken = [str(path) for path, row in zip(paths, stored, strict=True) if not row.isfinite().all()]
        if broken:
            hint = "" if not found.isfinite().all() else " in float16; leave --dtype out"
            raise DataError(
                f"The embeddings of {', '.join(broken[:5])} are not finite{hint}. The batches before are kept."
            )
        return stored

    def _write_part(self, start: int, embeddings: Tensor, digests: list[str]) -> None:
        content = tensors_to_bytes({"embeddings": embeddings.contiguous()}, {"images": json.dumps(digests)})
        write_atomically({self._part(start): content})

    def _finish(self, digests: list[str]) -> None:
        """Join the batches in shards, and describe them; with the description the index is finished."""
        shards: dict[str, str] = {}
        held: list[Tensor] = []
        vectors: list[Tensor] = []
        starts = range(0, len(self.collection), self.batch_size)
        for start in starts:
            with safe_open(self._part(start), "pt") as file:
                held.append(file.get_tensor("embeddings"))
            if start == starts[-1] or sum(part.nbytes for part in held) + held[-1].nbytes > SHARD:
                joined = torch.cat(held)
                name, content = f"embeddings-{len(shards):05d}.safetensors", tensors_to_bytes({"embeddings": joined})
                write_atomically({self.place / name: content})
                shards[name] = hashlib.sha256(content).hexdigest()
                vectors += [] if self.kind == "exact" else [joined.float()]
                held = []
        files = {IMAGES: table_of(self.collection, digests)}
        if vectors:
            prepared = make_similarity(self.model.similarity).prepare(torch.cat(vectors))
            files[f"{self.kind}.faiss"] = build(self.kind, prepared)
        description = described(self.model, self.run, self.collection, self.kind, files, shards)
        contents = {self.place / name: content for name, content in files.items()}
        write_atomically({**contents, self.place / DESCRIPTION: json.dumps(description, indent=1).encode()})
        shutil.rmtree(self.place / PARTS, ignore_errors=True)
        (self.place / PLAN).unlink(missing_ok=True)
