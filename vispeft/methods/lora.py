"""LoRA: low-rank adaptation of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685), and its variants.

LoRA+ (arXiv 2402.12354), LoRA-FA (arXiv 2308.03303), PiSSA (arXiv 2404.02948) and DoRA (arXiv 2402.09353) are options
of `LoRA`.
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
from vispeft.core.units import DeltaUnit, Unit, WeightUnit, with_rows
from vispeft.errors import ConfigError, SiteError
from vispeft.methods.svfit import decompose
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["DoRAUnit", "Factored", "Factors", "LoRA", "LowRank", "PiSSAUnit"]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Configuration of the two factors of a term."""

    rank: int
    """Rank of the term."""
    scale: float
    """Multiplier of the term."""
    bits: int
    """Bits per weight."""
    freeze_a: bool
    """Whether A stays at its initial values."""
    lr_ratio: float
    """Multiple of the learning rate for B."""


class Factored(LowBit, Unit):
    """Factors A (rank, in), initialised as a linear layer's weight, and B (rows, rank), initialised at zero."""

    matrices = ("A", "B")

    def __init__(self, site: Site, factors: Factors) -> None:
        """Allocate the factors.

        Args:
            site: The layer, or a slice of one.
            factors: Their configuration.
        """
        super().__init__()
        self.scale, self.bits = factors.scale, factors.bits
        self.identity_at_start = factors.bits == 32
        if factors.lr_ratio != 1:
            self.lr_factors = {"B": factors.lr_ratio}
        self.start, self.stop = site.span
        a = torch.empty(factors.rank, site.in_features)
        if factors.freeze_a:
            self.register_buffer("A", a)  # not trained, but saved: its values are random
        else:
            self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.empty(site.out_features, factors.rank))

    def reset(self, generator: Generator) -> None:
        """Initialise A as PyTorch's linear layer (Kaiming-uniform, a = sqrt(5)), B at zero (near it if quantised)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound, generator=generator)
        start_above_zero(self.B, self.bits, generator)


class LowRank(Factored, DeltaUnit):
    """A term ``scale * B A x`` added to a linear layer's output."""

    def __init__(self, site: Site, factors: Factors, dropout: Dropout) -> None:
        """Allocate the two factors.

        Args:
            site: The linear layer, or a slice of one.
            factors: Configuration of the factors.
            dropout: Dropout rate during training, and its place.
        """
        super().__init__(site, factors)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (rows, rank)."""
        if self.bits == 32:
            return self.A, self.B
        return self.matrix("A"), self.matrix("B")


class PiSSAUnit(LowRank):
    """A term whose factors start at the weight's principal components: ``scale * (B A - B0 A0) x``.

    The authors write ``W - scale * B0 A0`` into the frozen weight; here the weight is unchanged and the term contains
    both parts, which gives the same sum. It is saved as one term of twice the rank, so loading needs no decomposition.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, site: Site, factors: Factors, dropout: Dropout) -> None:
        """Allocate the factors and their initial values.

        Args:
            site: The linear layer, or a slice of one.
            factors: Configuration of the factors.
            dropout: Dropout rate during training, and its place.
        """
        super().__init__(site, factors, dropout)
        self.place = site.key
        self.register_buffer("A0", torch.empty(self.A.shape))
        self.register_buffer("B0", torch.empty(self.B.shape))

    def prepare(self, weight: Tensor) -> None:
        """Set A0 and B0 from the weight's largest singular values, split evenly between the two."""
        rank = self.A.shape[0]
        u, s, v = decompose(weight, self.place)
        root = (s[:rank] / abs(self.scale)).sqrt()
        self.A0.copy_(root[:, None] * v[:rank])
        self.B0.copy_(u[:, :rank] * root * math.copysign(1, self.scale))

    def reset(self, generator: Generator) -> None:
        """Start at A0 and B0."""
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the whole term, (2 rank, in) and (rows, 2 rank)."""
        (a, start_a), (b, start_b) = self._pairs()
        return torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1)

    def branches(self) -> list[Branch]:
        """Return trained and initial term separately while dropout acts, which applies to the trained one only."""
        if not self.dropped().share:
            return super().branches()
        (a, start_a), (b, start_b) = self._pairs()
        start = Branch(start_a, -start_b, self.scale, self.start, self.stop)
        return [Branch(a, b, self.scale, self.start, self.stop, self.dropout), start]

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.A, self.A0), (self.B, self.B0)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors as those of a `LowRank` of twice the rank."""
        return {name: tensor.detach() for name, tensor in zip("AB", self.factors(), strict=True)}


