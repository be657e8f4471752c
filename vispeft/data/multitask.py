"""Data modules for several dense tasks at once: images with a label for each task."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.base import Index
from vispeft.data.by_name import ClassOrder
from vispeft.data.dense_targets import DenseTarget
from vispeft.data.joint_tasks import JointTasks, TaskAugmentation
from vispeft.data.listed import ListedData, PixelSplit
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.listing import Published
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.sources import Source
from vispeft.errors import ConfigError, DataError, UnknownNameError, check_object

__all__ = ["MultiTaskData", "TaskSplit"]

Labels = dict[str, Tensor]
"""Labels by task."""


class TaskSplit(PixelSplit):
    """A split that reads its images and their labels of each task on access."""

    listed: ListedTasks

    @property
    def labels(self) -> Mapping[str, Source]:
        """Source of the labels of each task."""
        return self.listed.labels

    def __getitem__(self, index: Index | int) -> tuple[Tensor, Labels]:  # type: ignore[override]
        """Return one normalised image (3, H, W) and its labels."""
        images, labels = self.__getitems__([index])
        return images[0], {task: rows[0] for task, rows in cast(Labels, labels).items()}

    def read_labels(self, index: int) -> Labels:
        """Read the label of each task (C, H, W) of an image."""
        return {task: source.read(index) for task, source in self.labels.items()}

    def stacked(self, labels: Sequence[Labels]) -> Labels:
        """Combine labels by task, as `DenseTarget` describes them."""
        return {task: torch.stack([one[task] for one in labels]) for task in self.labels}


class MultiTaskData(ListedData):
    """Base of the data modules for several dense tasks.

    Batches are images float32 (B, 3, H, W) and a dictionary of labels by task, all of the size that the backbone sees,
    in validation and test too, where the public codes measure. `targets` describes the tasks. Only files of the
    requested tasks are asked for.

    Subclasses describe all tasks they know in `known_targets` and return a listing of the requested ones from `read`,
    made by `listing_of`.
    """

    default_tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks without a choice; empty for all that are known."""
    known_weights: ClassVar[Mapping[str, float]] = {}
    """Weight of the loss of each task, the published one where there is one; 1 for others."""
    blank_tasks: ClassVar[Collection[str]] = ()
    """Tasks whose label is ignored as a whole in an image that shows no class but the first."""

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        augment: TaskAugmentation | None = TaskAugmentation(),  # noqa: B008 - it is frozen
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            tasks: Names of the tasks, in the order of `targets`; None takes those of published results.
            augment: Augmentation of training images; None stretches them to the size, without random changes.
            batch_size: Images per batch.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
            UnknownNameError: If a task is not known.
        """
        super().__init__(batch_size=batch_size, **settings)
        name = type(self).__name__
        if "crop_pct" in self._given:
            raise ConfigError(f"{name}(crop_pct=...): it cuts images and not their labels; leave it out.")
        check_object(name, "augment", augment, TaskAugmentation)
        self.target = "tasks"
        self.geometry = augment
        self._tasks = self._chosen(tasks)

    def _chosen(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """Check the names of the tasks.

        Raises:
            ConfigError: If there is none, or one is named twice.
            UnknownNameError: If one is not known.
        """
        name = type(self).__name__
        if isinstance(tasks, str):
            raise ConfigError(f"{name}(tasks={tasks!r}): a list of names is needed, such as [{tasks}].")
        chosen = tuple(self.default_tasks or self.known_targets) if tasks is None else tuple(tasks)
        for task in chosen:
            if task not in self.known_targets:
                raise UnknownNameError(f"task of {name}", task, self.known_targets)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ConfigError(f"{name}(tasks={list(chosen)}): one or more different tasks are needed.")
        return chosen

    @property
    @abstractmethod
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """Every task that the reader knows, by name; it is called before the settings of a subclass are stored."""

    @property
    def targets(self) -> dict[str, DenseTarget]:
        """The requested tasks, by name and in their order."""
        return {task: self.known_targets[task] for task in self._tasks}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of the loss of each requested task, the published one where there is one."""
        return {task: float(self.known_weights.get(task, 1.0)) for task in self._tasks}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the tasks, in their order."""
        return self._tasks

    def match_classes(self, names: Sequence[str]) -> ClassOrder:
        """Give the labels of the tasks that a model has, in its order.

        Args:
            names: Names of the model's tasks.

        Returns:
            Those tasks.

        Raises:
            DataError: If the splits are loaded already, or the data have no labels for one of them.
        """
        if self._splits:
            raise DataError(f"{type(self).__name__} has loaded its splits; match the tasks before.")
        lacking = [name for name in names if name not in self.known_targets]
        if lacking:
            raise DataError(
                f"The model has the tasks {', '.join(names)}, and {type(self).__name__} has no labels for "
                f"{', '.join(lacking)}; it knows {', '.join(self.known_targets)}."
            )
        self._tasks, self._listing, self._report = self._chosen(names), None, None
        return ClassOrder(self._tasks, self._tasks, self.target)

    @property
    def smallest_size(self) -> tuple[int, int]:
        """Height and width of the smallest validation or test image, as the backbone sees it."""
        return self.preprocessing.size

    def listing_of(
        self,
        place: str,
        splits: Mapping[str, ListedTasks],
        *,
        published: tuple[str, Mapping[str, int]] | None = None,
        repeats: frozenset[str] = frozenset(),
    ) -> TaskListing:
        """Make the listing of a reader.

        Args:
            place: Location of the data, for messages.
            splits: ``train`` and, if given, ``validation`` and ``test``.
            published: Title and published number of images per split, if it is a known data set.
            repeats: Splits that contain images of other splits by protocol.
        """
        names = self.class_names
        known = None if published is None else Published(published[0], len(names), published[1])
        return TaskListing(
            place,
            names,
            dict(splits),
            target="tasks",
            published=known,
            repeats=repeats,
            targets=self.targets,
            blank=frozenset(self.blank_tasks),
        )

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Check images and labels and return the splits.

        Args:
            preprocessing: Preprocessing of each image.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
        """
        self.accept()
        train = JointTasks(self.targets, preprocessing, self.geometry, self.blank_tasks)
        evaluate = JointTasks(self.targets, preprocessing, None, self.blank_tasks)
        listed: Mapping[str, Any] = self.listing.splits
        return {
            "train": TaskSplit(listed["train"], train, self.seed),
            **{name: TaskSplit(listed[name], evaluate) for name in ("validation", "test")},
        }

    def measured_on(self, split: str, task: str) -> dict[str, Any]:
        """Describe images and labels of a task; see `ImageData`.

        Returns:
            Also digests of the images' names (``names``), and of all pixels and labels (``contents``; None where only
            headers were read, as with ``check: fast``).
        """
        listed = cast(ListedTasks, self.listing.splits[split])
        names = [listed.source.name(index) for index in range(len(listed))]
        read = list(self._digests(split, listed, task))
        known = all(image and label for image, label in read)
        found = {"names": _digest(names), "contents": _digest(map(str, read)) if known else None}
        return {**super().measured_on(split, task), **found}

    def _digests(self, split: str, listed: ListedTasks, task: str) -> Iterator[tuple[str, str]]:
        """Yield the digests of each image and of its label; empty ones where they were not read."""
        pairs = zip(self.report().facts[split], listed.label_facts(task, full=False), strict=True)
        return ((image.digest, label.digest) for image, label in pairs)

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify the images and labels of all splits."""
        yield from super().identity()
        for name, split in self.listing.splits.items():
            for index in range(len(split)):
                yield f"{name} labels {' '.join(self._tasks)} {split.label(index)}\n".encode()


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]
