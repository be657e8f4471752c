"""Cars196 for metric learning: the first 98 classes for training, the others for the test.

The split is that of Song et al. (CVPR 2016); the set's own division into training and test images is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vispeft.data.folder import ImageFolderData
from vispeft.data.images import UNREADABLE
from vispeft.data.list_files import read_text
from vispeft.data.listing import Listing
from vispeft.data.lists import list_splits
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, find_place, in_halves, sort_classes
from vispeft.data.targets import Entry
from vispeft.errors import DataError

__all__ = ["CarsMetricData"]

MAT, NAMES = "cars_annos.mat", "names.csv"
TABLES = {"train": "anno_train.csv", "test": "anno_test.csv"}
PACKED = "car_data/car_data"


class CarsMetricData(PublishedMetricData):
    """Cars196: 8,054 images of 98 classes for training, 8,131 of 98 others for the test.

    Read from ``cars_annos.mat`` and ``car_ims``; from ``names.csv``, ``anno_train.csv``, ``anno_test.csv`` and
    ``car_data/car_data/{train,test}/CLASS`` (a copy on Kaggle); or from a folder per class, in the folder itself or in
    ``images``. Folders are sorted by name, capitals first, which is the order of the class numbers; where one of the
    other files lies beside them, the order is compared with it.
    """

    title = "Cars196"
    counts = {"train": (8054, 98), "test": (8131, 98)}
    by_order: ClassVar[bool] = True

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If the folder has none of the layouts, or the order of folders is not that of the classes.
        """
        tables = [NAMES, *TABLES.values(), PACKED]
        layouts = [(".", [MAT, "car_ims"]), (".", tables), ("images", ["."]), (".", ["."])]
        layout, place = find_place(self.title, self.root, layouts)
        readers = (_from_mat, _from_tables, self._from_folders, self._from_folders)
        return self.published_listing(in_halves(readers[layout](place)))

    def _from_folders(self, place: Path) -> Listing:
        found = sort_classes(ImageFolderData(root=str(place)).read(), str)
        for file, names in ((self.root / MAT, _mat_names), (self.root / NAMES, _csv_names)):
            if file.is_file():
                _check_order(place, found.class_names, names(file), file)
        return found


def _check_order(place: Path, folders: Sequence[str], names: Sequence[str], file: Path) -> None:
    """Refuse folders that are in another order than the classes."""
    for number, (folder, name) in enumerate(zip(folders, names, strict=False), start=1):
        if folder != name:
            raise DataError(
                f"Folder {number} of {place} is {folder!r}, and class {number} in {file.name} is {name!r}, so the "
                "halves of the folders are not those of the classes. Name the folders after the classes."
            )


def _from_mat(place: Path) -> Listing:
    """Read the table of all images; its first column is the path, its sixth the class, from 1."""
    content = _load(place / MAT)
    try:
        rows = [(str(row[0][0]), int(row[5][0][0])) for row in content["annotations"][0]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{place / MAT} has no table of annotations as published ({error!r}). Fetch it again."
        ) from error
    entries = [Entry(path, label, f"{MAT} {path}") for path, label in rows]
    return _named(list_splits(str(place), {"train": entries}, place, renumber=True), _mat_names(place / MAT))


def _from_tables(place: Path) -> Listing:
    """Read the three tables of the copy on Kaggle; the last column is the class, from 1."""
    names = _csv_names(place / NAMES)
    entries = []
    for split, table in TABLES.items():
        for number, line in enumerate(read_text(place / table).split("\n"), start=1):
            if not line.strip():
                continue
            image, *_, label = line.split(",")
            if not label.strip().isdecimal() or not 1 <= int(label) <= len(names):
                raise DataError(f"{place / table}:{number} has no class from 1 to {len(names)}: {line}")
            path = f"{PACKED}/{split}/{names[int(label) - 1]}/{image}"
            entries.append(Entry(path, int(label), f"{table}:{number}"))
    return _named(list_splits(str(place), {"train": entries}, place, renumber=True), names)


def _named(found: Listing, names: Sequence[str]) -> Listing:
    """Name the classes, which have their numbers as names."""
    known = dict(enumerate(names, start=1))
    return replace(found, class_names=tuple(known.get(int(label), label) for label in found.class_names))


def _csv_names(file: Path) -> list[str]:
    """Return the classes by number; a slash is no part of a folder's name."""
    return [line.strip().strip('"').replace("/", "-") for line in read_text(file).split("\n") if line.strip()]


def _mat_names(file: Path) -> list[str]:
    """Return the classes by number; empty if the file has no names."""
    found = _load(file).get("class_names")
    return [] if found is None else [str(name[0]).replace("/", "-") for name in found[0]]


def _load(file: Path) -> dict[str, Any]:
    from scipy.io import loadmat  # slow to import; it comes with scikit-learn

    try:
        return dict(loadmat(file))
    except UNREADABLE as error:  # scipy raises errors of many kinds, as Pillow does
        raise DataError(f"{file} cannot be read ({error}). Fetch it again.") from error
