"""Images listed in text or JSON files, each with a class, several labels, or numbers."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vispeft.data.list_files import read_json, read_lines
from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, Published, Target, gather
from vispeft.data.sources import FileSource
from vispeft.data.targets import Entry, check_labelling, encode
from vispeft.errors import DataError

__all__ = ["ImageListData", "JsonData", "ListFileData", "list_splits"]


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
    def entries(self, path: Path, findings: list[Finding]) -> list[Entry]:
        """Read one list.

        Args:
            path: Its file.
            findings: Receives what is remarkable about it.

        Raises:
            DataError: If it is not a valid list.
        """

    def read(self) -> Listing:
        """List the images.

        Raises:
            DataError: If a list cannot be read.
        """
        if not os.path.isdir(self.root):
            raise DataError(
                f"There is no folder {str(self.root)!r}, from which the paths of the lists start; set root."
            )
        findings: list[Finding] = []
        entries = {split: self.entries(path, findings) for split, path in self.lists.items()}
        empty = [str(self.lists[split]) for split, found in entries.items() if not found]
        if empty:
            raise DataError(f"No image is listed in {', '.join(empty)}; each line needs a path and a label.")
        place = ", ".join(str(path) for path in self.lists.values())
        return list_splits(place, entries, self.root, self.target, self.names, self.renumber, findings=tuple(findings))


class ImageListData(ListFileData):
    """Images in text lists, a path and a label per line: ``birds/1.jpg 3``.

    A class is a whole number from 0, or a word. Several labels are written with commas (``1,4``; ``-`` for none), and
    so are several numbers. Paths may contain spaces; the label follows the last one. Tabs, commas or semicolons may
    separate path and label instead, with quotation marks as spreadsheets write them; a header is left out. Lines that
    start with ``#`` are comments.
    """

    def entries(self, path: Path, findings: list[Finding]) -> list[Entry]:
        """Read one list."""
        return read_lines(path, findings)


class JsonData(ListFileData):
    """Images in JSON files, each one object from path to label: ``{"birds/1.jpg": 3}``.

    Class ids are numbered 0, 1, ... in sorted order. Several labels are a list.
    """

    renumber = True

    def entries(self, path: Path, findings: list[Finding]) -> list[Entry]:
        """Read one list."""
        return read_json(path)


def list_splits(
    place: str,
    entries: Mapping[str, Sequence[Entry]],
    root: str | Path,
    target: Target = "class",
    names: Sequence[str] | None = None,
    renumber: bool = False,
    published: Published | None = None,
    findings: Sequence[Finding] = (),
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
        findings: First findings.
    """
    base = str(root)
    kept, outside = _inside(entries, base)
    found, encoded, problems = encode(kept, target, names, renumber)
    splits = {
        split: ListedSplit(FileSource([_joined(base, entry.name) for entry in listed], base), targets)
        for split, (listed, targets) in encoded.items()
    }
    return Listing(place, found, splits, target, [*findings, *outside, *problems], published)


def _inside(entries: Mapping[str, Sequence[Entry]], base: str) -> tuple[dict[str, list[Entry]], list[Finding]]:
    """Keep the entries whose paths stay inside the root, with slashes for the backslashes of Windows."""
    kept: dict[str, list[Entry]] = {}
    wrong: dict[str, list[str]] = defaultdict(list)
    turned: list[str] = []
    for split, listed in entries.items():
        kept[split] = []
        for entry in listed:
            if problem := _outside(entry.name):
                wrong[problem].append(f"{entry.where} ({entry.name})")
                continue
            if "\\" in entry.name and os.sep == "/" and not os.path.lexists(_joined(base, entry.name)):
                turned.append(entry.where)
                entry = entry._replace(name=entry.name.replace("\\", "/"))
            kept[split].append(entry)
    texts = {
        "absolute-path": "Absolute paths, which are right on one machine only; write them relative to root",
        "escaping-path": "Paths that lead out of root with ..; set root to a folder that holds all images",
    }
    found = gather("error", {(code, text): wrong[code] for code, text in texts.items()})
    return kept, [*found, *gather("fact", {("backslashes", "Paths with backslashes are read with slashes"): turned})]


def _outside(name: str) -> str:
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "absolute-path"
    # Most names have no dots in a row, and the whole computation takes its time on a million of them.
    return "escaping-path" if ".." in name and os.path.normpath(name.replace("\\", "/")).startswith("..") else ""


def _joined(base: str, name: str) -> str:
    """Join a folder and a path inside it; one file always gets one path, however its list writes it."""
    path = f"{base}{os.sep}{name}"
    return str(Path(path)) if "//" in path or "./" in path or "/." in path or name.endswith("/") else path
