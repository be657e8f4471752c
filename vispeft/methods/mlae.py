"""MLAE: a low-rank term as experts of rank one that are dropped as a whole (Wang et al., arXiv 2405.18897)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, check_factor, check_share, check_whole
from vispeft.core.low_rank import NO_DROPOUT, Branch
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit
from vispeft.errors import ConfigError
from vispeft.storage.quantize import LowBit, start_above_zero

__all__ = ["MLAE", "ExpertUnit"]


class ExpertUnit(LowBit, DeltaUnit):
    """The term ``sum_k c_k B_k (A_k . x)`` of experts k, each with a coefficient."""

    matrices = ("A", "B")
    scale = 1.0

    def __init__(self, method: MLAE, site: Site) -> None:
        """Allocate the experts.

        Args:
            method: The configuration.
            site: The layer, or a slice of one.
        """
        super().__init__()
        self.method, self.bits = method, method.bits
        self.identity_at_start = method.bits == 32
        self.start, self.stop = site.span
        self.A = nn.Parameter(torch.empty(method.rank, site.in_features))
        self.B = nn.Parameter(torch.empty(method.rank, site.out_features))
        self.coefficients = nn.Parameter(torch.empty(method.rank))

    def reset(self, generator: Generator) -> None:
        """Draw A as PyTorch's linear layer does (Kaiming-uniform, a = sqrt 5); B starts at zero."""
        bound = self.A.shape[1] ** -0.5
        self.A.uniform_(-bound, bound, generator=generator)
        start_above_zero(self.B, self.bits, generator)
        self.coefficients.fill_(self.method.alpha)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and the scaled experts (rows, rank), all of them."""
        return self.matrix("A"), self.matrix("B").t() * self.coefficients

    def branches(self) -> list[Branch]:
        """Return the term of the experts that this forward pass keeps."""
        b = self.matrix("B").t() * self.drawn()
        return [Branch(self.matrix("A"), b, self.scale, self.start, self.stop, NO_DROPOUT)]

    def drawn(self) -> Tensor:
        """Return the coefficients (rank,): dropped ones zero, the others divided by the share that is kept.

        One draw holds for the whole batch and all tokens (public code).
        """
        return F.dropout(self.coefficients, self.method.expert_dropout, self.training)


@register
@dataclass(frozen=True, kw_only=True)
class MLAE(FewBits, DropPath, Method):
    """Experts of rank one in linear layers, each with a learned coefficient, some of which are left out in each step.

    ``W' = W + sum_k c_k B_k A_k^T``, without a division by the rank. In each step and layer an expert is dropped with
    the same probability, for the whole batch, and the others are scaled up. The public code has the layer alone: which
    layers, how many experts and how many are dropped are choices of this project.
    """

    rank: int = 8
    """Number of experts."""
    alpha: float = 1.0
    """Start of each coefficient."""
    expert_dropout: float = 0.5
    """Share of experts dropped in a step."""

    name: ClassVar[str] = "mlae"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18897"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(rank=8), FGVC.sized(rank=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank")
        check_factor(self, "alpha")
        check_share(self, "expert_dropout")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each layer."""
        for site in self.sites(view):
            if site.kind != "linear":
                raise ConfigError(
                    f"MLAE(roles=...) was given {site.role!r}, which is no linear layer; take linear ones."
                )
            yield PlanItem(site, "mlae", partial(ExpertUnit, self, site))

    def parameter_count(self, view: View) -> int:
        """Count ``r (in + out) + r`` per layer: two vectors and a coefficient for each of r experts."""
        return sum(self.rank * (site.in_features + site.out_features + 1) for site in self.sites(view))
