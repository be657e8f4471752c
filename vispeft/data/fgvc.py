"""The five fine-grained data sets with the splits published with VPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vispeft.data.augmentation import Augmentation
from vispeft.data.list_files import read_json
from vispeft.data.listed import ListedData
from vispeft.data.listing import Listing, Published
from vispeft.data.lists import list_splits
from vispeft.errors import DataError, UnknownNameError

__all__ = ["FGVC", "FgvcData"]

FGVC = {
    "cub": ("CUB-200-2011", "images", 200, (5_394, 600, 5_794)),
    "nabirds": ("NABirds", "images", 555, (21_536, 2_393, 24_633)),
    "flowers": ("Oxford Flowers", "", 102, (1_020, 1_020, 6_149)),
    "dogs": ("Stanford Dogs", "Images", 120, (10_800, 1_200, 8_580)),
    "cars": ("Stanford Cars", "", 196, (7_329, 815, 8_041)),
}
"""Title, image folder, classes, and number of train, validation and test images (Jia et al., ECCV 2022)."""

LISTS = {"train": "train.json", "validation": "val.json", "test": "test.json"}


class FgvcData(ListedData):
    """One fine-grained data set: ``root/{train,val,test}.json``, each one object from image path to class id.

    Paths are relative to ``root/images`` for cub and nabirds, ``root/Images`` for dogs, and ``root`` for cars and
    flowers; ids are numbered 0, 1, ... in sorted order.

    As published, images are resized to 256 pixels on the shorter side (for 224); training takes a random crop, flipped
    with probability 0.5, and evaluation the centre crop; mean and standard deviation are ImageNet's.
    """

    def __init__(
        self,
        *,
        root: str,
        dataset: str,
        mean: tuple[float, float, float] | None = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] | None = IMAGENET_DEFAULT_STD,
        crop_pct: float | None = 0.875,
        augment: Augmentation | None = Augmentation(crop="random", flip=0.5),  # noqa: B008 - it is frozen
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            root: The folder of the set.
            dataset: cub, nabirds, flowers, dogs or cars.
            mean: Mean per channel; None takes the backbone's.
            std: Standard deviation per channel; None takes the backbone's.
            crop_pct: Fraction of a proportionally resized image that the crop keeps; None stretches the whole image.
            augment: Augmentation of training images.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            UnknownNameError: If there is no such data set.
            ConfigError: If a setting is invalid.
        """
        super().__init__(mean=mean, std=std, crop_pct=crop_pct, augment=augment, **settings)
        if dataset not in FGVC:
            raise UnknownNameError("FGVC data set", dataset, FGVC)
        self.root, self.dataset = Path(root), dataset

    def read(self) -> Listing:
        """List the images.

        Raises:
            DataError: If a list is missing.
        """
        missing = [name for name in LISTS.values() if not (self.root / name).is_file()]
        if missing:
            raise DataError(
                f"{self.root} has no {', '.join(missing)}. The published splits are train.json, val.json and "
                "test.json, each one object from image path to class id."
            )
        title, folder, classes, counts = FGVC[self.dataset]
        base = self.root / folder
        if not base.is_dir():
            raise DataError(f"{self.root} has no folder {folder}; the paths in {title}'s lists start from it.")
        entries = {split: read_json(self.root / name) for split, name in LISTS.items()}
        published = Published(title, classes, dict(zip(LISTS, counts, strict=True)))
        return list_splits(str(self.root), entries, base, renumber=True, published=published)
