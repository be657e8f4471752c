"""SSF: scaling and shifting features (Lian et al., NeurIPS 2022, arXiv 2210.08823)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, nn

from vispeft.core.fields import DropPath
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FEW_IMAGES, Recipe
from vispeft.core.sites import View
from vispeft.core.units import AffineUnit

__all__ = ["SSF", "ScaleShift"]


class ScaleShift(AffineUnit):
    """One scale and one shift per channel: ``y = scale * x + shift`` (eq. 3).

    Both are drawn from normals of standard deviation 0.02 around one and zero, as in the public code, so a new adapter
    is near the identity, not equal to it.
    """

    identity_at_start = False

    def __init__(self, width: int, spread: float = 0.02) -> None:
        """Allocate the two vectors.

        Args:
            width: Number of channels.
            spread: Standard deviation of the initial values; 0 starts as the identity.
        """
        super().__init__()
        self.spread = spread
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))

    def reset(self, generator: Generator) -> None:
        """Draw the initial values of all tensors."""
        self.scale.normal_(1.0, self.spread, generator=generator)
        self.shift.normal_(0.0, self.spread, generator=generator)

    def to_identity(self) -> bool:
        """Set scales to one and shifts to zero."""
        self.scale.fill_(1.0)
        self.shift.zero_()
        return True


@register
@dataclass(frozen=True, kw_only=True)
class SSF(DropPath, Method):
    """A scale and a shift after every linear layer, norm and convolution; merges exactly.

    On a ViT they follow the patch embedding, then norm1, qkv, proj, norm2, fc1 and fc2 of each block, and the last
    norm. With average pooling, timm replaces the last norm by an identity; the pair there acts on the residual stream,
    as in the public code, and cannot be merged. Swin has the same sites and the norm of its patch embedding. SwinV2
    normalises after its branches; the sites are the same layers (form of this project). A gated MLP with two first
    layers has a pair after each (form of this project). The paper sets `drop_path` per data set, from 0 to 0.2.
    """

    patch_merging: bool = False
    """Whether to add a pair after patch merging's norm (Swin): described in the paper, inactive in the public code."""
    start: Literal["normal", "identity"] = "normal"
    """``normal`` (spread 0.02, public code) or ``identity``; with a head that starts from a probe always the latter."""

    name: ClassVar[str] = "ssf"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.08823"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=5e-3,
            weight_decay=5e-5,
            images=FEW_IMAGES,
            source="VTAB-1k: 1e-3 to 5e-2 by data set, 5e-3 for ten of 19; AdamW, 100 epochs (dongzelian/SSF e94e0e7)",
        ),
        Recipe(
            lr=1e-3, weight_decay=5e-2, layout="NLC", source="CIFAR-100 on all images, ViT (dongzelian/SSF e94e0e7)"
        ),
        Recipe(
            lr=5e-3, weight_decay=5e-2, layout="NHWC", source="CIFAR-100 on all images, Swin (dongzelian/SSF e94e0e7)"
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = (
        "patch_embed",
        "patch_embed.norm",
        "norm1",
        "attn.qkv",
        "attn.proj",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
        "final_norm",
    )
    optional_roles: ClassVar[frozenset[str]] = frozenset({"patch_embed.norm", "final_norm"})

    def paper_roles(self) -> tuple[str, ...]:
        """Return the paper's roles, with patch merging if it is switched on."""
        return (*self.default_roles, "downsample.norm") if self.patch_merging else self.default_roles

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one pair after each site."""
        spread = 0.02 if self.start == "normal" else 0.0
        for site in self.sites(view):
            yield PlanItem(site, "ssf", partial(ScaleShift, site.out_features, spread))

    def parameter_count(self, view: View) -> int:
        """Count two numbers per channel of each site: ``D (4 + 22 L)`` on a ViT with an MLP ratio of 4."""
        return sum(2 * site.out_features for site in self.sites(view))
