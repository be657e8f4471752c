"""AdaptFormer: a scaled bottleneck parallel to the MLP (Chen et al., NeurIPS 2022, arXiv 2205.13535)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_roles_in, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import View
from vispeft.methods.adapter import Bottleneck, ParallelBottleneck

__all__ = ["AdaptFormer"]


@register
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(FewBits, DropPath, Method):
    """A bottleneck parallel to each MLP: ``x + mlp(norm2(x)) + scale * up(dropout(relu(down(x))))``.

    The branch reads the residual stream before the norm, and stochastic depth does not drop it (public code). The first
    matrix starts uniform, the second at zero. With fewer than 32 bits and without biases this is Bi-AdaptFormer
    (arXiv 2307.16867); its second matrix then starts near zero. Most VTAB-1k recipes have ``drop_path=0.1``.
    """

    bottleneck: int = 64
    """Hidden channels; 64 in the paper, 8 in most VTAB-1k tables."""
    scale: float = 0.1
    """Multiplier of the branch, not learned (paper, main table)."""
    dropout: float = 0.1
    """Fraction of the hidden channels dropped during training (public code)."""
    bias: bool = True
    """Whether the two layers have biases; Bi-AdaptFormer has none."""

    name: ClassVar[str] = "adaptformer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.13535"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(bottleneck=8), FGVC.sized(bottleneck=64))
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck")
        check_factor(self, "scale")
        check_share(self, "dropout")
        check_roles_in(self, ("mlp",), "See Adapter for others.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one bottleneck parallel to the MLP of each block."""
        for site in view.blocks_of(self.sites(view)):
            shape = self.shape(site.out_features)
            yield PlanItem(site, "adaptformer", partial(ParallelBottleneck, shape, "mlp", "stream"))

    def shape(self, width: int) -> Bottleneck:
        """Return the configuration of a bottleneck.

        Args:
            width: Channels of the stream.
        """
        return Bottleneck(
            width=width,
            middle=self.bottleneck,
            scale=self.scale,
            bias=self.bias,
            dropout=self.dropout,
            bits=self.bits,
        )

    def parameter_count(self, view: View) -> int:
        """Count ``2 h D + h + D`` per block (``2 h D`` without biases)."""
        biases = 1 if self.bias else 0
        return sum((2 * self.bottleneck + biases) * s.out_features + biases * self.bottleneck for s in self.sites(view))
