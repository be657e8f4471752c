"""torchvision's data sets, read from disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import datasets

from vispeft.data.listed import ListedData
from vispeft.data.listing import ListedSplit, Listing
from vispeft.data.sources import TorchvisionSource
from vispeft.errors import DataError, UnknownNameError

__all__ = ["SETS", "TorchvisionData"]

_THREE: Mapping[str, Any] = {"train": {"split": "train"}, "validation": {"split": "val"}, "test": {"split": "test"}}
_TWO: Mapping[str, Any] = {"train": {"split": "train"}, "test": {"split": "test"}}
_FLAG: Mapping[str, Any] = {"train": {"train": True}, "test": {"train": False}}
_VAL: Mapping[str, Any] = {"train": {"split": "train"}, "test": {"split": "val"}}
_ONE: Mapping[str, Any] = {"train": {}}

SETS: dict[str, tuple[Mapping[str, Any], str]] = {
    "CIFAR10": (_FLAG, "cifar-10-batches-py/"),
    "CIFAR100": (_FLAG, "cifar-100-python/"),
    "CLEVRClassification": (_VAL, "clevr/CLEVR_v1.0/{images,scenes}/"),
    "Caltech101": (_ONE, "caltech101/101_ObjectCategories/<class>/"),
    "Caltech256": (_ONE, "caltech256/256_ObjectCategories/<class>/"),
    "Country211": (
        {"train": {"split": "train"}, "validation": {"split": "valid"}, "test": {"split": "test"}},
        "country211/{train,valid,test}/<class>/",
    ),
    "DTD": (_THREE, "dtd/dtd/{images,labels}/"),
    "EMNIST": (
        {"train": {"split": "balanced", "train": True}, "test": {"split": "balanced", "train": False}},
        "EMNIST/raw/ with the unpacked IDX files",
    ),
    "EuroSAT": (_ONE, "eurosat/2750/<class>/"),
    "FGVCAircraft": (_THREE, "fgvc-aircraft-2013b/data/"),
    "FashionMNIST": (_FLAG, "FashionMNIST/raw/ with the four unpacked IDX files"),
    "Flowers102": (_THREE, "flowers-102/ with jpg/, setid.mat and imagelabels.mat"),
    "Food101": (_TWO, "food-101/{images,meta}/"),
    "GTSRB": (_TWO, "gtsrb/"),
    "ImageNet": (_VAL, "train/<class>/, val/<class>/ and meta.bin"),
    "Imagenette": (_VAL, "imagenette2/{train,val}/<class>/"),
    "KMNIST": (_FLAG, "KMNIST/raw/ with the four unpacked IDX files"),
    "MNIST": (_FLAG, "MNIST/raw/ with the four unpacked IDX files"),
    "OxfordIIITPet": (
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        "oxford-iiit-pet/{images,annotations}/",
    ),
    "PCAM": (_THREE, "pcam/ with the unpacked h5 files"),
    "QMNIST": (_FLAG, "QMNIST/raw/ with the unpacked IDX files"),
    "RenderedSST2": (_THREE, "rendered-sst2/{train,valid,test}/<class>/"),
    "SEMEION": (_ONE, "semeion.data"),
    "STL10": (_TWO, "stl10_binary/"),
    "SUN397": (_ONE, "SUN397/"),
    "SVHN": (_TWO, "train_32x32.mat and test_32x32.mat"),
    "StanfordCars": (_TWO, "stanford_cars/{devkit,cars_train,cars_test}/ and cars_test_annos_withlabels.mat"),
    "USPS": (_FLAG, "usps.bz2 and usps.t.bz2"),
}
"""Arguments per split, and the files required in the root."""


class TorchvisionData(ListedData):
    """A classification data set of torchvision that is already on disk; nothing is downloaded.

    The data set's own splits are used; if torchvision has no validation or no test split, it is drawn from train. Only
    ``check: full`` inspects every image.
    """

    def __init__(self, *, dataset: str, root: str, check: Literal["full", "fast"] = "fast", **settings: Any) -> None:
        """Store the settings.

        Args:
            dataset: Name of the class in torchvision.datasets, such as CIFAR100.
            root: The folder given to torchvision.
            check: Decode every image and compare contents (``full``), or trust torchvision's own check (``fast``).
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            UnknownNameError: If the data set is unknown.
        """
        super().__init__(check=check, **settings)
        if dataset not in SETS:
            raise UnknownNameError("torchvision data set", dataset, SETS)
        self.dataset, self.root = dataset, Path(root)

    def read(self) -> Listing:
        """Open the data set.

        Raises:
            DataError: If torchvision cannot open it in the root.
        """
        arguments, _ = SETS[self.dataset]
        opened = {split: self._open(given) for split, given in arguments.items()}
        splits = {
            split: ListedSplit(TorchvisionSource(data, f"{self.dataset} {split}"), torch.tensor(_labels(data)))
            for split, data in opened.items()
        }
        names = _names(opened["train"], max(int(split.targets.max()) for split in splits.values()) + 1)
        return Listing(f"{self.root} ({self.dataset})", names, splits, settled=True)

    def _open(self, arguments: Mapping[str, Any]) -> Any:
        cls = getattr(datasets, self.dataset)
        quiet = {"download": False} if "download" in inspect.signature(cls).parameters else {}
        try:
            return cls(str(self.root), **arguments, **quiet)
        except Exception as error:  # truncated files cause assertions, pickle errors and others
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"torchvision cannot open {self.dataset} in {str(self.root)!r} ({reason}). "
                f"It is not downloaded here: put {SETS[self.dataset][1]} into that folder. If it is there, compare "
                "with what torchvision says above."
            ) from error


def _labels(data: Any) -> list[int]:
    """Return the labels of a data set, without reading images if it stores labels separately."""
    for name in ("targets", "labels", "_labels", "y"):
        known = getattr(data, name, None)
        if known is not None and len(known) == len(data):
            # QMNIST's rows hold more than the class, which comes first.
            return [int(label) for label in (known[:, 0] if getattr(known, "ndim", 1) > 1 else known)]
    for name in ("samples", "_samples"):
        known = getattr(data, name, None)
        if isinstance(known, list) and len(known) == len(data):
            return [int(label) for _, label in known]
    return [int(data[index][1]) for index in range(len(data))]


def _names(data: Any, count: int) -> tuple[str, ...]:
    """Return the names of the classes, or their numbers as text."""
    found = getattr(data, "classes", None) or getattr(data, "categories", None) or ()
    names = tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in found)
    return names if len(names) >= count and len(set(names)) == len(names) else tuple(str(n) for n in range(count))
