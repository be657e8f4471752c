"""FacT: factors of a weight tensor, shared by the whole model (Jie and Deng, AAAI 2023, arXiv 2212.03145)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_share, check_whole
from vispeft.core.low_rank import Branch, Dropout
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit, SharedUnit
from vispeft.errors import SiteError
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["FacT", "FacTFactors", "FacTUnit"]


@dataclass(frozen=True)
class _Shape:
    """Configuration shared by all units of one set of factors."""

    width: int
    """Width of the stream, and of one slice of a weight."""
    rank: int
    scale: float
    dropout: float
    bits: int


class FacTFactors(LowBit, SharedUnit):
    """Factors U (rank, width) and V (width, rank) of one set; the Tucker form adds the core C and last factor P."""

    def __init__(self, shape: _Shape, slices: int | None) -> None:
        """Allocate the factors.

        Args:
            shape: The configuration of the set.
            slices: Number of slices that share the core; None for the tensor-train form, which has no core.
        """
        super().__init__()
        self.bits = shape.bits
        self.matrices = ("U", "V") if slices is None else ("U", "V", "C", "P")
        self.U = nn.Parameter(torch.empty(shape.rank, shape.width))
        self.V = nn.Parameter(torch.empty(shape.width, shape.rank))
        self.C = None if slices is None else nn.Parameter(torch.empty(shape.rank, shape.rank, shape.rank))
        self.P = None if slices is None else nn.Parameter(torch.empty(shape.rank, slices))

    def reset(self, generator: Generator) -> None:
        """Initialise U as PyTorch's linear layer, C and P Xavier-uniform, and V at zero (public code)."""
        bound = 1 / math.sqrt(self.U.shape[1])
        self.U.uniform_(-bound, bound, generator=generator)
        start_above_zero(self.V, self.bits, generator)
        for tensor in (self.C, self.P):
            if tensor is not None:
                nn.init.xavier_uniform_(tensor, generator=generator)


