"""AdaptFormer: a scaled bottleneck beside the MLP (Chen et al., NeurIPS 2022, arXiv 2205.13535)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import View
from vispeft.errors import SiteError
from vispeft.methods.adapter import Bottleneck, ParallelBottleneck, check_bottleneck

__all__ = ["AdaptFormer"]


@register
@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Method):
    """A bottleneck beside each MLP: ``x + mlp(norm2(x)) + scale * up(dropout(relu(down(x))))``.

    The branch reads the residual stream in front of the norm and is not under stochastic depth (public code). The first
    matrix starts uniform, the second at zero. With fewer than 32 bits and without biases this is Bi-AdaptFormer
    (arXiv 2307.16867); its second matrix then starts near zero.
    """

    bottleneck: int = 64
    """Channels in between; 64 in the paper, 8 in most VTAB-1k tables."""
    scale: float = 0.1
    """Multiplier of the branch, fixed (paper, main table)."""
    dropout: float = 0.1
    """Share of the middle channels dropped while training (public code)."""
    bias: bool = True
    """Whether the two layers have biases; Bi-AdaptFormer has none."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block while training; 0.1 in most VTAB-1k recipes."""
    bits: int = 32
    """Bits per weight of the two matrices (1, 2, 4, 8 or 32)."""
    head_bits: int = 32
    """Bits per weight of a classifier without a bias; 32 for a plain one."""

    name: ClassVar[str] = "adaptformer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.13535"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(bottleneck=8), FGVC.sized(bottleneck=64))
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_bottleneck(self, self.bottleneck, self.scale, self.dropout, self.bits, self.head_bits)
        for role in self.roles or ():
            if role != "mlp":
                raise SiteError(f"AdaptFormer stands beside the MLP; {role!r} was asked for. See Adapter for others.")

    def low_bit_head(self) -> int:
        """Give the bits per weight of the classifier."""
        return self.head_bits

    def stochastic_depth(self) -> float:
        """Give the rate of the last block."""
        return self.drop_path

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one bottleneck beside the MLP of each block."""
        for site in view.blocks_of(self.sites(view)):
            shape = Bottleneck(
                width=site.out_features,
                middle=self.bottleneck,
                scale=self.scale,
                bias=self.bias,
                dropout=self.dropout,
                bits=self.bits,
            )
            yield PlanItem(site, "adaptformer", partial(ParallelBottleneck, shape, "mlp", "stream"))

    def parameter_count(self, view: View) -> int:
        """Count ``2 h D + h + D`` per block, without biases ``2 h D``."""
        biases = 1 if self.bias else 0
        return sum((2 * self.bottleneck + biases) * s.out_features + biases * self.bottleneck for s in self.sites(view))
