"""Preprocessing of images for a backbone: size, interpolation, mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.core.families import unwrap
from vispeft.errors import DataError, counted
from vispeft.storage.form import FormError, check_notes

__all__ = ["DECODINGS", "INTERPOLATIONS", "Preprocessing"]

INTERPOLATIONS = {
    "nearest": v2.InterpolationMode.NEAREST,
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
}
"""Interpolations that can resize tensors, by their name in timm's configurations."""

DECODINGS = ("full", "reduced")
"""Ways to decode a JPEG file: all of its pixels, or fewer where the resizing leaves far fewer anyway."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize to a size, scale to [0, 1], subtract a mean, divide by a standard deviation.

    Images are stretched to the size, so nothing is cut off, unless `crop_pct` is set.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Mean per channel, subtracted from values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation per channel, by which values are divided."""
    interpolation: str = "bicubic"
    """Interpolation of the resizing: nearest, bilinear or bicubic."""
    crop_pct: float | None = None
    """Fraction of a proportionally resized image that the centre crop keeps; None stretches the whole image."""
    decode: str = "full"
    """How JPEG files are decoded: ``full``, or ``reduced`` to a half, a quarter or an eighth of each side, as far as at
    least twice the size that they are resized to is left. Pixels differ a little from those of ``full``."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            DataError: If one of them is invalid.
        """
        for field in ("size", "mean", "std"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"The image size is {self.size}; give a height and a width of at least one pixel.")
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise DataError(f"{field} is {values}; give three finite numbers, one each for red, green and blue.")
        if min(self.std) <= 0:
            raise DataError(f"std is {self.std}; images are divided by it, so every number must be above zero.")
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(
                f"The interpolation is {self.interpolation!r}; the choices are {', '.join(sorted(INTERPOLATIONS))}."
            )
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct is {self.crop_pct}; give a share above 0, up to 1, or None.")
        if self.decode not in DECODINGS:
            raise DataError(f"decode is {self.decode!r}; the choices are {' and '.join(DECODINGS)}.")
        try:
            check_notes({"preprocessing": self.to_dict()})
        except FormError as error:
            raise DataError(f"An adapter's file could not hold these settings of the images: {error}") from error

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """Read the preprocessing a backbone was pretrained with.

        Args:
            model: A timm model, adapted or not.

        Returns:
            timm's configuration of the model, at the size the model was built for.

        Raises:
            DataError: If the model does not take three channels.
        """
        timm_model = unwrap(model)
        config = resolve_model_data_config(timm_model)
        channels = _channels(timm_model) or config["input_size"][0]
        if channels != 3:
            raise DataError(
                f"The backbone takes {counted(channels, 'channel')}, and images are prepared as RGB. "
                "Create it with in_chans=3 (grey images are repeated)."
            )
        # `pretrained_cfg` keeps the published size even if img_size was given at creation.
        built_for = getattr(getattr(timm_model, "patch_embed", None), "img_size", None)
        height, width = built_for or config["input_size"][1:]
        interpolation = config["interpolation"] if config["interpolation"] in INTERPOLATIONS else "bicubic"
        return cls(
            size=(int(height), int(width)),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=interpolation,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read the result of `to_dict`, as stored in ``adapter.json``.

        Args:
            values: ``input_size``, ``mean``, ``std`` and ``interpolation``.

        Raises:
            DataError: If one of them is missing or invalid.
        """
        missing = [key for key in ("input_size", "mean", "std", "interpolation") if key not in values]
        if missing:
            raise DataError(f"The preprocessing lacks {', '.join(missing)}; found {', '.join(values) or 'nothing'}.")
        return cls(
            size=tuple(values["input_size"][-2:]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=values["interpolation"],
            crop_pct=values.get("crop_pct"),
            decode=values.get("decode", "full"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values under timm's names, with ``crop_pct`` and ``decode`` only if they are set."""
        values = {
            "input_size": [3, *self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }
        cropped = {} if self.crop_pct is None else {"crop_pct": self.crop_pct}
        return {**values, **cropped, **({} if self.decode == "full" else {"decode": self.decode})}

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width that an image is resized to, or covers, before its centre is cropped."""
        share = self.crop_pct or 1.0
        return int(self.size[0] / share), int(self.size[1] / share)

    @property
    def least(self) -> tuple[int, int] | None:
        """Height and width that an image is decoded to at least; None for all of its pixels."""
        return None if self.decode == "full" else self.covered

    def scale(self) -> v2.Transform:
        """Return the proportional resizing whose centre `resize` crops."""
        return _Cover(list(self.covered), INTERPOLATIONS[self.interpolation])

    def resize(self) -> v2.Transform:
        """Return the resizing only, for uint8 tensors (..., H, W)."""
        if self.crop_pct is not None:
            return v2.Compose([self.scale(), v2.CenterCrop(list(self.size))])
        return v2.Resize(list(self.size), interpolation=INTERPOLATIONS[self.interpolation], antialias=True)

    def normalise(self) -> v2.Transform:
        """Return the normalisation of resized uint8 tensors (..., 3, H, W) to float32."""
        return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))])

    def transform(self) -> v2.Transform:
        """Return the complete preprocessing, for uint8 tensors (..., 3, H, W)."""
        return v2.Compose([self.resize(), self.normalise()])


MOST_COVERED = 16
"""Times that an image, enlarged to cover a window, may be as long as it; the middle part of longer ones is taken first,
as what is cropped from it would lie in the middle anyway, and a line of pixels would become an image of gigabytes."""


class _Cover(v2.Transform):
    """Resize an image, keeping its aspect ratio, to the smallest size that covers a given one."""

    def __init__(self, size: list[int], interpolation: v2.InterpolationMode) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize a tensor (..., H, W)."""
        height, width = inpt.shape[-2:]
        ratio = max(self.size[0] / height, self.size[1] / width)
        most = [max(1, math.ceil(MOST_COVERED * wanted / ratio)) for wanted in self.size]
        if height > most[0] or width > most[1]:
            inpt = F.center_crop(inpt, [min(height, most[0]), min(width, most[1])])
            height, width = inpt.shape[-2:]
        # The limiting side takes the size itself, as the product could be one pixel short.
        size = [max(wanted, int(length * ratio)) for wanted, length in zip(self.size, (height, width), strict=True)]
        return F.resize(inpt, size, interpolation=self.interpolation, antialias=True)


def _channels(model: nn.Module) -> int | None:
    """Return the input channels of the patch embedding, as `pretrained_cfg` keeps the published number."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    return int(projection.in_channels) if isinstance(projection, nn.Conv2d) else None
