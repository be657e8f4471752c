"""What happens to an image and its mask together: resizing, cropping, flipping, changes of colour, padding.

The steps and their numbers are those of mmsegmentation's training pipelines (`RandomResize`, `RandomCrop`,
`RandomFlip`, `PhotoMetricDistortion`). They take torchvision's `tv_tensors.Image` and `tv_tensors.Mask`, and draw from
the global generators; call them inside `vispeft.data.randomness.seeded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.data.masks import IGNORE
from vispeft.data.preprocessing import INTERPOLATIONS, Preprocessing
from vispeft.errors import ConfigError

__all__ = ["EvaluationPair", "MaskAugmentation", "MaskCrop", "PadTo", "PhotometricDistortion", "Rescale", "TrainPair"]

TRIES = 10
"""Windows that are drawn before one with too much of a class is taken (mmsegmentation's `RandomCrop`)."""


@dataclass(frozen=True, kw_only=True)
class MaskAugmentation:
    """Changes of training images and their masks, by default those of mmsegmentation."""

    crop_size: int | tuple[int, int] | None = None
    """Height and width of the crops; one number for both; None takes the size of the data module."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Images are resized, keeping their proportions, by a random factor between these two."""
    cat_max_ratio: float = 0.75
    """Another window is drawn, up to ten times, while one class fills more than this share of the labelled pixels."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are changed."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: If one of them cannot work.
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
    """Prepares a training image and its mask: uint8 (3, H, W) and (H, W) in, float32 and int64 of one size out."""

    def __init__(
        self, preprocessing: Preprocessing, augmentation: MaskAugmentation | None, short_side: int | None = None
    ) -> None:
        """Put the steps together.

        Args:
            preprocessing: Gives size, interpolation, mean and deviation.
            augmentation: What is changed; None stretches the whole image and its mask to the size.
            short_side: Shorter side of the image in pixels before it is resized by a random factor; None leaves it.
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
        # Padding comes last: zero is the mean colour then.
        self._steps = v2.Compose([*steps, preprocessing.normalise(), PadTo(size)])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare an image and its mask.

        Args:
            image: uint8 (3, H, W).
            mask: Classes or `IGNORE` (H, W).
        """
        image, mask = self._steps(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


class EvaluationPair:
    """Prepares an image for evaluation; its mask keeps its size, and scores are resized to it."""

    def __init__(self, preprocessing: Preprocessing, whole: bool = False, short_side: int | None = None) -> None:
        """Put the steps together.

        Args:
            preprocessing: Gives size, interpolation, mean and deviation.
            whole: Keep the proportions of the image; otherwise it is stretched to the size.
            short_side: With `whole`, shorter side of the image in pixels; None keeps its own size.
        """
        size = None if whole else preprocessing.size
        self._resize = Rescale(preprocessing.interpolation, size=size, short_side=short_side)
        self._steps = v2.Compose([self._resize, preprocessing.normalise()])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prepare an image.

        Args:
            image: uint8 (3, H, W).
            mask: Classes or `IGNORE` (H, W).
        """
        return self._steps(image), mask.long()

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Give height and width that an image is brought to.

        Args:
            height: Height of the image.
            width: Its width.
        """
        rows, columns = self._resize.make_params([torch.empty(0, height, width)])["size"]
        return rows, columns


# ------------------------------------------------------------------ steps


class Rescale(v2.Transform):
    """Resizes image and mask to a size, or by a random factor that keeps the proportions."""

    def __init__(
        self,
        interpolation: str,
        *,
        size: tuple[int, int] | None = None,
        short_side: int | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Keep what the new size depends on.

        Args:
            interpolation: Of images: nearest, bilinear or bicubic.
            size: Height and width; None keeps the proportions.
            short_side: Shorter side in pixels before the factor; None takes the image as it is.
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
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image (3, H, W) or a mask (H, W)."""
        size = params["size"]
        if list(inpt.shape[-2:]) == size:
            return inpt
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, size, interpolation=self.interpolation, antialias=True)
        # torchvision resizes masks by "nearest", which takes the upper left pixel and so moves them by up to half a
        # pixel against the image.
        mask = inpt.as_subclass(Tensor)[None]
        return tv_tensors.Mask(F.resize(mask, size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0])


