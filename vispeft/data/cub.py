"""CUB-200-2011 for metric learning: the first hundred classes for training, the others for the test.

The split is that of Song et al. (CVPR 2016); the set's own list ``train_test_split.txt`` is not used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from vispeft.data.folder import ImageFolderData
from vispeft.data.listing import Listing
from vispeft.data.lists import list_splits
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, find_place, in_halves, read_rows
from vispeft.data.targets import Entry
from vispeft.errors import DataError

__all__ = ["CUBMetricData"]

LISTS = ("images.txt", "image_class_labels.txt", "images")


class CUBMetricData(PublishedMetricData):
    """CUB-200-2011: 5,864 images of 100 classes for training, 5,924 of 100 others for the test.

    Read from ``CUB_200_2011/{images.txt,image_class_labels.txt,images}``, or from class folders ``001.NAME`` to
    ``200.NAME`` in the folder itself or in ``images``, sorted by their numbers.
    """

    title = "CUB-200-2011"
    counts = {"train": (5864, 100), "test": (5924, 100)}
    by_order: ClassVar[bool] = True

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If the folder has none of the layouts, or the lists do not belong together.
        """
        layouts = [("CUB_200_2011", LISTS), (".", LISTS), ("images", ["."]), (".", ["."])]
        layout, place = find_place(self.title, self.root, layouts)
        found = _from_lists(place) if layout < 2 else ImageFolderData(root=str(place)).read()
        return self.published_listing(in_halves(found))


def _by_number(path: Path) -> dict[str, tuple[str, str]]:
    """Return the place of each line and its second column, by the number of the image."""
    found: dict[str, tuple[str, str]] = {}
    for where, (image, value) in read_rows(path, 2):
        if image in found:
            raise DataError(f"{path} has the image {image} twice, at {found[image][0]} and {where}. Unpack it again.")
        found[image] = (where, value)
    return found


def _from_lists(place: Path) -> Listing:
    """Join the two lists by the numbers of the images."""
    paths, labels = (_by_number(place / name) for name in LISTS[:2])
    for image, (where, label) in labels.items():
        if not label.isdecimal():
            raise DataError(f"{place}: {where} has no number as its class, but {label!r}. Unpack the archive again.")
        if image not in paths:
            raise DataError(f"{place / LISTS[0]} has no image {image}, which {where} names. Unpack the archive again.")
    if lacking := [where for image, (where, _) in paths.items() if image not in labels]:
        raise DataError(f"{place / LISTS[1]} has no class for the image of {lacking[0]}. Unpack the archive again.")
    entries = [Entry(path, int(labels[image][1]), where) for image, (where, path) in paths.items()]
    names = {entry.label: entry.name.partition("/")[0] for entry in entries}
    found = list_splits(str(place), {"train": entries}, place / LISTS[2], renumber=True)
    return replace(found, class_names=tuple(names[int(label)] for label in found.class_names))
