"""PASCAL VOC 2012 and PASCAL-Context, in the folders of the VOC development kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vispeft.data.masks import MaskCoding
from vispeft.data.palettes import ClassTable, class_table
from vispeft.data.published import LISTS, read_stems
from vispeft.data.segmentation import PublishedMasks
from vispeft.errors import ConfigError

__all__ = ["PascalContextData", "VOCData"]


class VOCData(PublishedMasks):
    """PASCAL VOC 2012, 21 classes: ``root/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}``.

    With `augmented`, training also uses the masks of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011), as
    written by mmsegmentation's ``tools/dataset_converters/voc_aug.py``: ``SegmentationClassAug``, listed in
    ``trainaug.txt`` or ``aug.txt``.
    """

    def __init__(self, *, root: str, augmented: bool = False, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder with ``VOCdevkit``, or ``VOCdevkit/VOC2012`` itself.
            augmented: Whether to train on the masks of the Semantic Boundaries Dataset too.
            settings: Settings of `PublishedMasks`, `SegmentationData`, `ListedData` and `ImageData`.
        """
        super().__init__(root=root, **settings)
        self.augmented = augmented

    @property
    def table(self) -> ClassTable:
        """The published classes."""
        return class_table("voc")

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 10_582 if self.augmented else 1_464, "validation": 1_449}

    def pairs(self, split: Literal["train", "validation"]) -> Sequence[tuple[Path, Path]]:
        """List images and masks of a published split."""
        needs = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
        place = self.place(".", "VOC2012", "VOCdevkit/VOC2012", needs=needs)
        lists = place / "ImageSets/Segmentation"
        stems = read_stems(lists / LISTS[split])
        found = [(_image(place, stem), place / f"SegmentationClass/{stem}.png") for stem in stems]
        if split == "train" and self.augmented:
            both = lists / "trainaug.txt"
            more = read_stems(both if both.is_file() else lists / "aug.txt")
            own = set(stems)
            added = [stem for stem in more if stem not in own]
            found += [(_image(place, stem), place / f"SegmentationClassAug/{stem}.png") for stem in added]
        return found


class PascalContextData(PublishedMasks):
    """PASCAL-Context: ``root/VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext}``.

    Masks are those written by mmsegmentation's ``tools/dataset_converters/pascal_context.py``: 0 for the background, 1
    to 59 for the classes. With 59 classes the background is ignored.
    """

    def __init__(self, *, root: str, classes: int = 59, **settings: Any) -> None:
        """Store the settings.

        Args:
            root: The folder with ``VOCdevkit``, or ``VOCdevkit/VOC2010`` itself.
            classes: 59, or 60 with the background.
            settings: Settings of `PublishedMasks`, `SegmentationData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If `classes` is another number.
        """
        super().__init__(root=root, **settings)
        if classes not in (59, 60):
            raise ConfigError(f"PascalContextData(classes={classes}): the choices are 59 and 60.")
        self.classes = classes

    @property
    def table(self) -> ClassTable:
        """The published classes."""
        every = class_table("pascal_context")
        if self.classes == 60:
            return every
        return replace(every, class_names=every.class_names[1:], palette=every.palette[1:])

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 4_998, "validation": 5_105}

    @property
    def coding(self) -> MaskCoding:
        """Mapping from mask values to classes."""
        return MaskCoding(num_classes=self.classes, reduce_zero_label=self.classes == 59)

    def pairs(self, split: Literal["train", "validation"]) -> Sequence[tuple[Path, Path]]:
        """List images and masks of a published split."""
        needs = ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext")
        place = self.place(".", "VOC2010", "VOCdevkit/VOC2010", needs=needs)
        stems = read_stems(place / "ImageSets/SegmentationContext" / LISTS[split])
        return [(_image(place, stem), place / f"SegmentationClassContext/{stem}.png") for stem in stems]


def _image(place: Path, stem: str) -> Path:
    return place / f"JPEGImages/{stem}.jpg"
