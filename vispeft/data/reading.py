"""Reading of image files batch by batch: each file once, in worker processes, and a broken one alone is left out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vispeft.data.images import PLAIN, Reading, read_image, why
from vispeft.data.threads import in_threads
from vispeft.data.trees import open_regular
from vispeft.errors import ConfigError, DataError

__all__ = ["BrokenImage", "FileReader", "ReadBatch", "file_state", "watched"]

AHEAD = 2
"""Batches that each worker reads ahead: PyTorch's default."""
ENDED = "DataLoader worker (pid"
"""Text of PyTorch's error for a worker that was ended; an error inside of a worker has another one."""


class BrokenImage(NamedTuple):
    """An image that could not be read."""

    path: str
    """Its file."""
    reason: str
    """Why, as a sentence that names the file."""


class ReadBatch(NamedTuple):
    """A batch as it was read."""

    images: Any
    """Prepared images of the files that could be read: floats of one shape as a tensor (B, ...), others as a list."""
    kept: list[int]
    """Their positions in the batch."""
    marks: list[str]
    """Mark of each file of the batch by which a change of its content is noticed."""
    left_out: list[BrokenImage]
    """The other files."""


def file_state(path: str) -> str:
    """Return size and time of change of a file; empty if it is missing.

    Args:
        path: The file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


@contextlib.contextmanager
def watched(workers: int) -> Iterator[None]:
    """Say what happened when a worker was ended from outside, while a block of code uses `FileReader.batches`.

    PyTorch raises RuntimeError in whatever the main process is doing then, so the whole block is watched.

    Args:
        workers: Number of workers.

    Raises:
        DataError: If a worker was ended.
    """
    try:
        yield
    except RuntimeError as error:
        if ENDED not in str(error):
            raise
        raise DataError(
            f"A process that reads images was ended from outside ({str(error).strip()}). Is there enough memory, "
            f"shared memory too, for --workers {workers}? Fewer workers need less."
        ) from error


@dataclass(frozen=True, kw_only=True)
class FileReader:
    """Reads image files batch by batch."""

    prepare: Callable[[Tensor], Any] | None = None
    """Function of uint8 values (3, H, W) that runs where they are read; None hands them on."""
    reading: Reading = PLAIN
    """How pixels become RGB."""
    least: tuple[int, int] | None = None
    """Height and width that are needed, for JPEG files decoded at reduced scale; None decodes all pixels."""
    workers: int = 0
    """Processes that read; 0 reads in this one, by several threads."""
    mark: Literal["state", "digest"] = "state"
    """What notices a change of a file: its size and time, or the sha256 of its bytes, which are read once for both."""
    device: torch.device | None = None
    """Device the images go to; for a GPU they are read into pinned memory."""
    strict: bool = False
    """Whether the first broken file ends the reading."""

    def __post_init__(self) -> None:
        """Check the number of workers.

        Raises:
            ConfigError: If it is negative.
        """
        if self.workers < 0:
            raise ConfigError(f"--workers is {self.workers}; 0 reads in this process, and more in as many others.")

    def batches(self, groups: Sequence[Sequence[str | Path]]) -> Iterator[ReadBatch]:
        """Read groups of files, in order.

        Args:
            groups: The files of each batch.

        Yields:
            One batch per group.

        Raises:
            DataError: If a file cannot be read, with `strict`.
        """
        loader = DataLoader(
            _Groups([list(map(os.fspath, group)) for group in groups], self),
            batch_size=None,
            collate_fn=_keep,
            num_workers=min(self.workers, len(groups)),
            prefetch_factor=AHEAD if self.workers and groups else None,
            generator=torch.Generator(),  # or the loader would draw from the global one
            pin_memory=self.device is not None and self.device.type == "cuda",
        )
        for images, kept, marks, left_out in loader:
            if left_out and self.strict:
                raise DataError(left_out[0].reason)
            yield ReadBatch(images.unpacked() if isinstance(images, _Packed) else images, kept, marks, left_out)

    def mark_of(self, path: str) -> str:
        """Return the mark of a file without reading it as an image; empty if it cannot be read.

        Args:
            path: The file.
        """
        if self.mark == "state":
            return file_state(path)
        try:
            with open_regular(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            return ""

    def read(self, path: str) -> tuple[Any, str]:
        """Read one file.

        Args:
            path: The file.

        Returns:
            The prepared image, or a `BrokenImage`; and the file's mark.
        """
        mark = ""
        try:
            if self.mark == "state":
                mark = file_state(path)
                image = read_image(path, reading=self.reading, least=self.least)
            else:
                content = _content(path)
                mark = hashlib.sha256(content).hexdigest()
                image = read_image(io.BytesIO(content), path, self.reading, self.least)
            return image if self.prepare is None else self.prepare(image), mark
        except DataError as error:
            return BrokenImage(path, str(error)), mark


def _content(path: str) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except (OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or why(error)
        raise DataError(f"{path} cannot be read as an image ({reason}).") from error


class _Groups(Dataset[ReadBatch]):
    """Groups of files as items, so that a worker builds a whole batch."""

    def __init__(self, groups: list[list[str]], reader: FileReader) -> None:
        self.groups, self.reader = groups, reader

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ReadBatch:
        paths = self.groups[index]
        read = self.reader.read
        found, marks = zip(*(map(read, paths) if self.reader.workers else in_threads(read, paths)), strict=True)
        kept = [position for position, image in enumerate(found) if not isinstance(image, BrokenImage)]
        left_out = [image for image in found if isinstance(image, BrokenImage)]
        images = _joined([found[position] for position in kept], packed=self.reader.workers > 0)
        return ReadBatch(images, kept, list(marks), left_out)


class _Packed(NamedTuple):
    """Images (3, H, W) of several sizes in one tensor, as each tensor of a worker takes a file descriptor."""

    values: Tensor
    shapes: list[tuple[int, int]]

    def unpacked(self) -> list[Tensor]:
        """Return the images, with their channels last in memory as they were read."""
        parts = self.values.split([3 * math.prod(shape) for shape in self.shapes])
        return [part.view(*shape, 3).permute(2, 0, 1) for part, shape in zip(parts, self.shapes, strict=True)]


def _joined(images: list[Any], packed: bool) -> Any:
    """Stack prepared images of one shape, and pack raw ones."""
    if not images or not all(isinstance(image, Tensor) for image in images):
        return images
    if images[0].dtype != torch.uint8:
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images
    if not packed:
        return images
    shapes = [(image.shape[1], image.shape[2]) for image in images]
    return _Packed(torch.cat([image.permute(1, 2, 0).reshape(-1) for image in images]), shapes)


def _keep(batch: ReadBatch) -> ReadBatch:
    return batch
