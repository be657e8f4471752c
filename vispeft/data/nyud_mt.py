"""NYUD-v2 for several dense tasks, in the layout of the archive NYUD_MT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.joint_tasks import NYUD_AUGMENTATION, TaskAugmentation
from vispeft.data.label_decoders import read_binary, read_depth, read_normals
from vispeft.data.label_files import LabelFiles
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.masks import MaskCoding, MaskFiles
from vispeft.data.multitask import MultiTaskData
from vispeft.data.palettes import make_palette
from vispeft.data.published import LISTS, PublishedSplits, read_stems
from vispeft.data.sources import FileSource, Source

__all__ = ["NyudMultiTaskData"]


# fmt: off
CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture", "other prop",
)
# fmt: on
"""The 40 classes of Gupta et al. (CVPR 2013)."""


class NyudMultiTaskData(PublishedSplits, MultiTaskData):
    """NYUD-v2 with the tasks ``semseg``, ``depth``, ``normals`` and ``edge``.

    The layout is that of the archive NYUD_MT: ``root/images/x.jpg`` and ``root/gt_sets/*.txt``, with
    ``segmentation/x.png`` (0 for no label, 1 to 40 for the classes), ``depth/x.npy`` (metres, 0 for none),
    ``normals/x.npy`` (unit vectors, zero for none) and ``edge/x.npy``.
    """

    # Those of the public code (SimonVandenhende/Multi-Task-Learning-PyTorch); normals and edges as for PASCAL-Context.
    known_weights = MappingProxyType({"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0})

    def __init__(self, *, root: str, augment: TaskAugmentation | None = NYUD_AUGMENTATION, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder with ``images`` and ``gt_sets``.
            augment: Augmentation of training images; None stretches them to the size, without random changes.
            settings: Settings of `PublishedSplits`, `MultiTaskData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(root=root, augment=augment, **settings)

    @property
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """The four tasks."""
        return {
            "semseg": DenseTarget(kind="classes", class_names=CLASSES, palette=make_palette(len(CLASSES))),
            "depth": DenseTarget(kind="depth"),
            "normals": DenseTarget(kind="normals"),
            "edge": DenseTarget(kind="edge"),
        }

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 795, "validation": 654}

    def read(self) -> TaskListing:
        """List images and labels.

        Raises:
            DataError: If the layout differs.
        """
        place = self.place(".", "NYUD_MT", needs=("images", "gt_sets"))
        listed = {}
        for split, name in LISTS.items():
            stems = read_stems(place / "gt_sets" / name)
            images = [place / f"images/{stem}.jpg" for stem in stems]
            labels = {task: _labels(place, task, stems) for task in self.targets}
            listed[split] = ListedTasks(FileSource(images, self.root), labels)
        splits, expected, repeats = self.arrange(listed)
        return self.listing_of(str(self.root), splits, published=("NYUD-v2", expected), repeats=repeats)


def _labels(place: Path, task: str, stems: Sequence[str]) -> Source:
    """List the labels of a task."""
    if task == "semseg":
        coding = MaskCoding(num_classes=len(CLASSES), reduce_zero_label=True)
        return MaskFiles([place / f"segmentation/{stem}.png" for stem in stems], place, coding)
    groups = [(place / f"{task}/{stem}.npy",) for stem in stems]
    if task == "depth":
        return LabelFiles(groups, place, "depth", read_depth)
    return (
        LabelFiles(groups, place, "normals", read_normals)
        if task == "normals"
        else LabelFiles(groups, place, "edge", read_binary)
    )
