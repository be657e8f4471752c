"""MoS: low-rank terms that all layers of a kind assemble from shared shards (arXiv 2410.00938).

Formulas follow the public code, Forence1999/MoS at cafb8dd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, check_factor, check_share, check_whole
from vispeft.core.low_rank import Dropout
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit, SharedUnit
from vispeft.errors import ConfigError, SiteError

__all__ = ["MoS", "MoSPool", "MoSUnit"]


class MoSPool(SharedUnit):
    """The shards of one kind of layer: public rows first, then the private ones of each layer."""

    def __init__(self, rows: int, shards: int, site: Site) -> None:
        """Allocate the pools, (rows, in / shards) and (rows, out / shards).

        Args:
            rows: Rows of each pool.
            shards: Shards that make a vector.
            site: One of the layers.
        """
        super().__init__()
        self.A = nn.Parameter(torch.empty(rows, site.in_features // shards))
        self.B = nn.Parameter(torch.empty(rows, site.out_features // shards))
        self.bound = 1 / math.sqrt(site.in_features)

    def reset(self, generator: Generator) -> None:
        """Initialise A as the matrix of a linear layer of the whole width, B at zero (public code)."""
        self.A.uniform_(-self.bound, self.bound, generator=generator)
        self.B.zero_()


@dataclass(frozen=True)
class _Place:
    """One layer's part of the pools."""

    rank: int
    """Rank of its term."""
    own: int
    """Private ranks, the last of them."""
    shards: int
    public: int
    """Public rows of the pools."""
    index: int
    """Number of the layer among those of its kind."""


class MoSUnit(DeltaUnit):
    """A term whose factors are rows of the pools, chosen once: ``scale * B A``.

    The rows of A and of B are drawn independently (pair dissociation).
    """

    rows_a: Tensor
    """Rows of pool A, int32 (rank * shards,); `shards` following ones make a row of A."""
    rows_b: Tensor
    """Rows of pool B."""

    def __init__(self, site: Site, place: _Place, scale: float, dropout: float) -> None:
        """Allocate the choice of rows.

        Args:
            site: The linear layer, or a slice of one.
            place: Its part of the pools.
            scale: Multiplier of the term.
            dropout: Dropout rate during training, at the input.
        """
        super().__init__()
        self.place, self.scale, self.dropout = place, scale, Dropout(dropout)
        self.start, self.stop = site.span
        for name in ("rows_a", "rows_b"):
            self.register_buffer(name, torch.empty(place.rank * place.shards, dtype=torch.int32))

    def reset(self, generator: Generator) -> None:
        """Draw public rows without replacement; the private ones follow."""
        place = self.place
        count = (place.rank - place.own) * place.shards
        first = place.public + place.index * place.own * place.shards
        private = torch.arange(first, first + place.own * place.shards)
        for rows in (self.rows_a, self.rows_b):
            rows.copy_(torch.cat([torch.randperm(place.public, generator=generator)[:count], private]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Assemble A (rank, in) and B (rows, rank)."""
        pool = cast(MoSPool, self.lender)
        a, b = pool.A.index_select(0, self.rows_a), pool.B.index_select(0, self.rows_b)
        return a.reshape(self.place.rank, -1), b.reshape(self.place.rank, -1).t()


@register
@dataclass(frozen=True, kw_only=True)
class MoS(DropPath, Method):
    """Low-rank terms of a high rank from few trained numbers: all layers of a kind share one pool of shards.

    Every layer assembles its factors from rows of the pool that are drawn once, and from some of its own. It trains as
    many numbers as LoRA of rank ``equivalent``. In a Swin a pool serves one stage, and a stage of two blocks has little
    to share: there the rank is at most what its public rows give. It is made for deep plain models.
    """

    rank: int = 8
    """Rank of the terms, at most ``private`` and the public ranks of the pool."""
    equivalent: int = 2
    """Rank of the LoRA that trains as many numbers."""
    private: int = 1
    """Ranks that no other layer uses, below ``equivalent``; equal to it, this is LoRA of that rank."""
    shards: int = 4
    """Shards that make a vector; divides the widths of the layers."""
    alpha: float = 16.0
    """Numerator of the multiplier, over the rank (public code)."""
    dropout: float = 0.1
    """Fraction of channels dropped during training (public code)."""

    name: ClassVar[str] = "mos"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.00938"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB, FGVC)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank", "equivalent", "shards")
        check_factor(self, "alpha")
        check_share(self, "dropout")
        if not (isinstance(self.private, int) and 0 <= self.private <= self.equivalent):
            raise ConfigError(
                f"MoS(private={self.private}, equivalent={self.equivalent}): private ranks are part of the equivalent "
                "rank. Take a whole number from 0 to it."
            )
        if self.rank < self.equivalent:
            raise ConfigError(
                f"MoS(rank={self.rank}, equivalent={self.equivalent}): a rank below that of the numbers it trains "
                "leaves some unused. Take a higher rank."
            )
        if self.private == self.equivalent != self.rank:
            raise ConfigError(
                f"MoS(rank={self.rank}, private={self.private}): nothing is shared, so that the rank is "
                f"{self.equivalent}. Take fewer private ranks, or that rank."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put the pools of each kind of layer at the first one, and a term at each."""
        for sites in self._kinds(view):
            first = sites[0]
            for width in (first.in_features, first.out_features):
                if width % self.shards:
                    raise SiteError(
                        f"MoS(shards={self.shards}): {first.key} has a side of {width}, which they do not divide. Take "
                        "a divisor."
                    )
            count = len(sites) * self.shards
            public = (self.equivalent - self.private) * count
            pool = PlanItem(first, "mos_pool", partial(MoSPool, self.equivalent * count, self.shards, first))
            yield pool
            rank = min(self.rank, self.private + public // self.shards)
            for index, site in enumerate(sites):
                place = _Place(rank, self.private, self.shards, public, index)
                yield PlanItem(
                    site, "mos", partial(MoSUnit, site, place, self.alpha / rank, self.dropout), lender=pool.key
                )

    def _kinds(self, view: View) -> list[list[Site]]:
        """Group the sites by role and widths: in a Swin, by stage."""
        kinds: dict[tuple[str, int, int], list[Site]] = {}
        for site in self.sites(view):
            if site.kind != "linear" or site.role == "head":
                raise SiteError(f"MoS acts on linear layers of the backbone; {site.role!r} is none.")
            kinds.setdefault((site.role, site.in_features, site.out_features), []).append(site)
        return list(kinds.values())

    def parameter_count(self, view: View) -> int:
        """Count ``equivalent * (in + out)`` per site."""
        return sum(self.equivalent * (site.in_features + site.out_features) for site in self.sites(view))
