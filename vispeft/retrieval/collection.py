"""Images to embed or to look for: files of a folder, of a list, or of a split of data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vispeft.data.images import find_images
from vispeft.data.list_files import LIST_ENDINGS, read_json, read_lines
from vispeft.data.listed import ListedData
from vispeft.data.sources import FileSource, JoinedSource, Source
from vispeft.data.trees import open_regular
from vispeft.errors import ConfigError, DataError

__all__ = ["Collection", "collect", "collect_split", "file_digest"]


@dataclass(frozen=True)
class Collection:
    """Image files with their labels."""

    root: Path
    """Folder that the names are relative to, without links."""
    names: tuple[str, ...]
    """Paths below the root, with slashes."""
    labels: tuple[str, ...]
    """Label of each; empty where it is not known."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return the file of an image.

        Args:
            index: Its position.
        """
        return self.root / self.names[index]

    def take(self, indices: Sequence[int]) -> Collection:
        """Select some of the images.

        Args:
            indices: Their positions.
        """
        names, labels = (tuple(column[index] for index in indices) for column in (self.names, self.labels))
        return Collection(self.root, names, labels)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    @classmethod
    def joined(cls, parts: Sequence[Collection]) -> Collection:
        """Put collections behind each other, with whole paths as names.

        Args:
            parts: The collections.
        """
        names = tuple(str(path) for part in parts for path in part.paths)
        return cls(Path(), names, tuple(label for part in parts for label in part.labels))


def collect(place: str | Path) -> Collection:
    """List the images of a folder with its subfolders as labels, of a list with its labels, or one image.

    Args:
        place: A folder, a text list (path and label per line), a JSON file (path to label), or an image. Paths in a
            list are relative to its folder.

    Raises:
        DataError: If there are no images, or the list cannot be read.
    """
    given = Path(place)
    if given.suffix.lower() in (*LIST_ENDINGS, ".json") and os.path.isfile(given):
        return _listed(given)
    paths = find_images(given)
    base = given if given.is_dir() else given.parent
    parents = [path.relative_to(base).parent.as_posix() for path in paths]
    return _below(paths, ["" if parent == "." else parent for parent in parents])


def _listed(path: Path) -> Collection:
    entries = read_json(path) if path.suffix.lower() == ".json" else read_lines(path, [])
    if not entries:
        raise DataError(f"{path} lists no images.")
    missing = [entry.where for entry in entries if not os.path.isfile(path.parent / entry.name)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"{path} names files that do not exist: {', '.join(missing[:5])}{more}.")
    labels = ["" if entry.label is None else str(entry.label) for entry in entries]
    return _below([path.parent / entry.name for entry in entries], labels)


def collect_split(data: object, split: str) -> Collection:
    """List the image files of a split of data, with the names of their classes.

    Args:
        data: A data module.
        split: train, validation or test.

    Raises:
        ConfigError: If its images are no files.
        DataError: If the data cannot be used, or have no such images.
    """
    if not isinstance(data, ListedData):
        raise ConfigError(
            f"--split {split}: {type(data).__name__} has no image files, which neighbours are shown from. Give a "
            "folder or a list of images."
        )
    data.accept()
    found = data.listing.splits[split]
    # Data of metric learning have names for the labels of all splits, not of the training classes alone.
    names, known = getattr(data, "label_names", data.class_names), data.listing.target in ("class", "embedding")
    labels = [names[int(target)] for target in found.targets] if known else [""] * len(found)
    return _below(_files(found.source, split), labels)


def _files(source: Source, split: str) -> list[Path]:
    """Return the paths of a source of files."""
    if isinstance(source, FileSource):
        return [Path(path) for path in source.paths]
    if isinstance(source, JoinedSource) and all(isinstance(part, FileSource) for part in source.parts):
        return [Path(source.parts[part].paths[index]) for part, index in source.indices]  # type: ignore[attr-defined]
    raise ConfigError(f"--split {split}: its images are inside of other files. Give a folder or a list of images.")


def _below(paths: Sequence[Path], labels: Sequence[str]) -> Collection:
    """Name files by their paths below their common folder, each once.

    Raises:
        DataError: If a file is given twice, with different labels.
    """
    found: dict[str, str] = {}
    for path, label in zip(paths, labels, strict=True):
        full = os.path.join(os.path.realpath(path.parent), path.name)
        if found.setdefault(full, label) != label:
            raise DataError(f"{path} has two labels, {found[full]!r} and {label!r}; leave one of the two lines out.")
    root = Path(os.path.commonpath([os.path.dirname(path) for path in found]))
    names = tuple(Path(path).relative_to(root).as_posix() for path in found)
    return Collection(root, names, tuple(found.values()))


def file_digest(path: Path) -> str:
    """Compute the sha256 of a file.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open_regular(str(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
