"""Augmentation of training images, built from the transforms of torchvision and timm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from timm.data import Mixup, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.data.preprocessing import INTERPOLATIONS, Preprocessing
from vispeft.errors import ConfigError

__all__ = ["Augmentation", "TrainTransform", "cropped"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images. Everything is off by default."""

    crop: Literal["none", "random", "resized"] = "none"
    """Crop: ``none`` as in evaluation, ``random`` a window at a random place (needs the data module's `crop_pct`), or
    ``resized`` a random area of random aspect ratio, resized."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """For ``resized``: smallest and largest fraction of the image's area. (0.08, 1) is timm's default."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment in timm's spelling, such as ``rand-m9-n2-mstd0.5``."""
    erase: float = 0.0
    """Probability of erasing a random rectangle (timm's, filled with noise per pixel)."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off. With both, each batch gets one of them, with equal probability."""
    mix_probability: float = 1.0
    """Probability of mixing a batch."""
    on_device: bool = False
    """Whether whole batches are flipped, erased, mixed and normalised on the device that trains, and workers only read,
    crop and resize. Other random numbers are drawn then; `rand_augment` cannot be used."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        for field in ("flip", "erase", "mix_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"Augmentation({field}={getattr(self, field)}): a probability from 0 to 1 is needed.")
        for field in ("mixup", "cutmix"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"Augmentation({field}={getattr(self, field)}): a number from 0 is needed.")
        if self.crop not in ("none", "random", "resized"):
            raise ConfigError(f"Augmentation(crop={self.crop!r}): the choices are none, random and resized.")
        least, most = self.crop_area
        if not 0 < least <= most <= 1:
            raise ConfigError(f"Augmentation(crop_area={self.crop_area}): two shares above 0, up to 1, are needed.")
        if self.rand_augment is not None:
            _rand_augment(self.rand_augment, Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)))

    def least(self, preprocessing: Preprocessing) -> tuple[int, int] | None:
        """Return the height and width that a training image is decoded to at least; None for all of its pixels.

        Args:
            preprocessing: Preprocessing of every image.
        """
        if preprocessing.least is None or self.crop != "resized":
            return preprocessing.least
        side = math.sqrt(self.crop_area[0])  # the smallest crop, too, has as many pixels as the backbone sees
        height, width = (math.ceil(length / side) for length in preprocessing.size)
        return height, width

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, which makes targets soft."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def mixer(self, num_classes: int, multi_label: bool) -> Mixup | None:
        """Create timm's mixup for a batch, or None. Label smoothing is left to the task.

        Args:
            num_classes: Number of classes.
            multi_label: Whether targets already have shape (B, classes).
        """
        if not self.mixes:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mix_probability,
            label_smoothing=0.0,
            num_classes=num_classes,
            multi_label=multi_label,
        )


class TrainTransform:
    """Transform one training image: uint8 (3, H, W) in, normalised float32 of the backbone's size out.

    It draws from the global generators; call it inside `vispeft.data.randomness.seeded`.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        """Compose the steps, in timm's order.

        Args:
            preprocessing: Preprocessing of every image.
            augmentation: Augmentation of training images.

        Raises:
            ConfigError: If a random crop is configured and would cut off nothing.
        """
        self._place = cropped(preprocessing, augmentation)
        self._flip = v2.RandomHorizontalFlip(augmentation.flip) if augmentation.flip else None
        named = augmentation.rand_augment
        self._rand = _rand_augment(named, preprocessing) if named else None
        self._normalise = preprocessing.normalise()
        erase = augmentation.erase
        self._erase = RandomErasing(erase, mode="pixel", device="cpu") if erase else None

    def __call__(self, image: Tensor) -> Tensor:
        """Transform an image.

        Args:
            image: uint8 (3, H, W).
        """
        image = self._place(image)
        if self._flip is not None:
            image = self._flip(image)
        if self._rand is not None:
            image = F.pil_to_tensor(self._rand(F.to_pil_image(image)))
        image = self._normalise(image)
        return image if self._erase is None else self._erase(image)


def cropped(preprocessing: Preprocessing, augmentation: Augmentation) -> v2.Transform:
    """Return the transform that crops and resizes a training image, uint8 (3, H, W).

    Args:
        preprocessing: Preprocessing of every image.
        augmentation: Augmentation of training images.

    Raises:
        ConfigError: If a random crop is configured and would cut off nothing.
    """
    if augmentation.crop == "random" and preprocessing.crop_pct is None:
        raise ConfigError(
            "Augmentation(crop='random') cuts a window out of a larger image, and images are resized to exactly "
            "the backbone's size. Give the data module crop_pct, such as 0.875, or take crop='resized'."
        )
    size = list(preprocessing.size)
    if augmentation.crop == "resized":
        mode = INTERPOLATIONS[preprocessing.interpolation]
        return v2.RandomResizedCrop(size, scale=augmentation.crop_area, interpolation=mode, antialias=True)
    if augmentation.crop == "random":
        return v2.Compose([preprocessing.scale(), v2.RandomCrop(size)])
    return preprocessing.resize()


def _rand_augment(spelling: str, preprocessing: Preprocessing) -> Any:
    # timm's settings (timm.data.transforms_factory): translations of up to 45 %, gaps filled with the mean colour.
    settings = {
        "translate_const": int(min(preprocessing.size) * 0.45),
        "img_mean": tuple(min(255, max(0, round(255 * value))) for value in preprocessing.mean),
    }
    try:
        return rand_augment_transform(spelling, settings)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or "it begins with rand"
        raise ConfigError(
            f"Augmentation(rand_augment={spelling!r}) is not understood by timm ({reason}); "
            "give something like rand-m9-n2-mstd0.5."
        ) from error
