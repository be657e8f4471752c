"""Splits of images with a label for each of several dense tasks, as a reader lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.facts import ImageFacts
from vispeft.data.images import Reading
from vispeft.data.listing import ListedSplit, Listing
from vispeft.data.masks import ListedMasks
from vispeft.data.sources import JoinedSource, Source
from vispeft.errors import DataError, counted

__all__ = ["ListedTasks", "TaskListing", "mask_listings", "task_splits"]


class ListedTasks(ListedSplit):
    """Images of a split and their labels for each task."""

    labels: dict[str, Source]
    """Source of one label per image, by task."""

    def __init__(self, source: Source, labels: Mapping[str, Source]) -> None:
        """Combine images and labels.

        Args:
            source: Source of the images.
            labels: Source of the labels, by task.

        Raises:
            DataError: If a task has another number of labels than there are images.
        """
        for task, found in labels.items():
            if len(found) != len(source):
                raise DataError(
                    f"The task {task!r} has {counted(len(found), 'label')} for {counted(len(source), 'image')}; every "
                    "image needs one label of each task."
                )
        # Splits are drawn without reading labels, so all images count as one class.
        super().__init__(source, torch.zeros(len(source), dtype=torch.long))
        self.labels = dict(labels)
        self._facts: dict[str, tuple[bool, list[ImageFacts]]] = {}

    def read_with(self, reading: Reading) -> None:
        """Set how the pixels of images are read, and the limit on those of labels."""
        super().read_with(reading)
        for source in self.labels.values():
            source.read_with(reading)

    def label_facts(self, task: str, full: bool) -> list[ImageFacts]:
        """Inspect every label of a task, once.

        Args:
            task: The task.
            full: Whether to read the labels; otherwise stored facts, headers or the presence of files suffice.
        """
        if task not in self._facts or (full and not self._facts[task][0]):
            self._facts[task] = full, self.labels[task].facts(full)
        return self._facts[task][1]

    def label(self, index: int) -> str:
        """Return a string that identifies all labels of an image, by their values if they were read."""
        return " ".join(self.label_facts(task, full=False)[index].digest for task in self.labels)

    def take(self, indices: Tensor) -> ListedTasks:
        """Select some of the images."""
        chosen = indices.tolist()
        return ListedTasks(self.source.take(chosen), {task: one.take(chosen) for task, one in self.labels.items()})

    def join(self, other: ListedSplit) -> ListedTasks:
        """Append the images of another split."""
        assert isinstance(other, ListedTasks)
        labels = {task: JoinedSource([source, other.labels[task]]) for task, source in self.labels.items()}
        return ListedTasks(JoinedSource([self.source, other.source]), labels)


class _TaskMasks(ListedMasks):
    """Images of a split and their masks for one task, which share the facts that the split has found."""

    def __init__(self, split: ListedTasks, task: str) -> None:
        super().__init__(split.source, split.labels[task])
        self._split, self._task = split, task

    def mask_facts(self, full: bool) -> list:  # type: ignore[type-arg]
        """Inspect every mask, once."""
        return self._split.label_facts(self._task, full)


@dataclass
class TaskListing(Listing):
    """Splits of images with a label for each of several dense tasks."""

    targets: dict[str, DenseTarget] = field(default_factory=dict)
    """The tasks, by name."""
    blank: frozenset[str] = frozenset()
    """Tasks that have no label in many images, as parts of people in images without people."""


def task_splits(listing: Listing) -> dict[str, ListedTasks]:
    """Return the splits of a listing of tasks.

    Args:
        listing: The data.
    """
    return {name: split for name, split in listing.splits.items() if isinstance(split, ListedTasks)}


def mask_listings(listing: TaskListing) -> Iterator[tuple[str, Listing]]:
    """Yield each task of classes with a listing of its own, for the checks of masks.

    Args:
        listing: The data.
    """
    for task, target in listing.targets.items():
        if target.kind == "classes":
            splits = {name: _TaskMasks(split, task) for name, split in task_splits(listing).items()}
            yield (
                task,
                Listing(
                    listing.place,
                    target.class_names,
                    cast("dict[str, ListedSplit]", splits),
                    target="mask",
                    published=listing.published,
                    settled=listing.settled,
                    repeats=listing.repeats,
                    drawn=listing.drawn,
                    reading=listing.reading,
                ),
            )
