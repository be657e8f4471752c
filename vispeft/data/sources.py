"""Sources of images by index: files, shards, torchvision data sets."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vispeft.data.facts import Facts, FactStore, ImageFacts, Key, limited, look_at
from vispeft.data.formats import start_no_program
from vispeft.data.images import PLAIN, UNREADABLE, Reading, read_image, to_rgb, why
from vispeft.data.trees import open_regular
from vispeft.errors import DataError

__all__ = ["FileSource", "JoinedSource", "ShardSource", "Source", "TorchvisionSource", "file_key", "look_all"]

CHUNK = 1024
"""Images inspected between two writes to the store, so that an interrupted check can continue."""


class Source(ABC):
    """Images by index."""

    reading: Reading = PLAIN
    """How pixels become RGB."""

    def read_with(self, reading: Reading) -> Self:
        """Set how pixels become RGB.

        Args:
            reading: The settings.
        """
        self.reading = reading
        return self

    @abstractmethod
    def __len__(self) -> int:
        """Count the images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Read an image as uint8 RGB (3, H, W).

        Raises:
            DataError: If it cannot be read; the message names it.
        """

    @property
    def reduces(self) -> bool:
        """Whether JPEG files are decoded at reduced scale by `read_reduced`."""
        return False

    def read_reduced(self, index: int, least: tuple[int, int] | None) -> Tensor:
        """Read an image as `read` does, but a JPEG file at reduced scale.

        Args:
            index: Its position.
            least: Height and width that are needed; None for all pixels.
        """
        return self.read(index)

    @abstractmethod
    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every image.

        Args:
            full: Whether to decode and hash the pixels, instead of reading only headers.
        """

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Source:
        """Return a source of some of the images."""


class FileSource(Source):
    """Image files."""

    def __init__(self, paths: Iterable[str | Path], root: str | Path) -> None:
        """Store the paths.

        Args:
            paths: The files.
            root: Folder that names in messages are relative to.
        """
        # Strings take a tenth of the memory of paths, which matters for a million of them in each worker.
        self.paths, self.root = list(map(os.fspath, paths)), str(root)

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path, relative to the root if it lies inside."""
        return self.paths[index].removeprefix(self.root).lstrip("/\\") or self.paths[index]

    def read(self, index: int) -> Tensor:
        """Read a file."""
        return self.read_reduced(index, None)

    @property
    def reduces(self) -> bool:
        """Files are decoded here."""
        return True

    def read_reduced(self, index: int, least: tuple[int, int] | None) -> Tensor:
        """Read a file, a JPEG at reduced scale."""
        return read_image(self.paths[index], reading=self.reading, least=least)

    def take(self, indices: Sequence[int]) -> FileSource:
        """Return a source of some of the files."""
        return FileSource([self.paths[index] for index in indices], self.root).read_with(self.reading)

    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every file that has changed since the last time."""
        return self.look(_level(full, self.reading), lambda file: look_at(file, full, self.reading), ImageFacts)

    def look(self, level: str, look_at: Callable[[BinaryIO], Facts], kind: type[Facts]) -> list[Facts]:
        """Inspect every file that was not inspected at this level since its last change.

        Args:
            level: Name of the level.
            look_at: Function that inspects an open file.
            kind: Class of its result.
        """
        keys = [file_key(path, level) for path in self.paths]

        def look(index: int) -> Facts:
            try:
                with open_regular(self.paths[index]) as file:
                    return look_at(file)
            except FileNotFoundError:
                return kind(problem="missing")
            except (OSError, ValueError) as error:  # a path with a zero byte raises ValueError
                return kind(problem="broken", reason=getattr(error, "strerror", None) or str(error))

        return look_all(keys, look, kind, self.reading)


