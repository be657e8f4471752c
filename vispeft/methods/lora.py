"""LoRA: low-rank adaptation of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685), and what was built on it.

LoRA+ (arXiv 2402.12354), LoRA-FA (arXiv 2308.03303), PiSSA (arXiv 2404.02948) and DoRA (arXiv 2402.09353) are fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_share, check_whole
from vispeft.core.low_rank import Branch, Dropout
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit, Unit, WeightUnit
from vispeft.errors import ConfigError, SiteError
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["DoRAUnit", "LoRA", "LowRank", "PiSSAUnit"]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What the two factors of a term look like."""

    rank: int
    """Width in between."""
    scale: float
    """Multiplier of the term."""
    bits: int
    """Bits per weight."""
    freeze_a: bool
    """Whether A keeps its start values."""
    lr_ratio: float
    """Multiple of the learning rate for B."""


class _Factored(LowBit, Unit):
    """A (rank, in), uniform as a linear layer's weight, and B (rows, rank), zero."""

    matrices = ("A", "B")

    def __init__(self, site: Site, factors: Factors) -> None:
        super().__init__()
        self.scale, self.bits = factors.scale, factors.bits
        self.identity_at_start = factors.bits == 32
        if factors.lr_ratio != 1:
            self.lr_factors = {"B": factors.lr_ratio}
        self.start = 0 if site.rows is None else site.rows.start
        self.stop = site.out_features if site.rows is None else site.rows.stop
        a = torch.empty(factors.rank, site.in_features)
        if factors.freeze_a:
            self.register_buffer("A", a)  # does not train and is in files: its start values are random
        else:
            self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.empty(site.out_features, factors.rank))

    def reset(self, generator: Generator) -> None:
        """Draw A as PyTorch draws a linear layer (Kaiming-uniform with a = sqrt(5)); set B to zero, or near it."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound, generator=generator)
        start_above_zero(self.B, self.bits, generator)


class LowRank(_Factored, DeltaUnit):
    """A term ``scale * B A x`` beside a linear layer."""

    def __init__(self, site: Site, factors: Factors, dropout: Dropout) -> None:
        """Make room for the two factors.

        Args:
            site: The linear layer, or the slice of one.
            factors: What the factors look like.
            dropout: What is dropped while training.
        """
        super().__init__(site, factors)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give A (rank, in) and B (rows, rank)."""
        return self.matrix("A"), self.matrix("B")


class PiSSAUnit(LowRank):
    """A term that starts as the layer's own largest directions, less these: ``scale * (B A - B0 A0) x``.

    The authors write ``W - scale * B0 A0`` into the frozen weight; here the weight stays as it is and the term carries
    both, which is the same sum. A file holds it as one term of twice the rank, which needs no decomposition to load.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, factors: Factors, dropout: Dropout) -> None:
        """Make room for the factors and their start values.

        Args:
            site: The linear layer, or the slice of one.
            factors: Shape of the factors.
            dropout: Dropout while training.
        """
        super().__init__(site, factors, dropout)
        self.register_buffer("A0", torch.empty(self.A.shape))
        self.register_buffer("B0", torch.empty(self.B.shape))

    def prepare(self, weight: Tensor) -> None:
        """Share out the largest singular values of the weight evenly between both factors."""
        rank = self.A.shape[0]
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        root = (s[:rank] / abs(self.scale)).sqrt()
        self.A0.copy_(root[:, None] * v[:rank])
        self.B0.copy_(u[:, :rank] * root * math.copysign(1, self.scale))

    def reset(self, generator: Generator) -> None:
        """Start from the singular values."""
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give (2 rank, in) and (rows, 2 rank)."""
        (a, start_a), (b, start_b) = self._pairs()
        return torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1)

    def branches(self) -> list[Branch]:
        """Give what trains and what it started from apart while dropout acts, which leaves the latter alone."""
        if not self.dropped().share:
            return super().branches()
        (a, start_a), (b, start_b) = self._pairs()
        start = Branch(start_a, -start_b, self.scale, self.start, self.stop)
        return [Branch(a, b, self.scale, self.start, self.stop, self.dropout), start]

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.A, self.A0), (self.B, self.B0)

    def file_tensors(self) -> dict[str, Tensor]:
        """Give the tensors of a `LowRank` of twice the rank."""
        return {name: tensor.detach() for name, tensor in zip("AB", self.factors(), strict=True)}


