"""Base of the readers of published data sets for metric learning: their sizes, and splits by halves of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from vispeft.data.list_files import read_text
from vispeft.data.listing import Finding, ListedSplit, Listing
from vispeft.data.metric_data import MetricData
from vispeft.data.metric_listing import GALLERY, QUERY, RetrievalListing, roles_of
from vispeft.errors import DataError, counted

__all__ = ["PublishedMetricData", "find_place", "in_halves", "read_rows", "sort_classes"]


class PublishedMetricData(MetricData):
    """Base of the readers of published data sets, whose training and test classes are fixed.

    Numbers of images and classes other than the published ones are an error, unless `published` is false. Faults that
    users cannot repair, such as equal images in train and test, are warnings.
    """

    title: ClassVar[str]
    """Name of the data set."""
    counts: ClassVar[Mapping[str, tuple[int, int]]]
    """Published number of images and of classes of train, of test, or of query and gallery."""

    def __init__(self, *, root: str, published: bool = True, validation: float | None = None, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder of the data set.
            published: Whether numbers of images and classes must be the published ones; false for a part of them.
            validation: With the protocol ``literature``, the share of the training classes for validation; None trains
                on all of them, as published results do, and reports the last epoch.
            settings: Settings of `MetricData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(validation=validation, **settings)
        self.root, self.published = Path(root), published

    def published_listing(self, found: Listing) -> RetrievalListing:
        """Make the listing of a reader, with the sizes compared.

        Args:
            found: The splits train and test, with one class per image.
        """
        wrong = self._wrong_counts(found.splits) if self.published else []
        return self.listing_of(replace(found, findings=[*found.findings, *wrong]), settled=True)

    def _wrong_counts(self, splits: Mapping[str, ListedSplit]) -> list[Finding]:
        """Compare numbers of images and classes with the published ones."""
        found = []
        for name, (images, classes) in self.counts.items():
            labels = _labels(splits, name)
            have = (len(labels), len(labels.unique()))
            if have != (images, classes):
                text = (
                    f"{self.title} has {images:,} images of {classes:,} classes in {name} as published, and here are "
                    f"{have[0]:,} of {have[1]:,}; give all of them, or set published: false for a part"
                )
                found.append(Finding("error", "published-counts", text))
        return found


def _labels(splits: Mapping[str, ListedSplit], name: str) -> Any:
    """Return the labels of a split, or those of the queries or the gallery of test."""
    if name in splits:
        return splits[name].targets
    test = splits["test"]
    return test.targets[roles_of(test) == {"query": QUERY, "gallery": GALLERY}[name]]


def sort_classes(found: Listing, key: Callable[[str], Any]) -> Listing:
    """Number the classes in another order.

    Args:
        found: The split ``train`` with all images.
        key: Function that gives the place of a name in the order.
    """
    order = sorted(range(len(found.class_names)), key=lambda label: key(found.class_names[label]))
    places = torch.empty(len(order), dtype=torch.long)
    places[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    pool = found.splits["train"]
    splits = {"train": ListedSplit(pool.source, places[pool.targets])}
    return replace(found, class_names=tuple(found.class_names[label] for label in order), splits=splits)


def read_rows(path: Path, columns: int, skip: int = 0) -> list[tuple[str, list[str]]]:
    """Read a published table of columns with spaces between them.

    Args:
        path: The file.
        columns: Number of columns.
        skip: Number of lines in front of the table.

    Returns:
        Place for messages and columns of each line.

    Raises:
        DataError: If it cannot be read, or a line has another number of columns.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n")[skip:], start=skip + 1):
        if not (fields := line.split()):
            continue
        if len(fields) != columns:
            raise DataError(
                f"{path}:{number} has {counted(len(fields), 'column')}, and the published table has {columns}: {line}"
            )
        found.append((f"{path.name}:{number}", fields))
    return found


def in_halves(found: Listing) -> Listing:
    """Split images by their classes: the first half for training, the second one for the test.

    Args:
        found: The split ``train`` with all images, classes in the published order.
    """
    pool = found.splits["train"]
    first = pool.targets < len(found.class_names) // 2
    splits = {"train": pool.take(first.nonzero().flatten()), "test": pool.take((~first).nonzero().flatten())}
    return replace(found, splits=splits)


def find_place(title: str, root: Path, layouts: Sequence[tuple[str, Sequence[str]]]) -> tuple[int, Path]:
    """Find which of several published layouts a folder has.

    Args:
        title: Name of the data set, for messages.
        root: The folder.
        layouts: A folder inside of it, and files or folders this must contain, for each layout.

    Returns:
        The index of the layout, and its folder.

    Raises:
        DataError: If it has none of them.
    """
    for index, (inside, needs) in enumerate(layouts):
        if all((root / inside / need).exists() for need in needs):
            return index, root / inside
    wanted = "; or ".join(", ".join(str(Path(inside) / need) for need in needs) for inside, needs in layouts)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:6]) if root.is_dir() else "no such folder"
    raise DataError(f"{title} was looked for in {str(root)!r}, which needs {wanted}; found {found or 'nothing'}.")
