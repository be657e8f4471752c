"""Own images for metric learning: class folders, and lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vispeft.data.folder import ImageFolderData
from vispeft.data.lists import ImageListData, JsonData, ListFileData
from vispeft.data.metric_data import MetricData
from vispeft.data.metric_listing import ListedRoles, RetrievalListing
from vispeft.errors import ConfigError

__all__ = ["MetricFolderData", "MetricListData"]


class MetricFolderData(MetricData):
    """Images in folders named after their classes: ``root/cat/1.jpg``, or ``root/{train,test}/cat/1.jpg``.

    Without a folder ``test``, half of the classes are drawn for it; without one for validation, some of the training
    classes. The layout is that of `ImageFolderData`.
    """

    def __init__(self, *, root: str, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder.
            settings: Settings of `MetricData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        self.reader = ImageFolderData(root=root)

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If there are no class folders.
        """
        return self.listing_of(self.reader.read())


class MetricListData(MetricData):
    """Images in lists, with a path and a class per line, or in JSON files from path to class.

    The format is that of `ImageListData` and `JsonData`. Test images are those of `test_list`, each both query and
    gallery; or those of `query_list` and `gallery_list`; without any, half of the classes are drawn.
    """

    def __init__(
        self,
        *,
        train_list: str,
        validation_list: str | None = None,
        test_list: str | None = None,
        query_list: str | None = None,
        gallery_list: str | None = None,
        root: str | None = None,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            train_list: The list of the training images, or of all images if test classes are drawn.
            validation_list: The list of the validation images; None draws some of the training classes.
            test_list: The list of the test images.
            query_list: The list of the test images that ask.
            gallery_list: The list of the test images that are searched.
            root: The folder that paths are relative to; by default that of the training list.
            settings: Settings of `MetricData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid, or there are queries without a gallery.
        """
        super().__init__(**settings)
        if (query_list is None) != (gallery_list is None) or (test_list is not None and query_list is not None):
            raise ConfigError(
                f"{type(self).__name__}(test_list={test_list!r}, query_list={query_list!r}, "
                f"gallery_list={gallery_list!r}): give test_list, or query_list and gallery_list, or none."
            )
        kind: type[ListFileData] = JsonData if train_list.endswith(".json") else ImageListData
        self.reader = kind(train_list=train_list, validation_list=validation_list, test_list=test_list, root=root)
        if query_list is not None and gallery_list is not None:
            self.reader.lists |= {"query": Path(query_list), "gallery": Path(gallery_list)}

    def read(self) -> RetrievalListing:
        """List the images; classes of all lists get numbers from one table.

        Raises:
            DataError: If a list cannot be read.
        """
        found = self.reader.read()
        splits = dict(found.splits)
        if "query" in splits:
            splits["test"] = ListedRoles.of(splits.pop("query"), splits.pop("gallery"))
        return self.listing_of(replace(found, splits=splits))
