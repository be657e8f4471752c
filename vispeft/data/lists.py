"""Images listed in text or JSON files, each with a class, several labels, or numbers."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, Published, Target, gather
from vispeft.data.sources import FileSource
from vispeft.data.targets import Entry, check_labelling, encode
from vispeft.errors import DataError

__all__ = ["ImageListData", "JsonData", "ListFileData", "list_splits", "read_json", "read_lines"]


class ListFileData(ListedData):
    """Base of the data modules that read each split from one list file."""

    renumber = False
    """Whether to number the occurring classes 0, 1, ... in sorted order."""

    def __init__(
        self,
        *,
        train_list: str,
        validation_list: str | None = None,
        test_list: str | None = None,
        root: str | None = None,
        target: Target = "class",
        names: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            train_list: The list of the training images, or of all images if splits are drawn.
            validation_list: The list of the validation images; None draws them from train.
            test_list: The list of the test images; None draws them from train.
            root: The folder that paths are relative to; by default that of the training list.
            target: ``class`` (one class), ``multilabel`` (any number of labels) or ``regression`` (numbers).
            names: Names of the classes, the labels or the numbers; None derives them from the lists.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        check_labelling(type(self).__name__, target, names)
        given = {"train": train_list, "validation": validation_list, "test": test_list}
        self.lists = {split: Path(path) for split, path in given.items() if path is not None}
        self.root = Path(root) if root is not None else self.lists["train"].parent
        self.target, self.names = target, None if names is None else tuple(names)

    @abstractmethod
    def entries(self, path: Path) -> list[Entry]:
        """Read one list.

        Args:
            path: Its file.

        Raises:
            DataError: If it is not a valid list.
        """

    def read(self) -> Listing:
        """List the images.

        Raises:
            DataError: If a list cannot be read.
        """
        if not self.root.is_dir():
            raise DataError(
                f"There is no folder {str(self.root)!r}, from which the paths of the lists start; set root."
            )
        entries = {split: self.entries(path) for split, path in self.lists.items()}
        empty = [str(self.lists[split]) for split, found in entries.items() if not found]
        if empty:
            raise DataError(f"No image is listed in {', '.join(empty)}; each line needs a path and a label.")
        place = ", ".join(str(path) for path in self.lists.values())
        return list_splits(place, entries, self.root, self.target, self.names, self.renumber)


class ImageListData(ListFileData):
    """Images in text lists, a path and a label per line: ``birds/1.jpg 3``.

    A class is a whole number from 0, or a word. Several labels are written with commas (``1,4``; ``-`` for none), and
    so are several numbers. Paths may contain spaces; the label follows the last one. Lines that start with ``#`` are
    comments.
    """

    def entries(self, path: Path) -> list[Entry]:
        """Read one list."""
        return read_lines(path)


class JsonData(ListFileData):
    """Images in JSON files, each one object from path to label: ``{"birds/1.jpg": 3}``.

    Class ids are numbered 0, 1, ... in sorted order. Several labels are a list.
    """

    renumber = True

    def entries(self, path: Path) -> list[Entry]:
        """Read one list."""
        return read_json(path)


def list_splits(
    place: str,
    entries: Mapping[str, Sequence[Entry]],
    root: Path | Mapping[str, Path],
    target: Target = "class",
    names: Sequence[str] | None = None,
    renumber: bool = False,
    published: Published | None = None,
) -> Listing:
    """Turn entries of lists into splits.

    Args:
        place: Their origin, for messages.
        entries: Entries by split.
        root: The folder that paths are relative to.
        target: Kind of targets.
        names: Names of the classes.
        renumber: Whether to number the occurring classes 0, 1, ... in sorted order.
        published: Published sizes of the data set.
    """
    kept, findings = _inside(entries)
    found, encoded, problems = encode(kept, target, names, renumber)
    base = str(root)
    splits = {
        split: ListedSplit(FileSource([Path(os.path.join(base, e.name)) for e in listed], Path(base)), targets)
        for split, (listed, targets) in encoded.items()
    }
    return Listing(place, found, splits, target, [*findings, *problems], published)


def _inside(entries: Mapping[str, Sequence[Entry]]) -> tuple[dict[str, list[Entry]], list[Finding]]:
    """Keep the entries whose paths stay inside the root."""
    kept: dict[str, list[Entry]] = {}
    wrong: dict[str, list[str]] = defaultdict(list)
    for split, listed in entries.items():
        kept[split] = []
        for entry in listed:
            problem = _outside(entry.name)
            if problem:
                wrong[problem].append(f"{entry.where} ({entry.name})")
            else:
                kept[split].append(entry)
    texts = {
        "absolute-path": "Absolute paths, which are right on one machine only; write them relative to root",
        "escaping-path": "Paths that lead out of root with ..; set root to a folder that holds all images",
    }
    return kept, gather("error", {(code, text): wrong[code] for code, text in texts.items()})


def _outside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        return "absolute-path"
    return "escaping-path" if os.path.normpath(name.replace("\\", "/")).startswith("..") else ""


# ------------------------------------------------------------------ files


def read_lines(path: Path) -> list[Entry]:
    """Read a text list: ``path label`` per line.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read.
    """
    entries = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, label = text.replace("\t", " ").rpartition(" ")
        # A line of one word is a path without a label.
        entries.append(Entry(name.strip() or label, label if name else None, f"{path.name}:{number}"))
    return entries


def read_json(path: Path) -> list[Entry]:
    """Read a JSON object from path to label.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read, or is not such an object.
    """
    try:
        pairs = json.loads(_text(path), object_pairs_hook=lambda pairs: pairs)
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f'{path} is no JSON object from path to label, such as {{"birds/1.jpg": 3}}.')
    return [Entry(name, label, f"{path.name} {name}") for name, label in pairs]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:8] if path.parent.is_dir() else []
        hint = f" There are: {', '.join(beside)}." if beside else ""
        raise DataError(f"The list {str(path)!r} could not be read ({error.strerror}).{hint}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason}).") from error
