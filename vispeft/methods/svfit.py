"""SVFit: training of singular values alone (Sun et al., arXiv 2409.05926); no public code was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from vispeft.core.families import frozen_tensor
from vispeft.core.fields import DropPath, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import WeightUnit, with_rows
from vispeft.errors import BackboneError, ConfigError, SiteError

__all__ = ["SVFit", "SVFitUnit", "decompose", "rank_for_energy"]

TOY = Recipe(
    lr=1e-1,
    weight_decay=0.0,
    source="chosen by validation among 0.01, 0.03 and 0.1 on a toy (benchmarks/toy_deltas.py); singular values are of "
    "order 1 to 10, so they take larger steps than factors",
)


def decompose(weight: Tensor, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a frozen weight as ``U diag(s) V``, in double precision.

    In single precision close singular values give gradients that are off by up to 2e-4 of the largest one.

    Args:
        weight: (out, ...), a matrix or the kernel of a convolution.
        place: Where the weight is, for the message.

    Returns:
        U (out, n), s (n,) in falling order and V (n, columns).

    Raises:
        BackboneError: If the weight has values that are not finite.
    """
    matrix = weight.detach().flatten(1).double()
    if not bool(torch.isfinite(matrix).all()):
        raise BackboneError(
            f"The singular values of {place}.weight were needed, and it has values that are not finite. Check the file "
            "the backbone was loaded from."
        )
    return torch.linalg.svd(matrix, full_matrices=False)


def rank_for_energy(weight: Tensor, share: float, place: str = "this layer") -> int:
    """Count the largest singular values whose squares sum to a share of the sum of all squares.

    Args:
        weight: (out, ...).
        share: The share, above 0 and at most 1.
        place: Where the weight is, for messages.
    """
    energy = decompose(weight, place)[1].square().cumsum(0)
    return min(int((energy < share * energy[-1]).sum()) + 1, len(energy))


class SVFitUnit(WeightUnit):
    """Changes of the largest singular values: ``W + U diag(shift) V``.

    U and V are computed from the frozen weight on attach and on load, and are in no file. Signs of singular vectors
    have no effect.
    """

    U: Tensor
    """Left singular vectors, (rows, rank)."""
    V: Tensor
    """Right singular vectors, (rank, columns)."""

    def __init__(self, site: Site, rank: int) -> None:
        """Allocate the shift of the singular values, (rank,).

        Args:
            site: The layer, or a slice of one.
            rank: Number of singular values.
        """
        super().__init__()
        self.place = site.key
        self.start, self.stop = site.span
        self.shift = nn.Parameter(torch.empty(rank))
        self.register_buffer("U", torch.empty(site.out_features, rank), persistent=False)
        self.register_buffer("V", torch.empty(rank, site.columns), persistent=False)

    def prepare(self, weight: Tensor) -> None:
        """Decompose the frozen weight."""
        u, _, v = decompose(weight, self.place)
        rank = len(self.shift)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.U, self.V = u[:, :rank].to(dtype).contiguous(), v[:rank].to(dtype).contiguous()

    def reset(self, generator: Generator) -> None:
        """Start at the frozen weight's singular values."""
        self.shift.zero_()

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Shift the singular values of the rows of (out, columns)."""
        dtype = torch.promote_types(weight.dtype, self.shift.dtype)
        change = (self.U.to(dtype) * self.shift.to(dtype)) @ self.V.to(dtype)
        rows = weight[self.start : self.stop].to(dtype) + change
        return with_rows(weight, self.start, rows)


@register
@dataclass(frozen=True, kw_only=True)
class SVFit(DropPath, Method):
    """The largest singular values of frozen weights train; their singular vectors stay.

    One number per singular value, so small files. The singular vectors are computed on attach and on load (10 s for a
    ViT-B on one core) and are held beside the weights: at full rank, as much memory as the adapted layers again. A file
    holds the changes of the singular values alone and needs the same weights; on another machine the singular vectors,
    and so the outputs, may differ by rounding (about 1e-5 in float32). ``vispeft export RUN --format delta`` is exact.
    """

    rank: int | None = None
    """Number of singular values, the largest ones; None for all. Smaller matrices train all of theirs."""
    energy: float | None = None
    """Take as many as hold this share of the sum of squares, layer by layer (0.99 in the paper); in place of rank."""

    name: ClassVar[str] = "svfit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.05926"
    recipes: ClassVar[tuple[Recipe, ...]] = (TOY,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"SVFit(energy={self.energy}): a share above 0 and at most 1 is needed.")
        if self.energy is not None and self.rank is not None:
            raise ConfigError(
                f"SVFit(rank={self.rank}, energy={self.energy}): both choose the number of singular values. Give one."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each site."""
        for site in self._sites(view):
            yield PlanItem(site, "svfit", partial(SVFitUnit, site, self._rank(site, model)))

    def _sites(self, view: View) -> list[Site]:
        """Choose the sites, and refuse those without a weight and ranks that no matrix has."""
        sites = self.sites(view)
        for site in sites:
            if site.kind not in ("linear", "conv") or site.role == "head":
                raise SiteError(f"SVFit acts on linear layers and convolutions; {site.role!r} is neither.")
        largest = max(min(site.out_features, site.columns) for site in sites)
        if self.rank is not None and self.rank > largest:
            raise SiteError(
                f"SVFit(rank={self.rank}): no layer has more than {largest} singular values. Take at most {largest}, "
                "or leave rank out for all."
            )
        return sites

    def _rank(self, site: Site, model: nn.Module) -> int:
        if self.energy is None:
            return _clipped(site, self.rank)
        weight = frozen_tensor(model.get_submodule(site.path), "weight")
        assert weight is not None
        if weight.is_meta:
            raise ConfigError("SVFit(energy=...) reads the weights, and this model has none yet. Give a rank.")
        rows = slice(None) if site.rows is None else slice(site.rows.start, site.rows.stop)
        return rank_for_energy(weight[rows], self.energy, site.key)

    def parameter_count(self, view: View) -> int:
        """Count ``min(rank, in, out)`` per site.

        Raises:
            ConfigError: If the weights decide the rank.
        """
        if self.energy is not None:
            raise ConfigError("SVFit(energy=...) has no closed count, since the weights decide it; see the plan.")
        return sum(_clipped(site, self.rank) for site in self._sites(view))


def _clipped(site: Site, rank: int | None) -> int:
    """Return the number of singular values to train, at most those that the matrix has."""
    most = min(site.out_features, site.columns)
    return most if rank is None else min(rank, most)
