"""GPS: gradients of a contrastive loss choose what trains (Zhang et al., CVPR 2024, arXiv 2312.10136).

Formulas follow the public code (FightingFighting/GPS at 72e0c31). `vispeft.methods.sparse` uses them as a support.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vispeft.core.sites import View

__all__ = ["contrastive_loss", "is_whole", "other_view"]

TEMPERATURE = 0.07
"""Public code, which follows SupCon (Khosla et al., arXiv 2004.11362)."""
AREA = 0.25
"""Smallest share of an image that `other_view` shows."""
FROZEN = ("norm", "pos_embed", "cls_token")
WHOLE = ("bias", "gamma")
"""Parts of the names of parameters that stay frozen, and of others that train as a whole (public code)."""


def contrastive_loss(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Compute the supervised contrastive loss of two views: features of a class are pulled together.

    With unit features z and temperature t it is, for each feature i, the mean over all others j of its class of
    ``-log(exp(z_i z_j / t) / sum_(k != i) exp(z_i z_k / t))``; of these the mean over i.

    Args:
        features: (2 B, D), those of the first views, then those of the second ones in the same order.
        labels: Class numbers, int64 (B,).
        temperature: Divisor of the cosines.

    Returns:
        A scalar.
    """
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    classes = labels.repeat(2)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    scores = (unit @ unit.t() / temperature).masked_fill(itself, -torch.inf)
    logs = scores.log_softmax(1).masked_fill(itself, 0)
    same = (classes[:, None] == classes) & ~itself  # the other view is one of them at least
    return -((logs * same).sum(1) / same.sum(1)).mean()


def other_view(images: Tensor, generator: Generator) -> Tensor:
    """Show a part of each image in full size, half of them mirrored.

    Args:
        images: (B, C, H, W).
        generator: Source of the draws, on the CPU.

    Returns:
        The same shape.
    """
    count = len(images)
    side = (AREA + (1 - AREA) * torch.rand(count, generator=generator)).sqrt()
    centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - side[:, None])
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = side * mirror, side, centre
    grid = F.affine_grid(maps, [count, 1, *images.shape[2:]], align_corners=False)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.grid_sample(wide, grid.to(wide), padding_mode="reflection", align_corners=False).to(images.dtype)


def is_whole(view: View, inside: Callable[[str], bool]) -> Callable[[str, str], bool]:
    """Build the test of whether GPS trains a parameter as a whole, by the path of its module and its name.

    These are biases outside of norms, scales of LayerScale and, as their names hold "bias", Swin's position tables.

    Args:
        view: The model's description.
        inside: Whether a module is one of those that may train.
    """

    def wanted(path: str, name: str) -> bool:
        full = f"{path}.{name}"
        return inside(path) and any(part in full for part in WHOLE) and not any(part in full for part in FROZEN)

    return wanted