class ShardSource(Source):
    """Images inside tar files, read in place by offset and size."""

    def __init__(self, members: Iterable[tuple[str, str, int, int]], root: str | None = None) -> None:
        """Store the location of the images.

        Args:
            members: Shard, name inside it, offset and size in bytes of each image.
            root: Folder that names of shards in messages start from, where several shards have one file name; None for
                that of each shard.
        """
        self.members, self.root = list(members), root

    def __len__(self) -> int:
        """Count the images."""
        return len(self.members)

    def name(self, index: int) -> str:
        """Return shard and name of an image."""
        shard, name, _, _ = self.members[index]
        if self.root is None:
            return f"{Path(shard).name}:{name}"
        return f"{Path(os.path.abspath(shard)).relative_to(self.root).as_posix()}:{name}"

    def read(self, index: int) -> Tensor:
        """Read an image from its shard."""
        return self.read_reduced(index, None)

    @property
    def reduces(self) -> bool:
        """Files are decoded here."""
        return True

    def read_reduced(self, index: int, least: tuple[int, int] | None) -> Tensor:
        """Read an image from its shard, a JPEG at reduced scale."""
        try:
            content = self._content(index)
        except OSError as error:
            raise DataError(f"{self.name(index)} cannot be read ({error.strerror or error}).") from error
        return read_image(io.BytesIO(content), self.name(index), self.reading, least)

    def take(self, indices: Sequence[int]) -> ShardSource:
        """Return a source of some of the images."""
        return ShardSource((self.members[index] for index in indices), self.root).read_with(self.reading)

    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every image of a shard that has changed since the last time."""
        level = _level(full, self.reading)
        shards = {shard: file_key(shard, level) for shard, _, _, _ in self.members}
        keys = [(f"{shard}:{offset}", *shards[shard][1:]) for shard, _, offset, _ in self.members]

        def look(index: int) -> ImageFacts:
            try:
                return look_at(io.BytesIO(self._content(index)), full, self.reading)
            except OSError as error:
                return ImageFacts(problem="broken", reason=error.strerror or str(error))

        return look_all(keys, look, ImageFacts, self.reading)

    def _content(self, index: int) -> bytes:
        shard, _, offset, size = self.members[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


class TorchvisionSource(Source):
    """Images of a torchvision data set."""

    def __init__(self, dataset: Any, title: str, indices: Sequence[int] | None = None) -> None:
        """Store the data set.

        Args:
            dataset: Data set whose items are an image and a label.
            title: Its name in messages.
            indices: Indices of the images; all by default.
        """
        self.dataset, self.title = dataset, title
        self.indices = list(range(len(dataset)) if indices is None else indices)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the data set's name and the index of the image."""
        return f"{self.title}[{self.indices[index]}]"

    def read(self, index: int) -> Tensor:
        """Read an image from the data set."""
        try:
            image = self._image(index)
            return F.pil_to_tensor(to_rgb(image, self.reading)) if isinstance(image, Image.Image) else _as_rgb(image)
        except UNREADABLE as error:
            raise DataError(f"{self.name(index)} cannot be read ({why(error)}).") from error

    def take(self, indices: Sequence[int]) -> TorchvisionSource:
        """Return a source of some of the images."""
        chosen = [self.indices[index] for index in indices]
        return TorchvisionSource(self.dataset, self.title, chosen).read_with(self.reading)

    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every image; without `full`, torchvision's list is trusted and facts stay empty."""
        if not full:
            return [ImageFacts() for _ in self.indices]
        return [self._facts(index) for index in _shown(range(len(self)), len(self))]

    def _facts(self, index: int) -> ImageFacts:
        try:
            image = self._image(index)
            if not isinstance(image, Image.Image):
                image = F.to_pil_image(_as_rgb(image))
            content = io.BytesIO()
            image.save(content, "PNG" if image.mode != "CMYK" else "TIFF")
        except FileNotFoundError:
            return ImageFacts(problem="missing")
        except UNREADABLE as error:
            return ImageFacts(problem="broken", reason=why(error))
        content.seek(0)
        return look_at(content, True, self.reading)

    def _image(self, index: int) -> Any:
        start_no_program()
        return self.dataset[self.indices[index]][0]


