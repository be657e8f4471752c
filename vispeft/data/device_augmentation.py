"""Augmentation of whole batches on the device that trains, behind workers that read, crop and resize images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vispeft.data.augmentation import Augmentation, cropped
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.randomness import draw_seed, seeded
from vispeft.errors import ConfigError

__all__ = ["DeviceAugmentation", "UnfinishedBatch"]

AREA, ASPECT, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
"""Share of the image and aspect ratio of an erased rectangle, and how many are drawn until one fits: those of timm's
`RandomErasing`, whose first two are those of Zhong et al. (AAAI 2020) but for the largest share, 0.4 there."""
MIX = 0x6D6978
"""Salt that separates the random numbers of a batch from those of its first image."""


class UnfinishedBatch(NamedTuple):
    """Images of a batch before flips, normalisation, erasing and mixing, with what was drawn for them."""

    images: Tensor
    """uint8 (B, 3, H, W), of the backbone's size."""
    targets: Tensor
    """One row per image."""
    flips: Tensor
    """Whether each image is flipped (B,)."""
    boxes: Tensor
    """Top, left, bottom and right of the rectangle that is erased in each (B, 4); all zero for none."""
    key: tuple[int, int]
    """Epoch and position of the first image, by which noise and mixing are drawn."""


class DeviceAugmentation:
    """Steps of a training batch: `crop` and `draw` for each image where it is read, `finish` on the device.

    Crops draw the numbers they draw without it; the others differ.
    """

    def __init__(
        self, preprocessing: Preprocessing, augmentation: Augmentation, mixer: Mixup | None = None, seed: int = 0
    ) -> None:
        """Compose the steps.

        Args:
            preprocessing: Preprocessing of every image.
            augmentation: Augmentation of training images.
            mixer: timm's mixup.
            seed: Seed of noise and mixing.

        Raises:
            ConfigError: If a step works on single images only.
        """
        if augmentation.rand_augment is not None:
            raise ConfigError(
                "Augmentation(on_device=True): rand_augment works on single images, on the CPU. Leave one of them out."
            )
        self.crop: v2.Transform = cropped(preprocessing, augmentation)
        self._augmentation, self._size = augmentation, preprocessing.size
        self._preprocessing, self._mixer, self._seed = preprocessing, mixer, seed
        self._moments: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def draw(self) -> tuple[bool, list[int]]:
        """Draw whether an image is flipped, and the rectangle that is erased, from the global generator."""
        flip = bool(torch.rand(()) < self._augmentation.flip)
        erased = bool(torch.rand(()) < self._augmentation.erase)
        return flip, self._box() if erased else [0, 0, 0, 0]

    def _box(self) -> list[int]:
        height, width = self._size
        for _ in range(TRIES):
            area = height * width * float(torch.empty(()).uniform_(*AREA))
            aspect = math.exp(float(torch.empty(()).uniform_(*map(math.log, ASPECT))))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = (int(torch.randint(rest + 1, ())) for rest in (height - rows, width - columns))
                return [top, left, top + rows, left + columns]
        return [0, 0, 0, 0]

    def finish(self, batch: UnfinishedBatch) -> tuple[Tensor, Tensor]:
        """Flip, normalise, erase and mix a batch, on its device and, from the second batch on, without waiting for it.

        Args:
            batch: The batch.

        Returns:
            Normalised images (B, 3, H, W), and targets, soft ones if images are mixed.
        """
        images, targets = batch.images, batch.targets
        if self._augmentation.flip:
            images = torch.where(batch.flips.view(-1, 1, 1, 1), images.flip(-1), images)
        images = self._normalised(images)
        if self._augmentation.erase:
            images = torch.where(self._inside(batch.boxes), self._noise(images, batch.key), images)
        if self._mixer is not None:
            with seeded(self._seed, MIX, *batch.key):
                images, targets = self._mixer(images, targets)
        return images, targets

    def _normalised(self, images: Tensor) -> Tensor:
        """Compute `Preprocessing.normalise` of uint8 images, which would copy mean and deviation for each batch."""
        if images.device not in self._moments:
            moments = (self._preprocessing.mean, self._preprocessing.std)
            mean, std = (torch.tensor(part, device=images.device).view(-1, 1, 1) for part in moments)
            self._moments[images.device] = mean, std
        mean, std = self._moments[images.device]
        return F.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)

    def _inside(self, boxes: Tensor) -> Tensor:
        """Mark the pixels (B, 1, H, W) inside of the rectangles."""
        top, left, bottom, right = (part.view(-1, 1, 1, 1) for part in boxes.unbind(1))
        rows = torch.arange(self._size[0], device=boxes.device).view(-1, 1)
        columns = torch.arange(self._size[1], device=boxes.device)
        return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)

    def _noise(self, images: Tensor, key: tuple[int, int]) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(draw_seed(self._seed, *key))
        return torch.randn(images.shape, generator=generator, device=images.device)