class MaskCrop(v2.Transform):
    """Cuts a window out at a random place, if possible one that is not filled by a single class."""

    def __init__(self, size: tuple[int, int], cat_max_ratio: float = 1.0) -> None:
        """Keep the settings.

        Args:
            size: Height and width; a smaller image is taken whole in that direction.
            cat_max_ratio: Share of the labelled pixels above which another window is drawn, up to ten times.
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
        """Cut the window out of an image or a mask."""
        return F.crop(inpt, **params)

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        top, left = (int(torch.randint(rest + 1, ())) for rest in (height - rows, width - columns))
        return top, left, rows, columns

    def _mixed(self, mask: Tensor, window: tuple[int, int, int, int]) -> bool:
        """Say whether a window has several classes, none of which fills too much of it."""
        top, left, rows, columns = window
        inside = mask[top : top + rows, left : left + columns]
        pixels = torch.bincount(inside[inside != IGNORE].flatten().long())
        pixels = pixels[pixels > 0]
        return len(pixels) > 1 and bool(pixels.max() / pixels.sum() < self.cat_max_ratio)


class PhotometricDistortion(v2.Transform):
    """Changes brightness, contrast, saturation and hue, each half of the time.

    Semantics of `PhotoMetricDistortion` of mmsegmentation 1.2.2 (from SSD: Liu et al., ECCV 2016): brightness is added,
    contrast multiplies the colours themselves, saturation multiplies S of HSV, and contrast comes second or last.
    torchvision's `RandomPhotometricDistort` differs in all four and exchanges the channels too. Colours are rounded
    once, at the end, and not after each change.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 0.1,
    ) -> None:
        """Keep the ranges.

        Args:
            brightness: Most that is added or taken away, of 255.
            contrast: Smallest and largest factor.
            saturation: Smallest and largest factor.
            hue: Most that hue is turned, as a share of the circle (mmsegmentation's 18 of OpenCV's 180).
        """
        super().__init__()
        self.ranges = {
            "brightness": (-brightness, brightness),
            "contrast": contrast,
            "saturation": saturation,
            "hue": (-hue, hue),
        }

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw which changes are made, how strongly, and in which order."""
        first, later = ("brightness", "contrast"), ("saturation", "hue")
        order = (*first, *later) if torch.rand(()) < 0.5 else ("brightness", *later, "contrast")
        drawn = {name: float(torch.empty(()).uniform_(*self.ranges[name])) for name in order if torch.rand(()) < 0.5}
        return {"changes": drawn}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change a uint8 image (3, H, W); a mask is left alone."""
        if isinstance(inpt, tv_tensors.Mask) or not params["changes"]:
            return inpt
        image = inpt.as_subclass(Tensor).float() / 255
        for name, value in params["changes"].items():
            image = _CHANGES[name](image, value)
        return tv_tensors.wrap((image * 255).round().to(torch.uint8), like=inpt)


def _saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply S of HSV, where S = (max - min) / max of the channels and V = max stays."""
    value, least = image.amax(0), image.amin(0)
    # S may not pass 1, where the least channel is 0.
    most = value / (value - least).clamp(min=1e-6)
    return value - (value - image) * most.clamp(max=factor)


_CHANGES = {
    "brightness": lambda image, value: (image + value / 255).clamp(0, 1),
    "contrast": lambda image, value: (image * value).clamp(0, 1),
    "saturation": _saturate,
    "hue": F.adjust_hue,
}


class PadTo(v2.Transform):
    """Fills an image up to a size, on the right and below: with zero, and masks with `IGNORE`."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Keep the size.

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