class JoinedSource(Source):
    """Concatenation of several sources."""

    def __init__(self, parts: Sequence[Source], indices: Sequence[tuple[int, int]] | None = None) -> None:
        """Store the sources.

        Args:
            parts: The sources.
            indices: Source and position of each image; all by default.
        """
        self.parts = list(parts)
        everything = [(part, index) for part, source in enumerate(parts) for index in range(len(source))]
        self.indices = everything if indices is None else list(indices)

    def read_with(self, reading: Reading) -> Self:
        """Set how pixels become RGB, in every source."""
        for part in self.parts:
            part.read_with(reading)
        return super().read_with(reading)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the name of an image from its source."""
        part, position = self.indices[index]
        return self.parts[part].name(position)

    def read(self, index: int) -> Tensor:
        """Read an image from its source."""
        part, position = self.indices[index]
        return self.parts[part].read(position)

    @property
    def reduces(self) -> bool:
        """Whether every source does."""
        return all(part.reduces for part in self.parts)

    def read_reduced(self, index: int, least: tuple[int, int] | None) -> Tensor:
        """Read an image from its source, a JPEG at reduced scale."""
        part, position = self.indices[index]
        return self.parts[part].read_reduced(position, least)

    def take(self, indices: Sequence[int]) -> JoinedSource:
        """Return a source of some of the images."""
        return JoinedSource(self.parts, [self.indices[index] for index in indices])

    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every image."""
        found: dict[tuple[int, int], ImageFacts] = {}
        for part, source in enumerate(self.parts):
            positions = [position for owner, position in self.indices if owner == part]
            looked = source.take(positions).facts(full)
            found.update({(part, position): facts for position, facts in zip(positions, looked, strict=True)})
        return [found[index] for index in self.indices]


def _as_rgb(image: Any) -> Tensor:
    tensor = torch.as_tensor(image)
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(f"images of type {tensor.dtype} and shape {tuple(tensor.shape)} are not understood")
    return tensor.expand(3, -1, -1)


def file_key(path: str, level: str) -> Key | tuple[()]:
    """Return a key for the content of a file without reading it; empty if the file is missing.

    Args:
        path: The file.
        level: Name of the level of inspection.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    # The store takes text only, and the name of a file may be no text.
    name = os.path.abspath(path).encode("utf-8", "backslashreplace").decode()
    return (name, status.st_size, status.st_mtime_ns, level)


def _level(full: bool, reading: Reading) -> str:
    """Name the level of an inspection: values without a known range are accepted only where a range is given."""
    return f"{'full' if full else 'fast'}{'' if reading.value_range is None else '-ranged'}"


def look_all(keys: Sequence[Any], look: Callable[[int], Facts], kind: type[Facts], reading: Reading) -> list[Facts]:
    """Inspect images that the store lacks, in several threads, as Pillow releases the GIL while decoding.

    Args:
        keys: Key of each image in the store; empty for one that is not stored.
        look: Function that inspects an image by its position.
        kind: Class of its result.
        reading: The limit on pixels.
    """
    store = FactStore(kind)
    known = store.get({key for key in keys if key})
    new = [index for index, key in enumerate(keys) if key not in known]
    found: dict[int, Facts] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
        for chunk in _shown(chunks, len(chunks)):
            fresh = dict(zip(chunk, pool.map(look, chunk), strict=True))
            store.put({keys[index]: facts for index, facts in fresh.items() if keys[index] and not facts.problem})
            found.update(fresh)
    # A higher limit may have held when the facts in the store were found.
    return [found[index] if index in found else limited(known[key], reading) for index, key in enumerate(keys)]


def _shown(steps: Sequence[Any], count: int) -> Iterable[Any]:
    """Iterate over steps, with a progress bar on a terminal if there are many."""
    console = Console(stderr=True)
    return track(
        steps, "looking at images", console=console, transient=True, disable=count < 3 or not console.is_terminal
    )
