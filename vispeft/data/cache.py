"""Outputs of a frozen backbone on disk: a store of tensors by key, and a split that serves them.

A folder per key holds one ``.npy`` file per output, memory-mapped rather than read whole, and ``meta.json`` with the
key and a sha256 of each file. The folder is named by a digest of the key, so other weights, images or settings never
find it, and gets that name only once all its files are on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vispeft.data.base import BatchSplit, Index
from vispeft.errors import FileError
from vispeft.storage.locks import clear, hold

__all__ = ["CachedSplit", "OutputFiles", "OutputStore", "changes_between_epochs", "split_digest"]

logger = logging.getLogger(__name__)

META = "meta.json"
_PART = ".part-"
"""Start of the name of a folder that is being filled."""
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Answers of file systems that take no room in advance."""
_CHUNK = 2**20
"""Bytes written at a time where room is taken by writing."""
PROBED = 64
"""Number of training images prepared for two epochs to detect changes."""


class CachedSplit(BatchSplit):
    """A split that serves the outputs of a frozen backbone instead of its images."""

    def __init__(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """Store the tensors.

        Args:
            outputs: Outputs of the backbone by name, one row per image.
            targets: Targets, one row per image.
        """
        self.outputs, self.targets = dict(outputs), targets

    def batch(self, indices: list[Index]) -> tuple[Any, Tensor]:
        """Build a batch."""
        order = torch.tensor([index for _, index in indices])
        return {name: tensor[order] for name, tensor in self.outputs.items()}, self.targets[order]

    def plain(self) -> CachedSplit:
        """Return the split itself: its outputs are those of images without augmentation."""
        return self


class OutputFiles:
    """Memory-mapped files of one key, written batch by batch."""

    def __init__(self, folder: Path, rows: int) -> None:
        """Start without files.

        Args:
            folder: Folder for the files.
            rows: Final number of rows of each file.
        """
        self.folder, self.rows, self.done = folder, rows, 0
        self.maps: dict[str, np.memmap[Any, Any]] = {}
        self.dtypes: dict[str, str] = {}

    def append(self, outputs: Mapping[str, Tensor]) -> None:
        """Write the rows of the next batch.

        Args:
            outputs: Outputs by name, all with the same number of rows.
        """
        count = 0
        for name, tensor in outputs.items():
            values = _as_numpy(tensor.detach().cpu())
            if name not in self.maps:
                shape = (self.rows, *values.shape[1:])
                file = self.folder / f"{name}.npy"
                self.maps[name] = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=shape)
                _take_room(file, self.maps[name].nbytes)
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            count = len(values)
            self.maps[name][self.done : self.done + count] = values
        self.done += count

    def close(self) -> dict[str, str]:
        """Flush all files to disk.

        Returns:
            The types of the outputs, by name.
        """
        for array in self.maps.values():
            array.flush()
        self.maps = {}
        return self.dtypes


