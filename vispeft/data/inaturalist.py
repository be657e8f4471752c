"""iNaturalist 2018 for metric learning, with the lists published with Smooth-AP (Brown et al., ECCV 2020)."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vispeft.data.list_files import read_text
from vispeft.data.lists import list_splits
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, find_place, read_rows
from vispeft.data.targets import Entry
from vispeft.errors import ConfigError, DataError

__all__ = ["INaturalistMetricData"]

LISTS = {"train": "Inaturalist_train_set1.txt", "test": "Inaturalist_test_set1.txt"}
TABLES = ("train2018.json", "val2018.json")


class INaturalistMetricData(PublishedMetricData):
    """iNaturalist 2018: 325,846 images of 5,690 species for training, 136,093 of 2,452 others for the test.

    Read from ``Inaturalist_{train,test}_set1.txt``, in the folder itself or in ``Inat_dataset_splits``, whose lines are
    ``train_val2018/GROUP/SPECIES/IMAGE.jpg``. The class is the two folders of an image, or with ``classes: json`` its
    category in ``train2018.json`` and ``val2018.json``.
    """

    title = "iNaturalist 2018"
    counts = {"train": (325_846, 5_690), "test": (136_093, 2_452)}

    def __init__(self, *, classes: Literal["folders", "json"] = "folders", **settings: Any) -> None:
        """Store the settings.

        Args:
            classes: Source of the classes: ``folders`` or ``json``.
            settings: `root` and other settings of `PublishedMetricData`, `MetricData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        if classes not in ("folders", "json"):
            raise ConfigError(f"{type(self).__name__}(classes={classes!r}): the choices are folders and json.")
        super().__init__(**settings)
        self.classes = classes

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If a list is missing or damaged.
        """
        names = [*LISTS.values()]
        _, place = find_place(self.title, self.root, [("Inat_dataset_splits", names), (".", names)])
        categories = _categories(self.root) if self.classes == "json" else None
        entries = {split: _entries(place / name, categories) for split, name in LISTS.items()}
        return self.published_listing(list_splits(str(place), entries, self.root, renumber=True))


def _entries(path: Path, categories: dict[str, int] | None) -> list[Entry]:
    """Read one list, and find the class of each image."""
    found = []
    for where, (name,) in read_rows(path, 1):
        folders = PurePosixPath(name).parts[-3:-1]
        if len(folders) < 2 or (categories is not None and name not in categories):
            reason = "two folders above it" if categories is None else f"a category in {' or '.join(TABLES)}"
            raise DataError(f"{path}: the image of {where} needs {reason}: {name}")
        found.append(Entry(name, "/".join(folders) if categories is None else categories[name], where))
    return found


def _categories(root: Path) -> dict[str, int]:
    """Return the category of each image by its path, from the tables of the competition."""
    found: dict[str, int] = {}
    for name in TABLES:
        try:
            table = json.loads(read_text(root / name))
            paths = {image["id"]: image["file_name"] for image in table["images"]}
            found |= {paths[one["image_id"]]: int(one["category_id"]) for one in table["annotations"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{root / name} is no table as published ({error!r}). Fetch it again.") from error
    return found
