"""Data of one's own for several dense tasks: a folder of images, and one of label files for each task."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.label_decoders import read_binary, read_binary_codes, read_depth, read_normals, read_values
from vispeft.data.label_files import Decode, LabelFiles
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.listing import Finding, gather
from vispeft.data.masks import MaskCoding, MaskFiles, own_coding
from vispeft.data.multitask import MultiTaskData
from vispeft.data.paired_folders import find_places
from vispeft.data.sources import FileSource, Source
from vispeft.data.trees import LeftOut, is_image, walk
from vispeft.errors import ConfigError, check_object, counted

__all__ = ["TaskFolderData", "TaskLabels"]

DECODERS: Mapping[str, Decode] = MappingProxyType(
    {"saliency": read_binary, "edge": read_binary, "normals": read_normals, "depth": read_depth, "values": read_values}
)
"""Decoder of each kind but classes."""
FITTING: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "palette": ("classes",),
        "reduce_zero_label": ("classes",),
        "ids": ("classes",),
        "rgb_masks": ("classes",),
        "zero_one": ("saliency", "edge"),
    }
)
"""Kinds of tasks for which a field may be set."""
WEIGHTS = MappingProxyType({"saliency": 5.0, "edge": 50.0, "normals": 10.0})
"""Weight of the loss by kind: those that are published for PASCAL-Context (SimonVandenhende/
Multi-Task-Learning-PyTorch); 1 for others."""


@dataclass(frozen=True, kw_only=True)
class TaskLabels(DenseTarget):
    """A dense task of one's own data, and the form of its label files."""

    folder: str | None = None
    """Folder of the files; None for one with the name of the task."""
    weight: float | None = None
    """Weight of the loss; None for 5 (saliency), 50 (edge), 10 (normals) or 1."""
    reduce_zero_label: bool = False
    """Whether 0 marks unlabelled pixels of masks and classes start at 1."""
    ids: dict[int, int] | None = None
    """Class by mask value, if they differ, such as ``{0: 0, 255: 1}``; class 255 means no label."""
    rgb_masks: bool = False
    """Whether masks hold the colours of `palette`."""
    zero_one: bool = False
    """Whether images of saliency or edges hold 0, 1, and 255 for no label. Otherwise white is 1."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid, or does not fit the kind.
        """
        super().__post_init__()
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "palette", tuple(map(tuple, self.palette)))
        for name, kinds in FITTING.items():
            if getattr(self, name) and self.kind not in kinds:
                raise ConfigError(f"TaskLabels({name}=...) is for {' and '.join(kinds)}, and the kind is {self.kind}.")
        if self.kind == "classes":
            self.coding()  # it refuses settings that do not go together
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"TaskLabels(weight={self.weight}): a number above 0 is needed.")

    @property
    def target(self) -> DenseTarget:
        """The task without the form of its files."""
        return DenseTarget(kind=self.kind, class_names=self.class_names, palette=self.palette)

    @property
    def endings(self) -> tuple[str, ...]:
        """Ends of the names of label files; an image has its label in a file with the first one that is there."""
        return (".png",) if self.kind == "classes" else (".npy", ".png")

    @property
    def loss_weight(self) -> float:
        """Weight of the loss, with that of the kind where none was given."""
        return float(WEIGHTS.get(self.kind, 1.0) if self.weight is None else self.weight)

    def coding(self) -> MaskCoding:
        """Mapping from the values of masks to classes.

        Raises:
            ConfigError: If the settings for it do not go together.
        """
        return own_coding(
            "TaskLabels",
            self.class_names,
            self.palette,
            rgb_masks=self.rgb_masks,
            ids=self.ids,
            reduce_zero_label=self.reduce_zero_label,
        )

    def source(self, paths: Iterable[str], root: Path) -> Source:
        """Make the source of the labels in some files.

        Args:
            paths: The files.
            root: Folder that names in messages are relative to.
        """
        if self.kind == "classes":
            return MaskFiles(paths, root, self.coding())
        decode = read_binary_codes if self.zero_one else DECODERS[self.kind]
        return LabelFiles(((path,) for path in paths), root, self.kind, decode)


