"""Hydra: a parallel and a sequential low-rank branch at one linear layer (Kim et al., arXiv 2309.06922)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import SequentialUnit
from vispeft.errors import SiteError
from vispeft.hosts.functional import linear
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["Hydra", "HydraUnit"]

BRANCHES = ("parallel", "sequential")


class HydraUnit(LowBit, SequentialUnit):
    """Two low-rank branches: ``y + s * (Bp (Ap x + ap) + bp) + s * (Bs (As y + as) + bs)``, both without activation."""

    matrices = ("parallel_down", "parallel_up", "sequential_down", "sequential_up")

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, bits: int) -> None:
        """Allocate the tensors.

        Args:
            site: The linear layer.
            rank: Hidden channels.
            scale: Multiplier of both branches.
            dropout: Fraction of the hidden channels dropped during training.
            bits: Bits per weight of the matrices.
        """
        super().__init__()
        self.scale, self.dropout, self.bits = scale, dropout, bits
        self.identity_at_start = bits == 32
        for branch, width in zip(BRANCHES, (site.in_features, site.out_features), strict=True):
            for name, shape in (("down", (rank, width)), ("up", (site.out_features, rank))):
                self.register_parameter(f"{branch}_{name}", nn.Parameter(torch.empty(shape)))
                self.register_parameter(f"{branch}_{name}_bias", nn.Parameter(torch.empty(shape[0])))

    def reset(self, generator: Generator) -> None:
        """Initialise the first matrices Xavier-uniform, all else at zero (public code, VTAB-1k)."""
        for branch in BRANCHES:
            nn.init.xavier_uniform_(getattr(self, f"{branch}_down"), generator=generator)
            start_above_zero(getattr(self, f"{branch}_up"), self.bits, generator)
            for name in ("down", "up"):
                getattr(self, f"{branch}_{name}_bias").zero_()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add both branches to the layer's output."""
        return y + self.scale * (self._branch("parallel", x) + self._branch("sequential", y)).to(y.dtype)

    def _branch(self, branch: str, x: Tensor) -> Tensor:
        hidden = linear(x, self.matrix(f"{branch}_down"), getattr(self, f"{branch}_down_bias"))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return linear(hidden, self.matrix(f"{branch}_up"), getattr(self, f"{branch}_up_bias"))

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Compute ``W + s * (Bp Ap + Bs As W)``: the branches do not read each other."""
        parallel, sequential = (self._product(branch, weight) for branch in BRANCHES)
        return weight + self.scale * (parallel + sequential @ weight)

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Compute ``b + s * (Bp ap + bp + Bs as + bs + Bs As b)``."""
        added = self._product("sequential", bias) @ bias
        for branch in BRANCHES:
            up = self.matrix(f"{branch}_up").to(bias.dtype)
            inner, outer = getattr(self, f"{branch}_down_bias"), getattr(self, f"{branch}_up_bias")
            added = added + up @ inner.to(bias.dtype) + outer.to(bias.dtype)
        return bias + self.scale * added

    def _product(self, branch: str, like: Tensor) -> Tensor:
        return self.matrix(f"{branch}_up").to(like.dtype) @ self.matrix(f"{branch}_down").to(like.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class Hydra(FewBits, DropPath, Method):
    """A parallel and a sequential low-rank branch at the output projection and the second MLP layer; merges exactly.

    Both branches are linear, share one multiplier and have biases (public code, ``hydra_both``).
    """

    rank: int = 2
    """Hidden channels (paper, VTAB-1k)."""
    scale: float = 1.0
    """Multiplier of both branches; tuned per task in the paper, from 0.1 to 4.5."""
    dropout: float = 0.0
    """Fraction of the hidden channels dropped during training; 0 to 0.2 by task in the paper."""

    name: ClassVar[str] = "hydra"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.06922"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-3,
            weight_decay=1e-4,
            fields={"rank": 2},
            source="VTAB-1k: 5e-4 to 5e-3 by data set, AdamW, 100 epochs, drop path 0.1 (extremebird/Hydra 4138457)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("attn.proj", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank")
        check_factor(self, "scale")
        check_share(self, "dropout")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put both branches at each site."""
        for site in self.sites(view):
            if site.kind != "linear" or site.rows is not None or site.reads_weight or site.role == "head":
                raise SiteError(
                    f"Hydra acts on whole linear layers that the model calls, such as attn.proj and mlp.fc2; "
                    f"{site.role!r} of this {view.family} model is none."
                )
            yield PlanItem(site, "hydra", partial(HydraUnit, site, self.rank, self.scale, self.dropout, self.bits))

    def parameter_count(self, view: View) -> int:
        """Count ``r (in + 3 out) + 2 r + 2 out`` per site: ``11 r S + 4 r n + 4 S`` with an MLP ratio of 4."""
        sizes = ((site.in_features, site.out_features) for site in self.sites(view))
        return sum(self.rank * (width + 3 * out) + 2 * self.rank + 2 * out for width, out in sizes)
