"""ADE20K with the 150 classes of the MIT scene parsing challenge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vispeft.data.masks import MaskCoding
from vispeft.data.palettes import ClassTable, class_table
from vispeft.data.published import find_split
from vispeft.data.segmentation import PublishedMasks
from vispeft.data.trees import LeftOut, list_folder
from vispeft.errors import DataError

__all__ = ["ADE20KData"]


class ADE20KData(PublishedMasks):
    """ADE20K: ``root/ADEChallengeData2016/{images,annotations}/{training,validation}``.

    In the masks, 0 marks everything else, which is ignored, and 1 to 150 are the classes.
    """

    @property
    def table(self) -> ClassTable:
        """The published classes."""
        return class_table("ade20k")

    @property
    def counts(self) -> Mapping[str, int]:
        """Published number of images by split."""
        return {"train": 20_210, "validation": 2_000}

    @property
    def coding(self) -> MaskCoding:
        """Mapping from mask values to classes."""
        return MaskCoding(num_classes=150, reduce_zero_label=True)

    def pairs(self, split: Literal["train", "validation"]) -> Sequence[tuple[Path, Path]]:
        """List images and masks of a published split."""
        place = self.place(".", "ADEChallengeData2016", needs=("images", "annotations"))
        folder = find_split(place / "images", split)
        _, files = list_folder(folder, LeftOut(folder))
        images = [Path(path) for path in files if path.endswith(".jpg")]
        if not images:
            raise DataError(f"{folder} has no image; the published ones end in .jpg.")
        return [(image, place / "annotations" / folder.name / f"{image.stem}.png") for image in images]
