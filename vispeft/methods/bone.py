"""Bone: a change of a weight by one small matrix that all blocks of the weight share (arXiv 2409.15371).

The authors renamed its two forms MiSS (matrix shard sharing) and BAT (block affine transformation). Formulas follow
release 0.21.2 of Hugging Face peft (`MissConfig`), where both are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit, Unit, WeightUnit, with_rows
from vispeft.errors import ConfigError, SiteError
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["BATUnit", "Bone", "MiSSUnit"]

TOY = Recipe(
    lr=3e-3,
    weight_decay=0.0,
    source="a first try: of the order of LoRA's, and unstable above 1e-2; the paper has language models alone",
    fields={"rank": 8},
)


class MiSSUnit(LowBit, DeltaUnit):
    """A low-rank term whose first factor sums groups of ``rank`` neighbouring input channels: ``scale * D^T S x``.

    S (rank, in) is a row of identity matrices, cut off at the last channel, as the authors pad the input with zeros.
    """

    matrices = ("D",)

    groups: Tensor
    """S, (rank, in)."""

    def __init__(self, site: Site, rank: int, mini: int | None, scale: float, bits: int) -> None:
        """Allocate D (rank, rows), or (rank, mini).

        Args:
            site: The linear layer, or a slice of one.
            rank: Input channels of a group.
            mini: Number of rows of the layer that repeat; None for all.
            scale: Multiplier of the term.
            bits: Bits per weight of D.
        """
        super().__init__()
        self.scale, self.bits, self.identity_at_start = scale, bits, bits == 32
        self.start, self.stop = site.span
        self.repeats = 1 if mini is None else site.out_features // mini
        self.D = nn.Parameter(torch.empty(rank, site.out_features if mini is None else mini))
        sums = torch.eye(rank).repeat(1, -(-site.in_features // rank))[:, : site.in_features]
        self.register_buffer("groups", sums.contiguous(), persistent=False)

    def reset(self, generator: Generator) -> None:
        """Start at zero (near it if quantised)."""
        start_above_zero(self.D, self.bits, generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return S (rank, in) and the transpose of D (rows, rank), repeated down the rows in the mini form."""
        return self.groups, self.matrix("D").repeat(1, self.repeats).t()


class BATUnit(LowBit, WeightUnit):
    """A change of each square block of a weight: ``W[a, b] + scale * (W[a, b] B[a] + B[a])``, B by rows of blocks."""

    matrices = ("B",)

    def __init__(self, site: Site, rank: int, scale: float, bits: int) -> None:
        """Allocate B (rows / rank, rank, rank).

        Args:
            site: The linear layer, or a slice of one.
            rank: Side of a block; divides both sides of the weight.
            scale: Multiplier of the change.
            bits: Bits per weight of B.
        """
        super().__init__()
        self.scale, self.bits, self.identity_at_start = scale, bits, bits == 32
        self.start, self.stop = site.span
        self.B = nn.Parameter(torch.empty(site.out_features // rank, rank, rank))

    def reset(self, generator: Generator) -> None:
        """Start at zero (near it if quantised)."""
        start_above_zero(self.B, self.bits, generator)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Change the rows of (out, in)."""
        b = self.matrix("B")
        dtype = torch.promote_types(weight.dtype, b.dtype)
        b, rows = b.to(dtype), weight[self.start : self.stop].to(dtype)
        count, rank, _ = b.shape
        # A row of blocks holds its columns in the order (row, block, column), so that one product serves all blocks.
        products = torch.bmm(rows.reshape(count, -1, rank), b).view(count, rank, -1, rank)
        rows = rows + self.scale * (products + b[:, :, None, :]).reshape(rows.shape)
        return with_rows(weight, self.start, rows)


@register
@dataclass(frozen=True, kw_only=True)
class Bone(FewBits, DropPath, Method):
    """One small trained matrix at each linear layer, which all blocks of the frozen weight share.

    MiSS adds the same columns to every group of ``rank`` input channels; it costs what LoRA without its first factor
    costs. BAT also multiplies each block of the weight, and so computes the whole weight in every step. The rank of
    the update is at most ``rank``. The sum over the groups grows with their number, and nothing divides it, so wide
    layers take lower rates than LoRA's; 1e-2 was unstable in a first trial on a layer of eight groups.
    """

    rank: int = 16
    """Side of a block; 64 for language models in the paper, 8 to 16 for the widths of vision models."""
    variant: Literal["miss", "bat"] = "miss"
    """A sum over groups of input channels (``miss``), or a change guided by the weight (``bat``)."""
    mini: int | None = None
    """Rows of the update that repeat down the layer (the mini form of MiSS); None for no repetition."""
    scale: float = 1.0
    """Multiplier of the update; 1 in the public code."""

    name: ClassVar[str] = "bone"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.15371"
    recipes: ClassVar[tuple[Recipe, ...]] = (TOY,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank", "mini")
        check_factor(self, "scale")
        if self.mini is not None and self.variant == "bat":
            raise ConfigError(
                f"Bone(variant='bat', mini={self.mini}): the mini form repeats the matrix of MiSS. Leave mini out."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one matrix at each site."""
        for site in self.sites(view):
            self._check(site)
            yield PlanItem(site, "bone", self._builder(site))

    def _builder(self, site: Site) -> Callable[[], Unit]:
        if self.variant == "bat":
            return partial(BATUnit, site, self.rank, self.scale, self.bits)
        return partial(MiSSUnit, site, self.rank, self.mini, self.scale, self.bits)

    def _check(self, site: Site) -> None:
        """Refuse layers that the blocks do not fit."""
        if site.kind != "linear":
            raise SiteError(f"Bone cuts the weights of linear layers into blocks; {site.role!r} is none.")
        told = f"{site.key} has a weight of {site.out_features} x {site.in_features}"
        if self.rank > site.in_features:
            raise SiteError(
                f"Bone(rank={self.rank}): {told}, fewer columns than a group. Take at most {site.in_features}."
            )
        if self.variant == "bat" and (site.out_features % self.rank or site.in_features % self.rank):
            raise SiteError(
                f"Bone(variant='bat', rank={self.rank}): {told}, which blocks of {self.rank} x {self.rank} do not fill."
                " Take a divisor of both, or variant='miss'."
            )
        if self.mini is not None and site.out_features % self.mini:
            raise SiteError(f"Bone(mini={self.mini}): {told}; the number of rows must be a multiple of mini.")

    def parameter_count(self, view: View) -> int:
        """Count ``rank * out`` per site; in the mini form ``rank * mini``."""
        return sum(self.rank * (self.mini or site.out_features) for site in self.sites(view))
