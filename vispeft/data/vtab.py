"""VTAB-1k: 19 tasks with 1,000 training images each, as published file lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vispeft.data.list_files import read_lines
from vispeft.data.listed import ListedData
from vispeft.data.listing import Finding, Listing, Published
from vispeft.data.lists import list_splits
from vispeft.errors import ConfigError, DataError, UnknownNameError

__all__ = ["VTAB", "Vtab1kData"]

VTAB = {
    "cifar": (100, 10_000),
    "caltech101": (102, 6_084),
    "dtd": (47, 1_880),
    "oxford_flowers102": (102, 6_149),
    "oxford_iiit_pet": (37, 3_669),
    "svhn": (10, 26_032),
    "sun397": (397, 21_750),
    "patch_camelyon": (2, 32_768),
    "eurosat": (10, 5_400),
    "resisc45": (45, 6_300),
    "diabetic_retinopathy": (5, 42_670),
    "clevr_count": (8, 15_000),
    "clevr_dist": (6, 15_000),
    "dmlab": (6, 22_735),
    "kitti": (4, 711),
    "dsprites_loc": (16, 73_728),
    "dsprites_ori": (16, 73_728),
    "smallnorb_azi": (18, 12_150),
    "smallnorb_ele": (9, 12_150),
}
"""Number of classes and test images of each task (Zhai et al., 2019; table of tasks in the VPT paper)."""

PROTOCOLS = {
    "final": {"train": "train800val200", "validation": "val200", "test": "test"},
    "tune": {"train": "train800", "validation": "val200", "test": "val200"},
}
REPEATS = {"final": frozenset({"validation"}), "tune": frozenset({"test"})}
COUNTS = {"train800": 800, "val200": 200, "train800val200": 1000}


class Vtab1kData(ListedData):
    """One task of VTAB-1k: ``root/<task>/{train800,val200,train800val200,test}.txt`` with a path and a label per line.

    ``protocol: tune`` is for choosing hyperparameters: 800 images train, 200 validate and also serve as test split, and
    the real test split is not opened. ``final`` is for reported results: all 1,000 images train, and the test split is
    measured. Its validation images are among the training images, so their accuracy is meaningless, and the last epoch
    is kept.

    As published, images are stretched to the backbone's size (224 x 224), bicubic, normalised with ImageNet's mean and
    standard deviation, and not augmented; a smaller last batch is dropped.
    """

    def __init__(
        self,
        *,
        root: str,
        task: str,
        protocol: Literal["tune", "final"] = "final",
        mean: tuple[float, float, float] | None = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] | None = IMAGENET_DEFAULT_STD,
        interpolation: str | None = "bicubic",
        drop_last: bool = True,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            root: The folder that contains the tasks' folders.
            task: Name of the task, such as cifar or dsprites_loc.
            protocol: ``tune`` or ``final``.
            mean: Mean per channel; None takes the backbone's.
            std: Standard deviation per channel; None takes the backbone's.
            interpolation: nearest, bilinear or bicubic; None takes the backbone's.
            drop_last: Drop the last training batch of an epoch if it is smaller than the others.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            UnknownNameError: If there is no such task.
            ConfigError: If a setting is invalid.
        """
        super().__init__(mean=mean, std=std, interpolation=interpolation, drop_last=drop_last, **settings)
        if task not in VTAB:
            raise UnknownNameError("VTAB-1k task", task, VTAB)
        if protocol not in PROTOCOLS:
            raise ConfigError(f"Vtab1kData(protocol={protocol!r}): the choices are tune and final.")
        self.root, self.task, self.protocol = Path(root), task, protocol
        self.validation_chooses = protocol == "tune" or self.folds is not None

    def read(self) -> Listing:
        """List the images.

        Raises:
            DataError: If a list is missing.
        """
        place = self.root / self.task
        lists = PROTOCOLS[self.protocol]
        missing = [f"{name}.txt" for name in lists.values() if not (place / f"{name}.txt").is_file()]
        if missing:
            raise DataError(
                f"{place} has no {', '.join(missing)}. VTAB-1k lies in ROOT/<task>/ with train800.txt, val200.txt, "
                f"train800val200.txt, test.txt and the images they name; root is {str(self.root)!r}."
            )
        findings: list[Finding] = []
        entries = {split: read_lines(place / f"{name}.txt", findings) for split, name in lists.items()}
        classes, tested = VTAB[self.task]
        counts = {split: COUNTS.get(name, tested) for split, name in lists.items()}
        published = Published(f"VTAB-1k {self.task}", classes, counts)
        names = [str(index) for index in range(classes)]
        listing = list_splits(str(place), entries, place, names=names, published=published, findings=findings)
        return replace(listing, repeats=REPEATS[self.protocol])