class OutputStore:
    """A folder of outputs by key."""

    def __init__(self, place: Path) -> None:
        """Set the folder, which is created on the first write.

        Args:
            place: The folder.
        """
        self.place = place

    def home(self, key: Mapping[str, Any]) -> Path:
        """Return the path of a key's folder, which need not exist.

        Args:
            key: Everything the outputs depend on, as JSON-compatible values.
        """
        return self.place / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]

    def read(self, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Map the outputs of a key into memory.

        Args:
            key: The key.

        Returns:
            Outputs by name; None if there are none, or if they are damaged, which is logged.
        """
        home = self.home(key)
        if not home.is_dir():
            return None
        try:
            meta = json.loads((home / META).read_text(encoding="utf-8"))
            digest = meta.pop("digest")
            wrong = [META] if digest != _digest(meta) or meta["key"] != _as_json(key) else []
            wrong += [name for name, sha in meta["files"].items() if not wrong and _sha256(home / name) != sha]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("The kept outputs in %s are damaged (%s); they are computed again.", home, error)
            return None
        if wrong:
            logger.warning(
                "The kept outputs in %s are damaged (%s was altered); they are computed again.", home, wrong[0]
            )
            return None
        clear(self._lock(home.name))
        return {name: _mapped(home / f"{name}.npy", dtype) for name, dtype in meta["dtypes"].items()}

    def _lock(self, name: str) -> Path:
        return self.place / f".{name}.lock"

    def _tidy(self, own: str) -> None:
        """Remove what killed processes left, of this key and of others that nobody computes at present."""
        shutil.rmtree(self.place / f"{_PART}{own}", ignore_errors=True)
        for part in self.place.glob(f"{_PART}*"):
            with contextlib.suppress(FileError), hold(self._lock(part.name.removeprefix(_PART)), str(part)):
                shutil.rmtree(part, ignore_errors=True)

    def write(self, key: Mapping[str, Any], rows: int, fill: Callable[[OutputFiles], None]) -> dict[str, Tensor]:
        """Fill a folder, and give it the name of its key once it is complete.

        Args:
            key: The key.
            rows: Rows of each output.
            fill: Function that appends the outputs to the given files.

        Returns:
            The outputs by name, mapped into memory.

        Raises:
            FileError: If they cannot be written, or are damaged afterwards.
        """
        home = self.home(key)
        part = home.parent / f"{_PART}{home.name}"
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            with hold(self._lock(home.name), f"The folder {home}", wait=True) as waited:
                ready = self.read(key) if waited else None  # the process before computed the same
                if ready is None:
                    self._tidy(home.name)
                    _complete(home, OutputFiles(part, rows), key, fill)
        except OSError as error:
            raise FileError(
                f"Outputs of the backbone could not be kept in {home.parent} ({error.strerror or error}). Free some "
                "space, give cache_features another folder, or leave it out."
            ) from error
        outputs = self.read(key)
        if outputs is None:
            raise FileError(f"{home} was damaged while it was written. Look at the disk, and try again.")
        return outputs


def _complete(home: Path, files: OutputFiles, key: Mapping[str, Any], fill: Callable[[OutputFiles], None]) -> None:
    """Fill the files, and give their folder its final name; an error leaves no folder."""
    files.folder.mkdir()
    try:
        fill(files)
        _write_meta(files.folder, key, files.close())
        shutil.rmtree(home, ignore_errors=True)  # damaged
        os.rename(files.folder, home)
    finally:
        shutil.rmtree(files.folder, ignore_errors=True)


def changes_between_epochs(split: Any) -> bool:
    """Detect whether images or targets differ between epochs, by preparing some of them for two.

    Args:
        split: The split; any other than a `BatchSplit` counts as constant.

    Returns:
        Whether any image or target differs.
    """
    if not isinstance(split, BatchSplit):
        return False
    indices = range(min(PROBED, len(split)))
    first, second = ([*split.batch([(epoch, index) for index in indices])] for epoch in (0, 1))
    return not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def split_digest(split: Any) -> str:
    """Hash the images and targets of a split.

    Args:
        split: The split.

    Returns:
        A sha256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    source, images = getattr(split, "source", None), getattr(split, "images", None)
    if source is not None:
        for facts in source.facts(full=True):
            digest.update(facts.digest.encode())
    elif images is not None:
        _update(digest, images)
    else:  # hashes prepared images: slower, but valid for any split
        for batch, _ in DataLoader(split, batch_size=256):
            _update(digest, batch)
    _update(digest, split.targets)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_meta(folder: Path, key: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    files = {f"{name}.npy": _sha256(folder / f"{name}.npy") for name in dtypes}
    meta = {"key": key, "dtypes": dtypes, "files": files}
    text = json.dumps({**meta, "digest": _digest(meta)}, indent=1)
    with open(folder / META, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_as_json(meta), sort_keys=True).encode()).hexdigest()


def _take_room(file: Path, size: int) -> None:
    """Make the disk hold all of a file: a page of a mapped one that finds no room later ends the process.

    Args:
        file: The file, whose last bytes are still zero.
        size: Number of these bytes.

    Raises:
        OSError: If the disk is full.
    """
    with file.open("r+b") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT:
                raise
            handle.seek(-size, os.SEEK_END)
            for begin in range(0, size, _CHUNK):
                handle.write(bytes(min(_CHUNK, size - begin)))


def _as_json(key: Mapping[str, Any]) -> Any:
    """Return the key as JSON reads it back, with tuples as lists."""
    return json.loads(json.dumps(key))


def _as_numpy(tensor: Tensor) -> Any:
    """Return the same bytes as a numpy array; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(path: Path, dtype: str) -> Tensor:
    # Copy on write: torch needs writable memory, and the file must not change.
    values = torch.from_numpy(np.load(path, mmap_mode="c"))
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values
