"""Handwritten digits: 1,797 real images of 8 x 8 pixels that come with scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vispeft.data.base import ImageData, MemorySplit
from vispeft.data.listing import Target
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.splitting import check_drawing, cross_validation, share_of_rest
from vispeft.errors import ConfigError

__all__ = ["DigitsData"]

PROPERTIES = {
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "closed loop": (0, 6, 8, 9),
    "above four": (5, 6, 7, 8, 9),
}
"""Labels of the ``multilabel`` target with the digits that have them; 1 has none."""
_TARGETS: dict[Target, tuple[str, ...]] = {
    "class": tuple("0123456789"),
    "multilabel": tuple(PROPERTIES),
    "regression": ("digit",),
}
"""Names of the model's outputs by target."""


class DigitsData(ImageData):
    """The digits 0 to 9 as grey images, repeated over three channels and resized to the backbone's size.

    The three splits are stratified and drawn from their own seed, so every training seed sees the same test images.
    """

    def __init__(
        self,
        *,
        interpolation: str | None = "bicubic",
        validation: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        augment: bool = False,
        target: Target = "class",
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            interpolation: nearest, bilinear or bicubic; None takes the backbone's.
            validation: Fraction of all images for selecting the best epoch, above 0.
            test: Fraction of all images for the final test, above 0; with folds, one fold is the test split instead.
            split_seed: Seed of the splits and the folds.
            folds: Number of parts for cross-validation, each the test split of one run. None gives a single split.
            fold: Index of the part to test, from 0.
            augment: Rotate training images by up to 10 degrees and shift them by up to a tenth of their size.
            target: Kind of target: the digit as one of ten classes (``class``), its properties (``multilabel``), or its
                value (``regression``).
            settings: Settings of `ImageData`.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(interpolation=interpolation, **settings)
        # With fewer than 10 images scikit-learn cannot put all ten classes into a split.
        least = 10 / 1797
        for name, share in (("validation", validation), ("test", test), ("train", 1 - validation - test)):
            if not least <= share < 1:
                raise ConfigError(
                    f"DigitsData(validation={validation}, test={test}) leaves a share of {share:.3g} for {name}; "
                    f"each split needs one image per class, a share of at least {least:.2g}."
                )
        if target not in _TARGETS:
            raise ConfigError(f"DigitsData(target={target!r}): the choices are {', '.join(_TARGETS)}.")
        self.target = target
        check_drawing("DigitsData", validation=validation, test=test, split_seed=split_seed, folds=folds, fold=fold)
        self.validation, self.test, self.split_seed, self.augment = validation, test, split_seed, augment
        self.folds, self.fold = folds, fold

    @property
    def class_names(self) -> tuple[str, ...]:
        """The digits as text, or the names of the other targets."""
        return _TARGETS[self.target]

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Read the images, resize them once, and draw the splits.

        Args:
            preprocessing: Preprocessing of each image.
        """
        digits = load_digits()
        # Grey values go from 0 to 16. Rounding to 8 bits gives the same values as images read from files.
        grey = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
        images = preprocessing.resize()(grey[:, None])
        labels = torch.from_numpy(digits.target).long()
        augment = v2.RandomAffine(10, translate=(0.1, 0.1), interpolation=v2.InterpolationMode.BILINEAR)
        return {
            name: MemorySplit(
                images[chosen],
                self._targets(labels[chosen]),
                preprocessing,
                augment if self.augment and name == "train" else None,
                self.seed,
            )
            for name, chosen in self._indices(labels).items()
        }

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        if self.target == "class":
            return labels
        if self.target == "regression":
            return labels[:, None].float()
        table = torch.tensor([[digit in digits for digits in PROPERTIES.values()] for digit in range(10)])
        return table[labels].float()

    def _indices(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.folds is None:
            everything = torch.arange(len(labels)).numpy()
            rest, test = train_test_split(
                everything, test_size=self.test, random_state=self.split_seed, stratify=labels
            )
        else:
            split = cross_validation(labels, self.folds, self.fold, self.split_seed)
            rest, test = (indices.numpy() for indices in split)
        train, validation = train_test_split(
            rest,
            test_size=share_of_rest(self.validation, self.test if self.folds is None else 1 / self.folds),
            random_state=self.split_seed,
            stratify=labels[rest],
        )
        # Sorted, so that a split does not depend on the order in which scikit-learn draws it.
        return {
            name: torch.from_numpy(indices).sort().values
            for name, indices in (("train", train), ("validation", validation), ("test", test))
        }
