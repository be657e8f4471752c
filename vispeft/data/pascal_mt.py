"""PASCAL-Context for several dense tasks, in the layout of the archive PASCAL_MT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.joint_tasks import PASCAL_AUGMENTATION, TaskAugmentation
from vispeft.data.label_files import LabelFiles
from vispeft.data.list_files import read_text
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.masks import MaskCoding, MaskFiles
from vispeft.data.multitask import MultiTaskData
from vispeft.data.palettes import class_table, make_palette
from vispeft.data.pascal_labels import (
    PARTS,
    PERSON,
    check_scipy,
    people_in,
    read_edges,
    read_normals,
    read_parts,
    read_saliency,
)
from vispeft.data.published import LISTS, PublishedSplits, read_stems
from vispeft.data.sources import FileSource, Source
from vispeft.errors import DataError

__all__ = ["PascalMultiTaskData"]


class PascalMultiTaskData(PublishedSplits, MultiTaskData):
    """PASCAL-Context with the tasks ``semseg``, ``human_parts``, ``sal``, ``normals`` and ``edge``.

    The layout is that of the archive PASCAL_MT: ``root/JPEGImages/x.jpg`` and ``root/ImageSets/Context/*.txt``, with
    ``semseg/VOC12/x.png`` or else ``semseg/pascal-context/x.png``, ``human_parts/x.mat``, ``sal_distill/x.png``,
    ``normals_distill/x.png`` and ``pascal-context/trainval/x.mat`` (for normals and edges). Normals and saliency were
    made by networks. Published results are of all tasks but ``edge``.

    Where ``human_parts`` is the only task, images without people are left out, as in the public code.
    """

    default_tasks = ("semseg", "human_parts", "sal", "normals")
    # Those of the public codes (SimonVandenhende/Multi-Task-Learning-PyTorch and scale-lab/MTLoRA).
    known_weights = MappingProxyType({"semseg": 1.0, "human_parts": 2.0, "sal": 5.0, "normals": 10.0, "edge": 50.0})
    blank_tasks = ("human_parts",)

    def __init__(self, *, root: str, augment: TaskAugmentation | None = PASCAL_AUGMENTATION, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder with ``JPEGImages``.
            augment: Augmentation of training images; None stretches them to the size, without random changes.
            settings: Settings of `PublishedSplits`, `MultiTaskData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid, or a task needs a package that is not installed.
        """
        super().__init__(root=root, augment=augment, **settings)
        check_scipy(type(self).__name__, self.targets)

    @property
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """The five tasks."""
        classes = class_table("voc")
        return {
            "semseg": DenseTarget(kind="classes", class_names=classes.class_names, palette=classes.palette),
            "human_parts": DenseTarget(kind="classes", class_names=PARTS, palette=make_palette(len(PARTS))),
            "sal": DenseTarget(kind="saliency"),
            "normals": DenseTarget(kind="normals"),
            "edge": DenseTarget(kind="edge"),
        }

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 4_998, "validation": 5_105}

    def read(self) -> TaskListing:
        """List images and labels.

        Raises:
            DataError: If the layout differs.
        """
        place = self.place(".", "PASCAL_MT", needs=("JPEGImages", "ImageSets/Context"))
        alone = [*self.targets] == ["human_parts"]
        listed = {split: self._split(place, split, alone) for split in LISTS}
        splits, expected, repeats = self.arrange(listed)
        title = "PASCAL-Context"
        return self.listing_of(str(self.root), splits, published=(title, {} if alone else expected), repeats=repeats)

    def _split(self, place: Path, split: str, people_alone: bool) -> ListedTasks:
        stems = read_stems(place / "ImageSets/Context" / LISTS[split])
        if people_alone:
            stems = _with_people(place, stems, LISTS[split])
        images = [place / f"JPEGImages/{stem}.jpg" for stem in stems]
        labels = {task: _labels(place, task, stems) for task in self.targets}
        return ListedTasks(FileSource(images, self.root), labels)


def _labels(place: Path, task: str, stems: Sequence[str]) -> Source:
    """List the labels of a task."""
    if task == "semseg":
        choices = [[place / f"semseg/{folder}/{stem}.png" for folder in ("VOC12", "pascal-context")] for stem in stems]
        masks = [first if first.is_file() else second for first, second in choices]
        return MaskFiles(masks, place, MaskCoding(num_classes=len(class_table("voc").class_names)))
    if task == "human_parts":
        groups = [(place / f"human_parts/{stem}.mat", place / f"JPEGImages/{stem}.jpg") for stem in stems]
        return LabelFiles(groups, place, "classes", read_parts, MaskCoding(num_classes=len(PARTS)))
    if task == "sal":
        return LabelFiles([(place / f"sal_distill/{stem}.png",) for stem in stems], place, "saliency", read_saliency)
    contexts = [place / f"pascal-context/trainval/{stem}.mat" for stem in stems]
    if task == "edge":
        return LabelFiles([(context,) for context in contexts], place, "edge", read_edges)
    normals = [place / f"normals_distill/{stem}.png" for stem in stems]
    return LabelFiles(zip(normals, contexts, strict=True), place, "normals", read_normals)


def _with_people(place: Path, stems: Sequence[str], name: str) -> list[str]:
    """Choose the images that show people, by the archive's list of categories if it has them all.

    Raises:
        DataError: If there is none.
    """
    known = _categories(place / "ImageSets/Parts" / name)
    if not set(stems) <= set(known):
        files = {stem: place / f"human_parts/{stem}.mat" for stem in stems}
        # A missing file is reported by the checks, with all others.
        known = {stem: [PERSON] if not path.is_file() or people_in(str(path)) else [] for stem, path in files.items()}
    chosen = [stem for stem in stems if PERSON in known[stem]]
    if not chosen:
        raise DataError(f"No image of {name} in {place} shows people, and human_parts is the only task.")
    return chosen


def _categories(path: Path) -> dict[str, list[int]]:
    """Read the list of the categories of each image; empty without one.

    Raises:
        DataError: If it is no such list.
    """
    if not path.is_file():
        return {}
    try:
        return {str(stem): [int(one) for one in found] for stem, found in json.loads(read_text(path)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no JSON object from image to categories ({error}). Remove it; the categories are then taken "
            "from human_parts."
        ) from error
