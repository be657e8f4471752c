"""LoRA: low-rank adaptation of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.adapters.functional import linear
from vispeft.adapters.method import Method, PlanItem, register
from vispeft.adapters.quantize import check_bits, start_above_zero
from vispeft.adapters.sites import Site, View
from vispeft.adapters.units import DeltaUnit
from vispeft.errors import ConfigError, SiteError

__all__ = ["LoRA", "LowRank"]


@dataclass(frozen=True)
class Dropout:
    """What a low-rank term drops while training."""

    share: float
    """Share of channels."""
    place: str
    """``input`` of the term, or ``hidden``: what stands between its two factors."""


class LowRank(DeltaUnit):
    """A term ``scale * B A x``: A (rank, in) uniform as a linear layer's weight, B (rows, rank) zero."""

    matrices = ("A", "B")

    def __init__(self, site: Site, rank: int, scale: float, dropout: Dropout, bits: int) -> None:
        """Make room for the two factors.

        Args:
            site: The linear layer, or the slice of one.
            rank: Width in between.
            scale: Multiplier of the term.
            dropout: What is dropped while training.
            bits: Bits per weight of the two factors.
        """
        super().__init__()
        self.scale, self.dropout, self.bits = scale, dropout, bits
        self.identity_at_start = bits == 32
        self.start = 0 if site.rows is None else site.rows.start
        self.stop = site.out_features if site.rows is None else site.rows.stop
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, rank))

    def reset(self, generator: Generator) -> None:
        """Draw A as PyTorch draws a linear layer (Kaiming-uniform with a = sqrt(5)); set B to zero, or near it."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound, generator=generator)
        start_above_zero(self.B, self.bits, generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give A (rank, in) and B (rows, rank)."""
        return self.matrix("A"), self.matrix("B")

    def drops(self) -> bool:
        """Tell whether dropout is on."""
        return self.training and self.dropout.share > 0

    def term(self, x: Tensor) -> Tensor:
        """Compute the term by itself, with dropout."""
        share, on_input = self.dropout.share, self.dropout.place == "input"
        x = F.dropout(x, share, self.training and on_input)
        hidden = F.dropout(linear(x, self.matrix("A")), share, self.training and not on_input)
        return linear(hidden, self.matrix("B")) * self.scale


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A low-rank term beside frozen linear layers: ``W' = W + scale * B A``, with ``scale = alpha / rank``.

    By default on queries and values, as in the paper. Papers differ in the multiplier: set ``alpha`` to ``rank * s``
    for a plain scale s (PETL-ViT). Roles may be the fused ``attn.qkv`` (one pair on the whole matrix), its slices
    ``attn.q``, ``attn.k`` and ``attn.v`` (a pair each), ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2``.
    """

    rank: int = 8
    """Width in between; the paper's vision users take 4 to 16."""
    alpha: float = 8.0
    """Numerator of the multiplier; equal to the rank it gives 1."""
    dropout: float = 0.0
    """Share of channels dropped while training."""
    dropout_place: Literal["input", "hidden"] = "input"
    """Where: in front of the first factor (LoRA), or between the two (PETL-ViT, Bi-LoRA)."""
    rslora: bool = False
    """Divide alpha by the root of the rank (rank-stabilised LoRA, arXiv 2312.03732)."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block while training; 0.1 in most VTAB-1k recipes."""
    bits: int = 32
    """Bits per weight of the two factors (1, 2, 4, 8 or 32); below 32 this is Bi-LoRA (arXiv 2307.16867)."""
    head_bits: int = 32
    """Bits per weight of a classifier without a bias; 32 for a plain one."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"LoRA(rank={self.rank}): a rank of at least 1 is needed.")
        if not (math.isfinite(self.alpha) and self.alpha != 0):
            raise ConfigError(f"LoRA(alpha={self.alpha}): a number other than zero is needed.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA(dropout={self.dropout}): a share from 0 up to, not including, 1 is needed.")

        if self.dropout_place not in ("input", "hidden"):
            raise ConfigError(f"LoRA(dropout_place={self.dropout_place!r}): choose 'input' or 'hidden'.")
        check_bits("LoRA", self.bits, self.head_bits)

    def low_bit_head(self) -> int:
        """Give the bits per weight of the classifier."""
        return self.head_bits

    def stochastic_depth(self) -> float:
        """Give the rate of the last block."""
        return self.drop_path

    @property
    def scale(self) -> float:
        """The multiplier of the term."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one pair of factors at each site."""
        for site in self.sites(view):
            if site.kind != "linear" or site.role == "head":
                raise SiteError(f"LoRA acts on linear layers of the backbone; {site.role!r} is none.")
            dropout = Dropout(self.dropout, self.dropout_place)
            yield PlanItem(site, "lora", partial(LowRank, site, self.rank, self.scale, dropout, self.bits))

    def parameter_count(self, view: View) -> int:
        """Count ``rank * (in + out)`` per site."""
        return sum(self.rank * (site.in_features + site.out_features) for site in self.sites(view))
