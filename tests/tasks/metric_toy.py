"""A small set of images for metric learning, in memory, with the interface of the readers."""

from __future__ import annotations

import torch

from vispeft.data.base import ImageData, MemorySplit
from vispeft.data.per_class import PerClassSampler

CLASSES, IMAGES = 9, 8
"""Classes, a third of them in each split, and images of each."""


class RoledSplit(MemorySplit):
    """A split whose images are both query and gallery."""

    def batch(self, indices):
        images, labels = super().batch(indices)
        return images, labels, torch.zeros_like(labels)


class ToyMetricData(ImageData):
    """Nine patterns under noise; the classes of the splits are disjoint."""

    target = "embedding"

    def __init__(self, *, images_per_class: int = 4, noise: float = 0.35, batch_size: int = 8, **settings):
        super().__init__(batch_size=batch_size, **settings)
        self.images_per_class, self.noise = images_per_class, noise

    @property
    def class_names(self):
        return tuple(f"pattern{number}" for number in range(CLASSES // 3))

    def load(self, preprocessing):
        random = torch.Generator().manual_seed(1)
        patterns = torch.rand(CLASSES, 1, 3, *preprocessing.size, generator=random)
        noise = torch.rand(CLASSES, IMAGES, 3, *preprocessing.size, generator=random) - 0.5
        images = ((patterns + 2 * self.noise * noise).clamp(0, 1) * 255).to(torch.uint8)
        third, splits = CLASSES // 3, {}
        for place, name in enumerate(("train", "validation", "test")):
            some = slice(place * third, (place + 1) * third)
            labels = torch.arange(CLASSES)[some].repeat_interleave(IMAGES)
            kind = MemorySplit if name == "train" else RoledSplit
            splits[name] = kind(images[some].flatten(0, 1), labels, preprocessing)
        return splits

    def _sampler(self, length, start):
        labels = self.split("train").targets
        return PerClassSampler(labels, self.images_per_class, self.batch_together, self.seed, start)
