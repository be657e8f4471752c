"""Data of several dense tasks that need no files: squares, their depth, their edges and the slope of the ground."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.base import BatchSplit, ImageData, Index
from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.data.preprocessing import Preprocessing

TARGETS = {
    "parts": DenseTarget(kind="classes", class_names=("ground", "square"), palette=((0, 0, 0), (255, 0, 0))),
    "depth": DenseTarget(kind="depth"),
    "sal": DenseTarget(kind="saliency"),
    "slope": DenseTarget(kind="normals"),
}


def squares(count: int, side: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw normalised images (N, 3, side, side) of one square each, and the labels of all tasks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator) * 0.1
    labels = {
        "parts": torch.zeros(count, side, side, dtype=torch.long),
        "depth": torch.full((count, 1, side, side), 5.0),
        "sal": torch.zeros(count, 1, side, side),
        "slope": torch.zeros(count, 3, side, side),
    }
    labels["slope"][:, 2] = 1
    half = side // 2
    for index, (top, left) in enumerate(torch.randint(0, half, (count, 2), generator=generator).tolist()):
        inside = (index, slice(None), slice(top, top + half), slice(left, left + half))
        images[inside] += 2
        labels["depth"][inside], labels["sal"][inside] = 2.0, 1.0
        labels["parts"][index, top : top + half, left : left + half] = 1
        labels["slope"][inside] = torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1)
    for values in labels.values():
        values[..., :2, :] = IGNORE
    return images, labels


class ToySplit(BatchSplit):
    """Images and labels in memory."""

    def __init__(self, images: Tensor, labels: dict[str, Tensor]) -> None:
        """Store the tensors."""
        self.images, self.labels, self.targets = images, labels, torch.arange(len(images))

    def batch(self, indices: list[Index]) -> tuple[Tensor, Any]:
        """Take some images with their labels."""
        order = torch.tensor([index for _, index in indices])
        return self.images[order], {task: values[order] for task, values in self.labels.items()}


class ToyTasks(ImageData):
    """Squares with labels of four tasks."""

    def __init__(self, *, tasks: list[str] | None = None, count: int = 8, **settings: Any) -> None:
        """Choose the tasks."""
        super().__init__(**settings)
        self.target = "tasks"
        self.targets = {task: TARGETS[task] for task in tasks or TARGETS}
        self.loss_weights = {"depth": 2.0}
        self.count = count

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.targets)

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Draw the splits."""
        splits = {}
        for seed, name in enumerate(("train", "validation", "test")):
            images, labels = squares(self.count, preprocessing.size[0], seed)
            splits[name] = ToySplit(images, {task: labels[task] for task in self.targets})
        return splits
