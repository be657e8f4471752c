"""Cityscapes with its 19 evaluation classes and fine annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from vispeft.data.masks import IGNORE, MaskCoding
from vispeft.data.palettes import ClassTable, class_table
from vispeft.data.published import find_split
from vispeft.data.segmentation import PublishedMasks
from vispeft.data.trees import LeftOut, walk
from vispeft.errors import DataError

__all__ = ["CityscapesData"]

EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Values of ``labelIds`` masks that are evaluated, in class order (cityscapesScripts, helpers/labels.py)."""
VALUES = 34
"""Number of values in ``labelIds`` masks."""

IMAGE, TRAIN_IDS, LABEL_IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


class CityscapesData(PublishedMasks):
    """Cityscapes: ``root/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and ``root/gtFine/{train,val}/<city>/``.

    Uses the masks ``*_gtFine_labelTrainIds.png`` made by cityscapesScripts if there are any, otherwise the
    ``*_gtFine_labelIds.png`` of the download, with their values mapped to the 19 classes.
    """

    @property
    def table(self) -> ClassTable:
        """The published classes."""
        return class_table("cityscapes")

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 2_975, "validation": 500}

    @cached_property
    def _ending(self) -> str:
        """Suffix of mask file names."""
        masks = self._place / "gtFine"
        return TRAIN_IDS if any(path.endswith(TRAIN_IDS) for path in walk(masks, LeftOut(masks))) else LABEL_IDS

    @property
    def _place(self) -> Path:
        return self.place(".", "cityscapes", needs=("leftImg8bit", "gtFine"))

    @property
    def coding(self) -> MaskCoding:
        """Mapping from mask values to classes."""
        if self._ending == TRAIN_IDS:
            return MaskCoding(num_classes=19)
        ids = {value: EVALUATED.index(value) if value in EVALUATED else IGNORE for value in range(VALUES)}
        return MaskCoding(num_classes=19, ids=ids)

    def pairs(self, split: Literal["train", "validation"]) -> Sequence[tuple[Path, Path]]:
        """List images and masks of a published split."""
        folder = find_split(self._place / "leftImg8bit", split)
        images = sorted(Path(path) for path in walk(folder, LeftOut(folder)) if path.endswith(IMAGE))
        if not images:
            raise DataError(f"{folder} has no <city>/*{IMAGE}, which the published layout has.")
        masks = self._place / "gtFine" / folder.name
        named = ((image, image.name.removesuffix(IMAGE) + self._ending) for image in images)
        return [(image, masks / image.parent.name / name) for image, name in named]
