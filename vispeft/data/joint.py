"""Joint transforms of an image and its mask: resizing, cropping, flipping, colour changes, padding.

Steps and default values are those of mmsegmentation's training pipelines (`RandomResize`, `RandomCrop`, `RandomFlip`,
`PhotoMetricDistortion`). They accept torchvision's `tv_tensors.Image` and `tv_tensors.Mask`, and draw from the global
generators; call them inside `vispeft.data.randomness.seeded`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.data.formats import MAX_PIXELS
from vispeft.data.masks import IGNORE
from vispeft.data.preprocessing import INTERPOLATIONS, Preprocessing
from vispeft.errors import ConfigError, DataError

__all__ = ["EvaluationPair", "MaskAugmentation", "MaskCrop", "PadTo", "PhotometricDistortion", "Rescale", "TrainPair"]

TRIES = 10
"""Number of windows drawn before one dominated by a class is accepted (mmsegmentation's `RandomCrop`)."""


@dataclass(frozen=True, kw_only=True)
class MaskAugmentation:
    """Augmentation of training images and their masks, by default that of mmsegmentation."""

    crop_size: int | tuple[int, int] | None = None
    """Height and width of the crops; one number for both; None takes the size of the data module."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random factor by which images are resized, keeping their aspect ratio."""
    cat_max_ratio: float = 0.75
    """Fraction of the labelled pixels above which a class dominates a crop, which is then redrawn, up to ten times."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Whether to change brightness, contrast, saturation and hue."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        if isinstance(self.crop_size, int):
            object.__setattr__(self, "crop_size", (self.crop_size, self.crop_size))
        if self.crop_size is not None and min(self.crop_size) < 1:  # type: ignore[arg-type]
            raise ConfigError(f"MaskAugmentation(crop_size={self.crop_size}): at least one pixel is needed.")
        object.__setattr__(self, "scale", tuple(self.scale))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"MaskAugmentation(scale={self.scale}): two factors above 0 are needed, smaller first.")
        if not 0 < self.cat_max_ratio <= 1:
            raise ConfigError(f"MaskAugmentation(cat_max_ratio={self.cat_max_ratio}): a share above 0, up to 1.")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"MaskAugmentation(flip={self.flip}): a probability from 0 to 1 is needed.")


class TrainPair:
    """Transform a training image and its mask: uint8 (3, H, W) and (H, W) in, float32 and int64 of one size out."""

    def __init__(
        self, preprocessing: Preprocessing, augmentation: MaskAugmentation | None, short_side: int | None = None
    ) -> None:
        """Compose the steps.

        Args:
            preprocessing: Source of size, interpolation, mean and standard deviation.
            augmentation: The augmentation; None stretches the whole image and its mask to the size.
            short_side: Shorter side in pixels to which the image is resized before the random factor; None keeps its
                size.
        """
        if augmentation is None:
            steps: list[v2.Transform] = [Rescale(preprocessing.interpolation, size=preprocessing.size)]
            size = preprocessing.size
        else:
            size = augmentation.crop_size or preprocessing.size  # type: ignore[assignment]
            steps = [
                Rescale(preprocessing.interpolation, short_side=short_side, factors=augmentation.scale),
                MaskCrop(size, augmentation.cat_max_ratio),
                v2.RandomHorizontalFlip(augmentation.flip),
            ]
            if augmentation.photometric:
                steps.append(PhotometricDistortion())
        # Padding comes last, so that zero is the mean colour.
        self._steps = v2.Compose([*steps, preprocessing.normalise(), PadTo(size)])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Transform an image and its mask.

        Args:
            image: uint8 (3, H, W).
            mask: Classes or `IGNORE` (H, W).
        """
        image, mask = self._steps(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


class EvaluationPair:
    """Transform an image for evaluation; its mask keeps its size, to which scores are resized."""

    def __init__(self, preprocessing: Preprocessing, whole: bool = False, short_side: int | None = None) -> None:
        """Compose the steps.

        Args:
            preprocessing: Source of size, interpolation, mean and standard deviation.
            whole: Whether to keep the image's aspect ratio instead of stretching it to the size.
            short_side: With `whole`, the shorter side of the result in pixels; None keeps the image's size.
        """
        size = None if whole else preprocessing.size
        self._resize = Rescale(preprocessing.interpolation, size=size, short_side=short_side)
        self._steps = v2.Compose([self._resize, preprocessing.normalise()])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Transform an image.

        Args:
            image: uint8 (3, H, W).
            mask: Classes or `IGNORE` (H, W).
        """
        return self._steps(image), mask.long()

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of a transformed image.

        Args:
            height: Height of the original image.
            width: Width of the original image.
        """
        rows, columns = self._resize.make_params([torch.empty(0, height, width)])["size"]
        return rows, columns


# ------------------------------------------------------------------ steps


class Rescale(v2.Transform):
    """Resize image and mask to a size, or by a random factor that keeps the aspect ratio."""

    def __init__(
        self,
        interpolation: str,
        *,
        size: tuple[int, int] | None = None,
        short_side: int | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Store the settings of the target size.

        Args:
            interpolation: Interpolation of images: nearest, bilinear or bicubic.
            size: Height and width; None keeps the aspect ratio.
            short_side: Shorter side in pixels before the factor; None starts from the image's size.
            factors: Smallest and largest factor.
        """
        super().__init__()
        self.interpolation, self.size = INTERPOLATIONS[interpolation], size
        self.short_side, self.factors = short_side, factors

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        if self.size is not None:
            return {"size": list(self.size)}
        height, width = flat_inputs[0].shape[-2:]
        least, most = self.factors
        factor = least + (most - least) * torch.rand(()).item() if least < most else least
        if self.short_side is not None:
            factor *= self.short_side / min(height, width)
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        grown = math.ceil(max(1.0, most) ** 2 * height * width) + height + width + 1  # as the factors ask for, rounded
        if math.prod(size) > max(MAX_PIXELS, grown):
            raise DataError(
                f"An image of {height} x {width} pixels would be resized to {size[0]} x {size[1]}, which are more than "
                f"{MAX_PIXELS:,} pixels. Leave images out that are so much longer than wide, or set a size of both "
                "sides."
            )
        return {"size": size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image (3, H, W) or a mask (H, W)."""
        size = params["size"]
        if list(inpt.shape[-2:]) == size:
            return inpt
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, size, interpolation=self.interpolation, antialias=True)
        # torchvision resizes masks by "nearest", which picks the upper left pixel and so shifts them by up to half a
        # pixel relative to the image.
        mask = inpt.as_subclass(Tensor)[None]
        return tv_tensors.Mask(F.resize(mask, size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0])


class MaskCrop(v2.Transform):
    """Crop a random window, if possible one that no single class dominates."""

    def __init__(self, size: tuple[int, int], cat_max_ratio: float = 1.0) -> None:
        """Store the settings.

        Args:
            size: Height and width; along a side where the image is smaller, all of it is kept.
            cat_max_ratio: Fraction of the labelled pixels above which a class dominates and the window is redrawn, up
            to ten times.
        """
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window."""
        mask = next(one for one in flat_inputs if isinstance(one, tv_tensors.Mask)).as_subclass(Tensor)
        window = self._draw(*mask.shape[-2:])
        if self.cat_max_ratio < 1:
            for _ in range(TRIES):
                if self._mixed(mask, window):
                    break
                window = self._draw(*mask.shape[-2:])
        return dict(zip(("top", "left", "height", "width"), window, strict=True))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop the window from an image or a mask."""
        return F.crop(inpt, **params)

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        top, left = (int(torch.randint(rest + 1, ())) for rest in (height - rows, width - columns))
        return top, left, rows, columns

    def _mixed(self, mask: Tensor, window: tuple[int, int, int, int]) -> bool:
        """Whether a window has several classes, none of which dominates it."""
        top, left, rows, columns = window
        inside = mask[top : top + rows, left : left + columns]
        pixels = torch.bincount(inside[inside != IGNORE].flatten().long())
        pixels = pixels[pixels > 0]
        return len(pixels) > 1 and bool(pixels.max() / pixels.sum() < self.cat_max_ratio)


class PhotometricDistortion(v2.Transform):
    """Change brightness, contrast, saturation and hue, each with probability 0.5.

    Semantics of `PhotoMetricDistortion` of mmsegmentation 1.2.2 (from SSD: Liu et al., ECCV 2016): brightness is added,
    contrast multiplies the colours themselves, saturation multiplies S of HSV, and contrast comes second or last.
    torchvision's `RandomPhotometricDistort` differs in all four and also permutes the channels. Colours are rounded
    once, at the end, instead of after each change.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 0.1,
    ) -> None:
        """Store the ranges.

        Args:
            brightness: Largest absolute change, out of 255.
            contrast: Smallest and largest factor.
            saturation: Smallest and largest factor.
            hue: Largest rotation as a fraction of the circle (mmsegmentation's 18 of OpenCV's 180).
        """
        super().__init__()
        self.ranges = {
            "brightness": (-brightness, brightness),
            "contrast": contrast,
            "saturation": saturation,
            "hue": (-hue, hue),
        }

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the changes, their strength and their order."""
        first, later = ("brightness", "contrast"), ("saturation", "hue")
        order = (*first, *later) if torch.rand(()) < 0.5 else ("brightness", *later, "contrast")
        drawn = {name: float(torch.empty(()).uniform_(*self.ranges[name])) for name in order if torch.rand(()) < 0.5}
        return {"changes": drawn}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change a uint8 image (3, H, W) and return masks unchanged."""
        if isinstance(inpt, tv_tensors.Mask) or not params["changes"]:
            return inpt
        image = inpt.as_subclass(Tensor).float() / 255
        for name, value in params["changes"].items():
            image = _CHANGES[name](image, value)
        return tv_tensors.wrap((image * 255).round().to(torch.uint8), like=inpt)


def _saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply S of HSV, where S = (max - min) / max of the channels and V = max stays."""
    value, least = image.amax(0), image.amin(0)
    # S is at most 1, where the smallest channel is 0.
    most = value / (value - least).clamp(min=1e-6)
    return value - (value - image) * most.clamp(max=factor)


_CHANGES = {
    "brightness": lambda image, value: (image + value / 255).clamp(0, 1),
    "contrast": lambda image, value: (image * value).clamp(0, 1),
    "saturation": _saturate,
    "hue": F.adjust_hue,
}


class PadTo(v2.Transform):
    """Pad right and bottom to a size: images with zero, masks with `IGNORE`."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Store the size.

        Args:
            size: Height and width.
        """
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad an image (3, H, W) or a mask (H, W)."""
        height, width = inpt.shape[-2:]
        below, right = max(0, self.size[0] - height), max(0, self.size[1] - width)
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, right, below], fill=fill) if below or right else inpt
