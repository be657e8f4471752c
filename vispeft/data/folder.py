"""A tree with one folder of images per class."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from timm.utils.misc import natural_key

from vispeft.data.images import EXTENSIONS
from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, gather
from vispeft.data.sources import FileSource
from vispeft.errors import DataError

__all__ = ["ImageFolderData", "find_split_folders"]

# timm's synonyms (timm/data/dataset_factory.py), and those for the test split, which timm lacks.
SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}


class ImageFolderData(ListedData):
    """Images in folders named after their classes: ``root/train/cat/1.jpg``, or ``root/cat/1.jpg`` without splits.

    Split folders may be called train or training, val, valid, validation, eval or evaluation, and test or testing.
    Missing splits are drawn from train. Folders inside a class folder belong to the class.
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
            DataError: If there are no class folders.
        """
        if not self.root.is_dir():
            raise DataError(f"There is no folder {str(self.root)!r}. Give one that has a folder of images per class.")
        places = find_split_folders(self.root) or {"train": self.root}
        if "train" not in places:
            raise DataError(
                f"{self.root} has {', '.join(place.name for place in places.values())} and no folder train to learn "
                f"from. Add one, or put the class folders straight into {self.root}."
            )
        folders = {split: _class_folders(place) for split, place in places.items()}
        names = sorted({name for found in folders.values() for name in found}, key=_as_people_count)
        if not names:
            found = ", ".join(sorted(path.name for path in places["train"].iterdir())[:5]) or "nothing"
            raise DataError(
                f"{places['train']} has no class folders; found {found}. Each class needs a folder of its own."
            )
        findings: list[Finding] = []
        splits = {split: self._split(names, found, findings) for split, found in folders.items()}
        findings += self._strays(places)
        return Listing(str(self.root), tuple(names), splits, findings=findings)

    def _split(self, names: list[str], folders: dict[str, Path], findings: list[Finding]) -> ListedSplit:
        paths: list[Path] = []
        labels: list[int] = []
        empty: list[str] = []
        others: dict[str, int] = defaultdict(int)
        for label, name in enumerate(names):
            files = _files(folders[name]) if name in folders else []
            images = [path for path in files if path.suffix.lower() in EXTENSIONS]
            for path in files:
                others[path.suffix.lower() or path.name] += path.suffix.lower() not in EXTENSIONS
            if name in folders and not images:
                empty.append(str(folders[name].relative_to(self.root)))
            paths += images
            labels += [label] * len(images)
        text = "Class folders without an image; fill or remove them"
        findings += gather("error", {("folder-without-images", text): empty})
        strange = [f"{count} {ending}" for ending, count in sorted(others.items()) if count]
        text = f"Files that are left out because their ending is none of {' '.join(EXTENSIONS)}"
        findings += gather("warning", {("no-image-file", text): strange})
        return ListedSplit(FileSource(paths, self.root), torch.tensor(labels, dtype=torch.long))

    def _strays(self, places: dict[str, Path]) -> list[Finding]:
        """Find images next to the class folders."""
        stray = [
            str(path.relative_to(self.root))
            for place in dict.fromkeys([self.root, *places.values()])
            for path in sorted(place.iterdir())
            if path.is_file() and path.suffix.lower() in EXTENSIONS
        ]
        return gather("warning", {("image-outside-class", "Images outside of a class folder are left out"): stray})


def find_split_folders(root: Path) -> dict[str, Path]:
    """Find the folders of the splits by their usual names.

    Args:
        root: The folder to search.

    Returns:
        Folder by split; empty if there is none.
    """
    inside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    found = {split: next((inside[n] for n in names if n in inside), None) for split, names in SYNONYMS.items()}
    return {split: place for split, place in found.items() if place is not None}


def _class_folders(place: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(place.iterdir()) if path.is_dir() and not _hidden(path)}


def _files(folder: Path) -> list[Path]:
    inside = sorted(folder.rglob("*"), key=lambda path: _as_people_count(str(path)))
    # A broken link counts as a missing image, and is reported as such.
    return [path for path in inside if (path.is_file() or not path.exists()) and not _hidden(path)]


def _as_people_count(name: str) -> tuple[Any, str]:
    # timm's key equates A with a and 01 with 1; without the name itself, their order would vary between processes.
    return natural_key(name), name


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"
