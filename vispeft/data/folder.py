"""A tree with one folder of images per class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from timm.utils.misc import natural_key

from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, gather
from vispeft.data.sources import FileSource
from vispeft.data.trees import LeftOut, is_image, list_folder, walk
from vispeft.errors import DataError, counted

__all__ = ["SYNONYMS", "ImageFolderData", "find_splits", "leave_beside"]

# timm's synonyms (timm/data/dataset_factory.py), and those for the test split, which timm lacks.
SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}

NO_CLASSES = "Images of a split that are in no class folder; if the name is that of a class, rename the folder"
NO_SPLIT = (
    "Folders with images beside train, which would be left out. If train is a class, rename its folder; otherwise move "
    "the others elsewhere"
)
INNER_SPLITS = "Folders inside a class have the name of a split and are read as images of the class; splits come first"


class ImageFolderData(ListedData):
    """Images in folders named after their classes: ``root/train/cat/1.jpg``, or ``root/cat/1.jpg`` without splits.

    Split folders may be called train or training, val, valid, validation, eval or evaluation, and test or testing.
    Missing splits are drawn from train. Folders inside a class folder belong to the class, and links are followed.
    """

    def __init__(self, *, root: str, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder.
            settings: Settings of `ListedData` and `ImageData`.
        """
        super().__init__(**settings)
        self.root = Path(root)

    def read(self) -> Listing:
        """List the images.

        Raises:
            DataError: If there are no class folders, or the names of folders leave open which split is meant.
        """
        if not os.path.isdir(self.root):
            raise DataError(f"There is no folder {str(self.root)!r}. Give one that has a folder of images per class.")
        left, findings = LeftOut(self.root), list[Finding]()
        folders = self._split_folders(left, findings)
        names = sorted({name for found in folders.values() for name in found}, key=_as_people_count)
        splits = {split: self._split(names, found, left, findings) for split, found in folders.items()}
        if left:
            findings.append(Finding(left.level, "left-out", left.line()))
        return Listing(str(self.root), tuple(names), splits, findings=findings)

    def _split_folders(self, left: LeftOut, findings: list[Finding]) -> dict[str, dict[str, str]]:
        """Find the class folders of each split, by name."""
        folders, files = list_folder(self.root, left)
        places = find_splits(folders, self.root)
        beside = {name: path for name, path in folders.items() if path not in places.values()}
        if places and "train" not in places:
            raise DataError(
                f"{self.root} has {', '.join(map(os.path.basename, places.values()))} and no folder train to learn "
                f"from. Add one. A folder of such a name is taken for a split; if it is a class, rename it"
                f"{_like(beside)}."
            )
        full = leave_beside(beside if places else {}, files, left)
        found = {split: self._class_folders(place, left, findings) for split, place in places.items()}
        if not places:
            found = {"train": folders}
        if not any(found.values()):
            place = places.get("train", str(self.root))
            hint = f" If {os.path.basename(place)} is a class, rename it{_like(beside)}." if places and beside else ""
            raise DataError(
                f"{place} has no class folders. {left.line() if left else 'Nothing is in it'}. Each class needs a "
                f"folder of its own; or write labels into a list of files.{hint}"
            )
        if len(places) == 1 and len(full) > 1:
            findings.append(Finding("error", "folders-beside-train", NO_SPLIT, tuple(full)))
        return found

    def _class_folders(self, place: str, left: LeftOut, findings: list[Finding]) -> dict[str, str]:
        """Find the class folders of one split, by name."""
        folders, files = list_folder(place, left)
        leave_beside({}, files, left)
        images = sum(map(is_image, files))
        if images and not folders:
            where = f"{os.path.relpath(place, self.root)} ({counted(images, 'image')})"
            findings.append(Finding("error", "split-without-classes", NO_CLASSES, (where,)))
        return folders

    def _split(self, names: list[str], folders: dict[str, str], left: LeftOut, findings: list[Finding]) -> ListedSplit:
        paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        inner: dict[str, None] = {}
        for label, name in enumerate(names):
            if name not in folders:
                continue
            files = walk(folders[name], left)
            images = sorted(filter(is_image, files), key=_as_people_count)
            for path in files:
                if not is_image(path):
                    left.add("ending", path)
            if not images:
                empty.append(os.path.relpath(folders[name], self.root))
            inner |= dict.fromkeys(_inner_splits(folders[name], images))
            paths += images
            labels += [label] * len(images)
        text = "Class folders without an image; fill or remove them"
        findings += gather("error", {("folder-without-images", text): empty})
        places = [os.path.relpath(path, self.root) for path in inner]
        findings += gather("warning", {("splits-inside-class", INNER_SPLITS): places})
        return ListedSplit(FileSource(paths, self.root), torch.tensor(labels, dtype=torch.long))


def find_splits(paths: Mapping[str, str], place: str | Path, endings: Sequence[str] = ("",)) -> dict[str, str]:
    """Find the folders (or lists) of the splits by their usual names.

    Args:
        paths: Path by name.
        place: The folder they are in, for messages.
        endings: Possible ends of the names.

    Returns:
        Path by split; empty if there is none.

    Raises:
        DataError: If two of them stand for one split, or one of them for two.
    """
    found: dict[str, str] = {}
    for split, names in SYNONYMS.items():
        there = [name for name in paths if name.lower() in {f"{known}{end}" for known in names for end in endings}]
        if len(there) > 1:
            raise DataError(
                f"{place} has {' and '.join(there)}, which all stand for the {split} split. Leave one of them there."
            )
        if there:
            found[split] = paths[there[0]]
    for one, other in combinations(found.values(), 2):
        if os.path.samefile(one, other):
            raise DataError(f"{one} and {other} are one and the same, so two splits would have the same images.")
    return found


def _inner_splits(folder: str, images: list[str]) -> list[str]:
    """Return the folders inside a class folder that have the name of a split."""
    inner = {path[len(folder) + 1 :].partition(os.sep)[0] for path in images if os.sep in path[len(folder) + 1 :]}
    known = {name for names in SYNONYMS.values() for name in names}
    return [os.path.join(folder, name) for name in sorted(inner) if name.lower() in known]


def leave_beside(folders: Mapping[str, str], files: Iterable[str], left: LeftOut) -> list[str]:
    """Note folders and files beside those of the splits, or of the classes, as left out.

    Args:
        folders: Such folders by name.
        files: Such files.
        left: Receives both.

    Returns:
        Names of those folders that have images.
    """
    full = []
    for name, path in folders.items():
        count = sum(map(is_image, walk(path, LeftOut(path))))
        left.add("folder" if count else "other", path, counted(count, "image"))
        full += [name] if count else []
    for path in files:
        left.add("loose" if is_image(path) else "other", path)
    return full


def _like(beside: Mapping[str, str]) -> str:
    """Name some folders beside a split folder that may be classes."""
    return f" (beside it: {', '.join(sorted(beside)[:5])})" if beside else ""


def _as_people_count(name: str) -> tuple[Any, str]:
    # timm's key equates A with a and 01 with 1; without the name itself, their order would vary between processes.
    return natural_key(name), name