class DoRAUnit(Factored, WeightUnit):
    """Separate length and direction of each row of a weight: ``m * (W + scale * B A) / |W + scale * B A|``."""

    lengths: Tensor
    """Lengths of the rows of the frozen weight, (rows,)."""

    def __init__(self, site: Site, factors: Factors) -> None:
        """Allocate the factors and the lengths.

        Args:
            site: The linear layer, or a slice of one.
            factors: Configuration of the factors.
        """
        super().__init__(site, factors)
        self.magnitude = nn.Parameter(torch.empty(site.out_features))
        self.register_buffer("lengths", torch.empty(site.out_features), persistent=False)

    def prepare(self, weight: Tensor) -> None:
        """Measure the rows of the frozen weight."""
        self.lengths.copy_(torch.linalg.vector_norm(weight.double(), dim=1))

    def reset(self, generator: Generator) -> None:
        """Start at the lengths of the frozen weight's rows."""
        super().reset(generator)
        self.magnitude.copy_(self.lengths)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Rescale the rows, with their current length as a constant in the gradient (section 4.3 of the paper)."""
        dtype = torch.promote_types(weight.dtype, self.B.dtype)
        rows = weight[self.start : self.stop].to(dtype)
        rows = rows + self.scale * (self.matrix("B").to(dtype) @ self.matrix("A").to(dtype))
        length = torch.linalg.vector_norm(rows.detach(), dim=1)
        # A row of zeros has no direction and stays zero.
        length = torch.where(length == 0, torch.ones_like(length), length)
        rows = (self.magnitude.to(dtype) / length)[:, None] * rows
        return with_rows(weight, self.start, rows)


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(FewBits, DropPath, Method):
    """A low-rank term added to frozen linear layers: ``W' = W + scale * B A``, with ``scale = alpha / rank``.

    Acts on queries and values by default, as in the paper. Papers define the multiplier differently: for a plain scale
    s (PETL-ViT), set ``alpha`` to ``rank * s``. Roles may be the fused ``attn.qkv`` (one pair on the whole matrix), its
    slices ``attn.q``, ``attn.k`` and ``attn.v`` (a pair each), ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2``. With fewer
    than 32 bits this is Bi-LoRA (arXiv 2307.16867). Most VTAB-1k recipes have ``drop_path=0.1``.
    """

    rank: int = 8
    """Rank; 4 to 16 in papers on vision."""
    alpha: float = 8.0
    """Numerator of the multiplier, which is 1 if ``alpha == rank``."""
    dropout: float = 0.0
    """Fraction of channels dropped during training."""
    dropout_place: Literal["input", "hidden"] = "input"
    """Place of the dropout: before the first factor (LoRA), or between the two (PETL-ViT, Bi-LoRA)."""
    rslora: bool = False
    """Divide alpha by the square root of the rank (rank-stabilised LoRA, arXiv 2312.03732)."""
    start: Literal["uniform", "pissa"] = "uniform"
    """``uniform``: A random, B zero; ``pissa``: both from the largest singular values of the frozen weight, decomposed
    once on attach (saved as plain LoRA of twice the rank)."""
    dora: bool = False
    """Train the length of each row of the weight separately from its direction (DoRA); each step then computes the
    gradient of the whole weight."""
    freeze_a: bool = False
    """Train only B (LoRA-FA)."""
    lr_ratio: float = 1.0
    """Multiple of the learning rate for B (LoRA+, which recommends 16)."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(rank=8), FGVC.sized(rank=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")

    def __post_init__(self) -> None:
        """Validate the fields."""
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
        """Return, for a PiSSA start, plain LoRA of twice the rank and the same multiplier."""
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
                raise SiteError(
                    f"LoRA acts on linear layers and convolutions of the backbone; {site.role!r} is neither."
                )
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
        """Count ``rank * (in + out)`` per site, without ``rank * in`` if A is frozen; DoRA adds ``out``."""
        seen = 0 if self.freeze_a else 1
        return sum(
            self.rank * (seen * site.columns + site.out_features) + (site.out_features if self.dora else 0)
            for site in self.sites(view)
        )