class DoRAUnit(_Factored, WeightUnit):
    """Length and direction of each row of a weight apart: ``m * (W + scale * B A) / |W + scale * B A|``."""

    lengths: Tensor
    """Lengths of the rows of the frozen weight, (rows,)."""

    def __init__(self, site: Site, factors: Factors) -> None:
        """Make room for the factors and the lengths.

        Args:
            site: The linear layer, or the slice of one.
            factors: Shape of the factors.
        """
        super().__init__(site, factors)
        self.magnitude = nn.Parameter(torch.empty(site.out_features))
        self.register_buffer("lengths", torch.empty(site.out_features), persistent=False)

    def prepare(self, weight: Tensor) -> None:
        """Measure the rows of the frozen weight."""
        self.lengths.copy_(torch.linalg.vector_norm(weight.double(), dim=1))

    def reset(self, generator: Generator) -> None:
        """Start with the lengths the frozen weight has."""
        super().reset(generator)
        self.magnitude.copy_(self.lengths)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Rescale the rows; their length counts as a constant in the gradient (section 4.3 of the paper)."""
        dtype = torch.promote_types(weight.dtype, self.B.dtype)
        rows = weight[self.start : self.stop].to(dtype)
        rows = rows + self.scale * (self.matrix("B").to(dtype) @ self.matrix("A").to(dtype))
        length = torch.linalg.vector_norm(rows.detach(), dim=1)
        # A row of zeros has no direction and stays one.
        length = torch.where(length == 0, torch.ones_like(length), length)
        rows = (self.magnitude.to(dtype) / length)[:, None] * rows
        return torch.cat([weight[: self.start].to(dtype), rows, weight[self.stop :].to(dtype)])


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(FewBits, DropPath, Method):
    """A low-rank term beside frozen linear layers: ``W' = W + scale * B A``, with ``scale = alpha / rank``.

    By default on queries and values, as in the paper. Papers differ in the multiplier: set ``alpha`` to ``rank * s``
    for a plain scale s (PETL-ViT). Roles may be the fused ``attn.qkv`` (one pair on the whole matrix), its slices
    ``attn.q``, ``attn.k`` and ``attn.v`` (a pair each), ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2``. With fewer than 32
    bits this is Bi-LoRA (arXiv 2307.16867). Most VTAB-1k recipes have ``drop_path=0.1``.
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
    start: Literal["uniform", "pissa"] = "uniform"
    """``uniform``: A random, B zero; ``pissa``: both from the largest singular values of the frozen weight, which needs
    its decomposition once (files hold the outcome as plain LoRA of twice the rank)."""
    dora: bool = False
    """Train the length of each row of the weight beside its direction (DoRA); a step then computes the gradient of the
    whole weight."""
    freeze_a: bool = False
    """Train B alone (LoRA-FA)."""
    lr_ratio: float = 1.0
    """Multiple of the learning rate for B (LoRA+, which recommends 16)."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(rank=8), FGVC.sized(rank=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_whole(self, "rank")
        check_factor(self, "alpha")
        check_share(self, "dropout")
        if not (math.isfinite(self.lr_ratio) and self.lr_ratio > 0):
            raise ConfigError(f"LoRA(lr_ratio={self.lr_ratio}): a number above 0 is needed.")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that contradict each other."""
        if self.dora and self.dropout > 0:
            raise ConfigError(
                f"LoRA(dora=True, dropout={self.dropout}): DoRA changes the weight as a whole, which dropout inside a "
                "term cannot follow. Set dropout=0."
            )
        if self.start == "pissa" and (self.dora or self.freeze_a or self.bits < 32):
            raise ConfigError(
                "LoRA(start='pissa') takes both factors from the frozen weight and trains them in full precision; it "
                f"does not go together with dora={self.dora}, freeze_a={self.freeze_a}, bits={self.bits}."
            )
        if self.freeze_a and self.bits < 32:
            raise ConfigError(
                f"LoRA(freeze_a=True, bits={self.bits}): a frozen factor is stored as it is; take bits=32."
            )

    def file_method(self) -> Method:
        """Give plain LoRA of twice the rank and the same multiplier for what started from singular values."""
        if self.start != "pissa":
            return self
        return dataclasses.replace(
            self, start="uniform", rank=2 * self.rank, alpha=self.alpha * (math.sqrt(2) if self.rslora else 2)
        )

    @property
    def scale(self) -> float:
        """The multiplier of the term."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one pair of factors at each site."""
        for site in self.sites(view):
            if site.kind not in ("linear", "conv") or site.role == "head":
                raise SiteError(f"LoRA acts on linear layers and convolutions of the backbone; {site.role!r} is none.")
            yield PlanItem(site, "lora", self._builder(dataclasses.replace(site, in_features=site.columns)))

    def _builder(self, site: Site) -> Callable[[], Unit]:
        factors = Factors(
            rank=self.rank, scale=self.scale, bits=self.bits, freeze_a=self.freeze_a, lr_ratio=self.lr_ratio
        )
        dropout = Dropout(self.dropout, self.dropout_place)
        if self.dora:
            return partial(DoRAUnit, site, factors)
        if self.start == "uniform":
            return partial(LowRank, site, factors, dropout)
        if self.rank > min(site.in_features, site.out_features):
            raise ConfigError(
                f"LoRA(start='pissa', rank={self.rank}): {site.key} has {min(site.in_features, site.out_features)} "
                "singular values. Choose a lower rank."
            )
        return partial(PiSSAUnit, site, factors, dropout)

    def parameter_count(self, view: View) -> int:
        """Count ``rank * (in + out)`` per site, without ``rank * in`` where A is frozen; DoRA adds ``out``."""
        seen = 0 if self.freeze_a else 1
        return sum(
            self.rank * (seen * site.columns + site.out_features) + (site.out_features if self.dora else 0)
            for site in self.sites(view)
        )