class TaskFolderData(MultiTaskData):
    """A folder of images and one of labels for each task: ``root/images/train/a.jpg`` and ``root/depth/train/a.png``.

    Images and labels are paired by their path without suffix. The splits are folders inside these, or around them
    (``root/train/images/a.jpg``), named as in `ImageFolderData`; missing splits are drawn from train.

    Labels are ``.png`` files, or ``.npy`` files of numpy, which are preferred, for all kinds but classes:

    * classes: masks as those of `MaskFolderData`;
    * saliency, edge: images of 0 and white, or of 0, 1 and 255 for no label (``zero_one``); arrays of the latter;
    * normals: unit vectors with the components right, down and towards the camera; arrays (H, W, 3) with zero for none,
      or images of (n + 1) / 2 * 255 with grey or black for none;
    * depth: arrays of metres (floating-point numbers), or images of 16 bits in millimetres, with 0 for none;
    * values: arrays with 255 for no label, or grey images, whose shares of white are the values.
    """

    def __init__(self, *, root: str, labels: dict[str, TaskLabels], images: str = "images", **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder.
            labels: The tasks by name.
            images: Folder of the images.
            settings: Settings of `MultiTaskData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        if not isinstance(labels, Mapping) or not labels:
            raise ConfigError(f"TaskFolderData(labels={labels!r}): describe one or more tasks by name, such as depth.")
        for task, described in labels.items():
            check_object("TaskFolderData", f"labels[{task!r}]", described, TaskLabels)
        self.root, self.images, self.labels = Path(root), images, dict(labels)
        super().__init__(**settings)
        folders = [images, *(self._folder(task) for task in self.labels)]
        twice = sorted({name for name in folders if folders.count(name) > 1})
        if twice:
            raise ConfigError(
                f"TaskFolderData: the folder {twice[0]!r} was named twice; images and each task need one of their own."
            )

    @property
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """The described tasks."""
        return {task: described.target for task, described in self.labels.items()}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of the loss of each requested task."""
        return {task: self.labels[task].loss_weight for task in self.targets}

    def read(self) -> TaskListing:
        """List images and labels.

        Raises:
            DataError: If there are no such folders, or their names leave open which split is meant.
        """
        left = LeftOut(self.root)
        folders = [self._folder(task) for task in self.targets]
        places = find_places(self.root, self.images, folders, left, "root, images and labels (folder, of each task)")
        findings: list[Finding] = []
        splits: dict[str, ListedTasks] = {}
        for split, (images, *labels) in places.items():
            by_task = dict(zip(self.targets, labels, strict=True))
            splits[split] = self._split(split, images, by_task, left, findings)
        if left:
            findings.append(Finding(left.level, "left-out", left.line()))
        listing = self.listing_of(str(self.root), splits)
        listing.findings += findings
        return listing

    def _folder(self, task: str) -> str:
        return self.labels[task].folder or task

    def _split(
        self, split: str, images: str, places: Mapping[str, str], left: LeftOut, findings: list[Finding]
    ) -> ListedTasks:
        """List the images and labels of a split."""
        paths: dict[str, str] = {}
        for path in sorted(walk(images, left)):
            if is_image(path):
                paths[path] = _stem(path, images)
            else:
                left.add("ending", path)
        sources = {}
        for task, place in places.items():
            described, stems = self.labels[task], list(paths.values())
            found = self._files(place, described.endings, left)
            # A missing file is named with the last ending, and the checks report it.
            missing = {stem: f"{place}{os.sep}{stem}{described.endings[-1]}" for stem in stems}
            sources[task] = described.source([found.get(stem, missing[stem]) for stem in stems], self.root)
            alone = sorted(os.path.relpath(path, self.root) for stem, path in found.items() if stem not in set(stems))
            text = f"{task}: {counted(len(alone), 'label')} in {split} without an image, left out"
            findings += gather("warning", {("label-without-image", text): alone})
        return ListedTasks(FileSource(paths, self.root), sources)

    def _files(self, place: str, endings: Sequence[str], left: LeftOut) -> dict[str, str]:
        """Find the label files in a folder by the path of their image, without suffix."""
        files = sorted(walk(place, left)) if os.path.isdir(place) else []
        found: dict[str, str] = {}
        for ending in endings:
            for path in files:
                if path.lower().endswith(ending):
                    found.setdefault(_stem(path, place), path)
        for path in files:
            if not path.lower().endswith(endings):
                left.add("label", path)
        return found


def _stem(path: str, folder: str) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0]
