"""Targets, outputs and labels of every kind of dense task."""

from __future__ import annotations

import torch
from torch import Tensor

from vispeft.data.dense_targets import IGNORE, DenseTarget, TargetKind

KINDS: tuple[TargetKind, ...] = ("classes", "saliency", "edge", "normals", "depth", "values")


def target(kind: TargetKind) -> DenseTarget:
    return DenseTarget(kind=kind, class_names=("a", "b", "c", "d") if kind == "classes" else ())


def batch(
    kind: TargetKind, images: int = 3, size: tuple[int, int] = (12, 10), ignored: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Make outputs in double precision, and labels of which a share is missing."""
    numbers = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(images, target(kind).channels, *size, generator=numbers, dtype=torch.double)
    missing = torch.rand(images, 1, *size, generator=numbers) < ignored
    if kind == "classes":
        return outputs, torch.randint(4, (images, *size), generator=numbers).masked_fill(missing[:, 0], IGNORE)
    labels = torch.randn(outputs.shape, generator=numbers)
    if kind == "normals":
        labels = torch.nn.functional.normalize(labels, dim=1)
    elif kind == "depth":
        labels, outputs = labels.exp(), (outputs / 2).exp()
    elif kind in ("saliency", "edge"):
        labels = (labels > 1).float()
    return outputs, labels.masked_fill(missing, IGNORE)