class FacTUnit(LowBit, DeltaUnit):
    """The term of one linear layer: ``scale * V S U x``, with the layer cut into slices of the stream's width.

    U is applied to each input slice and V to each output slice; the matrix between them, S (rank * slices out, rank *
    slices in), is the unit's own tensor or, in the Tucker form, computed from the shared core: ``S_j = sum_p C[:, :, p]
    P[p, j]``. A last slice wider than the rest of the layer is truncated.
    """

    def __init__(self, site: Site, shape: _Shape, columns: range | None) -> None:
        """Allocate the tensors.

        Args:
            site: The linear layer, or a slice of one.
            shape: The configuration of the set of factors.
            columns: The layer's columns of P; None for the tensor-train form.
        """
        super().__init__()
        self.scale, self.bits = shape.scale, shape.bits
        self.dropout = Dropout(shape.dropout, "hidden")
        self.identity_at_start = shape.bits == 32
        self.rank, self.columns = shape.rank, columns
        self.sizes = site.in_features, site.out_features
        self.start, self.stop = site.span
        self.slices = _slices(site.in_features, shape.width), _slices(site.out_features, shape.width)
        before, behind = (count * shape.rank for count in self.slices)
        self.S = nn.Parameter(torch.empty(behind, before)) if columns is None else None
        self.matrices = ("S",) if columns is None else ()

    def reset(self, generator: Generator) -> None:
        """Initialise S as PyTorch's linear layer (public code)."""
        if self.S is not None:
            bound = 1 / math.sqrt(self.S.shape[1])
            self.S.uniform_(-bound, bound, generator=generator)

    def _shared(self, name: str) -> Tensor:
        return cast(FacTFactors, self.lender).matrix(name)

    def _middle(self) -> Tensor:
        """Return S, (rank * slices out, rank * slices in)."""
        if self.columns is None:
            return self.matrix("S")
        part = self._shared("P")[:, self.columns.start : self.columns.stop]
        # The public code reshapes (rank, rank, slices) in row-major order, so the slice index varies fastest.
        core = (self._shared("C").flatten(0, 1) @ part).reshape(self.rank, -1)
        return core if self.slices[0] > 1 else core.t()

    def _first(self) -> Tensor:
        """Return ``S U``, (rank * slices out, in)."""
        behind = self.slices[1]
        by_slice = self._middle().reshape(-1, self.rank) @ self._shared("U")
        return by_slice.reshape(behind * self.rank, -1)[:, : self.sizes[0]]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two factors of the whole term, split where the inner width is narrower."""
        before, behind = self.slices
        if behind == 1:
            return self._first(), self._shared("V")
        u = torch.block_diag(*[self._shared("U")] * before)[:, : self.sizes[0]]
        # A product of two matrices: how PyTorch folds more axes, and so the last bits, depends on requires_grad.
        middle = self._middle().reshape(behind, self.rank, -1).transpose(0, 1).flatten(1)
        by_slice = (self._shared("V") @ middle).unflatten(1, (behind, -1)).transpose(0, 1)
        return u, by_slice.flatten(0, 1)[: self.sizes[1]]

    def branches(self) -> list[Branch]:
        """Return the term, with V as a separate factor while dropout acts between S and V."""
        if not self.dropped().share:
            return super().branches()
        b = torch.block_diag(*[self._shared("V")] * self.slices[1])[: self.sizes[1]]
        return [Branch(self._first(), b, self.scale, self.start, self.stop, self.dropout)]


def _slices(features: int, width: int) -> int:
    """Count the slices of the stream's width that cover one side of a layer."""
    return -(-features // width)


@register
@dataclass(frozen=True, kw_only=True)
class FacT(FewBits, DropPath, Method):
    """Low-rank terms at all linear layers of the blocks, which share the outer factors U and V.

    The weights of a block are twelve square slices: q, k, v, the output projection and four each of the two MLP layers.
    In the tensor-train form (``tt``) each slice has its own small matrix between U and V; in the Tucker form (``tk``)
    these come from one core, and each slice has one column. A Swin has one set per stage. A layer whose width is not a
    whole number of slices (SwiGLU) has a truncated last slice (form of this project).
    """

    rank: int = 16
    """Rank; 4 to 16 (tt) and 16 or 32 (tk) in the paper."""
    scale: float = 1.0
    """Multiplier of the terms; tuned per task in the paper, from 0.01 to 100."""
    variant: Literal["tt", "tk"] = "tt"
    """Tensor-train (``tt``) or Tucker (``tk``) form."""
    dropout: float = 0.1
    """Fraction of channels before V dropped during training (public code)."""

    name: ClassVar[str] = "fact"
    paper: ClassVar[str] = "https://arxiv.org/abs/2212.03145"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(rank=16), FGVC.sized(rank=16))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank")
        check_factor(self, "scale")
        check_share(self, "dropout")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put each set of factors at the first block that uses it, and a term at each layer."""
        for sites in self._sets(view):
            block = next(view.blocks_of(sites))
            shape = _Shape(block.out_features, self.rank, self.scale, self.dropout, self.bits)
            slices = sum(_square_slices(site, shape.width) for site in sites)
            tucker = self.variant == "tk"
            factors = PlanItem(block, "fact_factors", partial(FacTFactors, shape, slices if tucker else None))
            yield factors
            column = 0
            for site in sites:
                columns = range(column, column := column + _square_slices(site, shape.width))
                build = partial(FacTUnit, site, shape, columns if tucker else None)
                yield PlanItem(site, "fact", build, lender=factors.key)

    def _sets(self, view: View) -> Iterator[list[Site]]:
        """Group the sites by stage, as the width is constant within one."""
        sites = self.sites(view)
        for site in sites:
            if site.kind != "linear" or site.block is None:
                raise SiteError(f"FacT acts on linear layers of the blocks; {site.role!r} is none.")
        for stage in view.stages:
            inside = [site for site in sites if site.block in stage]
            if inside:
                yield inside

    def parameter_count(self, view: View) -> int:
        """Count ``2 r d + 12 L r^2`` (tt) or ``2 r d + 12 L r + r^3`` (tk) per set, 12 L being the number of slices."""
        blocks = {site.block: site.out_features for site in view.at("block")}
        per_slice = self.rank**2 if self.variant == "tt" else self.rank
        total = 0
        for sites in self._sets(view):
            width = blocks[sites[0].block]
            total += 2 * self.rank * width + (0 if self.variant == "tt" else self.rank**3)
            total += per_slice * sum(_square_slices(site, width) for site in sites)
        return total


def _square_slices(site: Site, width: int) -> int:
    return _slices(site.in_features, width) * _slices(site.out_features, width)
