"""RepAdapter: a linear bottleneck before linear layers (Luo et al., arXiv 2302.08106)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import View
from vispeft.core.units import InputUnit
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.functional import linear
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["RepAdapter", "RepAdapterUnit"]


class RepAdapterUnit(LowBit, InputUnit):
    """A dense down-projection and a grouped up-projection, without activation: ``x + s * (B (A x + a) + b)``.

    Each group of output channels reads its own group of hidden channels, as in a grouped 1x1 convolution.
    """

    matrices = ("down", "up")

    def __init__(self, width: int, middle: int, groups: int, scale: float, dropout: float, bits: int) -> None:
        """Allocate the tensors.

        Args:
            width: Channels of the layer's input.
            middle: Hidden channels.
            groups: Groups of the second layer.
            scale: Multiplier of the term.
            dropout: Fraction of the hidden channels dropped during training.
            bits: Bits per weight of the two matrices.
        """
        super().__init__()
        self.groups, self.scale, self.dropout, self.bits = groups, scale, dropout, bits
        self.identity_at_start = bits == 32
        self.down = nn.Parameter(torch.empty(middle, width))
        self.down_bias = nn.Parameter(torch.empty(middle))
        self.up = nn.Parameter(torch.empty(width, middle // groups))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: Generator) -> None:
        """Initialise the first matrix Xavier-uniform and everything else at zero (public code)."""
        nn.init.xavier_uniform_(self.down, generator=generator)
        start_above_zero(self.up, self.bits, generator)
        self.down_bias.zero_()
        self.up_bias.zero_()

    def transform_input(self, x: Tensor) -> Tensor:
        """Add the term to the layer's input."""
        hidden = F.dropout(linear(x, self.matrix("down"), self.down_bias), self.dropout, self.training)
        return x + (self.scale * linear(hidden, self._dense_up(), self.up_bias)).to(x.dtype)

    def _dense_up(self) -> Tensor:
        """Expand the grouped matrix to (width, middle), zero outside the groups."""
        return torch.block_diag(*self.matrix("up").chunk(self.groups))

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Compute ``W M`` with ``M = 1 + s * B A``."""
        up, down = self._dense_up().to(weight.dtype), self.matrix("down").to(weight.dtype)
        return weight + self.scale * ((weight @ up) @ down)

    def input_shift(self) -> Tensor:
        """Compute ``m = s * (B a + b)``, (width,)."""
        return self.scale * (self._dense_up() @ self.down_bias + self.up_bias)


@register
@dataclass(frozen=True, kw_only=True)
class RepAdapter(FewBits, DropPath, Method):
    """A linear bottleneck before the fused qkv projection and before the first MLP layer; merges exactly.

    It acts on the input of the linear layers, so it also acts on the zero padding of windows, and the merged model is
    the same function at every image size.
    """

    bottleneck: int = 8
    """Hidden channels (paper)."""
    groups: int = 2
    """Groups of the second layer (paper)."""
    scale: float = 1.0
    """Multiplier of the term; tuned per task in the paper, from 0.1 to 10."""
    variant: Literal["block", "attn"] = "block"
    """Attention and MLP (``repblock`` in the public code), or attention only (``repattn``)."""
    dropout: float = 0.1
    """Fraction of the hidden channels dropped during training (public code)."""

    name: ClassVar[str] = "repadapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.08106"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(bottleneck=8), FGVC.sized(bottleneck=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "mlp.fc1")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "bottleneck", "groups")
        check_factor(self, "scale")
        check_share(self, "dropout")
        if self.bottleneck % self.groups:
            raise ConfigError(
                f"RepAdapter(groups={self.groups}, bottleneck={self.bottleneck}): the channels in between are shared "
                "out evenly among the groups; choose a divisor."
            )

    def paper_roles(self) -> tuple[str, ...]:
        """Return the variant's roles."""
        return self.default_roles if self.variant == "block" else self.default_roles[:1]

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one bottleneck before each site."""
        for site in self.sites(view):
            if site.kind != "linear" or site.rows is not None or site.role not in _WHOLE:
                raise SiteError(
                    f"RepAdapter changes the input of one whole linear layer; {site.role!r} of {view.family} models "
                    f"is a part of one, or shares its input with others. It can stand at {', '.join(_WHOLE)} where a "
                    "model has these as one layer."
                )
            width = site.in_features
            if width % self.groups:
                raise ConfigError(f"RepAdapter(groups={self.groups}): {site.path} is {width} wide; choose a divisor.")
            build = partial(
                RepAdapterUnit, width, self.bottleneck, self.groups, self.scale, self.dropout, self.bits
            )  # fmt: skip
            yield PlanItem(site, "repadapter", build)

    def parameter_count(self, view: View) -> int:
        """Count ``D h (1 + 1 / g) + h + D`` per site."""
        h = self.bottleneck
        return sum(s.in_features * h + s.in_features * (h // self.groups) + h + s.in_features for s in self.sites(view))


_WHOLE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Roles of layers whose input no other layer reads."""
