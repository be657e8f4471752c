"""SNELL: sparse changes of weights from distances in place of products (NeurIPS 2024, arXiv 2411.01800).

Formulas follow the public code, ssfgunner/SNELL, whose kept entries are multiplied by their magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, check_factor, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import WeightUnit, with_rows
from vispeft.errors import ConfigError, SiteError

__all__ = ["SNELL", "SNELLUnit"]

CIFAR = Recipe(
    lr=1e-3,
    weight_decay=1e-2,
    source="VTAB-1k, CIFAR: batch 16, 200 epochs, dim 32, threshold 0.9 (ssfgunner/SNELL, scripts)",
)


class SNELLUnit(WeightUnit):
    """A change ``scale * (|p_a - q_b| - |r_a - s_b|)`` of each weight (b, a), of which the largest are kept."""

    identity_at_start = False

    def __init__(self, site: Site, method: SNELL) -> None:
        """Allocate the points.

        Args:
            site: The linear layer, or a slice of one.
            method: The configuration.
        """
        super().__init__()
        self.method = method
        self.start, self.stop = site.span
        self.inputs = nn.Parameter(torch.empty(2, site.in_features, method.dim // 2))
        self.outputs = nn.Parameter(torch.empty(2, site.out_features, method.dim // 2))
        if method.variant == "snella":
            # In front of a layer norm a common shift of all channels has no effect.
            self.zero_gradient = frozenset({"beta"} if site.role in ("attn.proj", "mlp.fc2") else ())
            self.no_decay = frozenset({"alpha", "beta", "gamma"})
            self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(1)) for _ in range(3))

    def reset(self, generator: Generator) -> None:
        """Draw the points as PyTorch initialises a weight of three dimensions (Kaiming-uniform, a = sqrt(5))."""
        for points in (self.inputs, self.outputs):
            bound = 1 / math.sqrt(points.shape[1] * points.shape[2])
            points.uniform_(-bound, bound, generator=generator)
        if self.method.variant == "snella":
            self.alpha.fill_(1)
            self.beta.zero_()
            self.gamma.fill_(1)

    def dense(self) -> Tensor:
        """Compute the change before the small entries go, (rows, in)."""
        # Distances from products, PyTorch's choice for many points, lose half of the digits.
        p, exact = float(self.method.norm), "donot_use_mm_for_euclid_dist"
        near, far = (torch.cdist(self.outputs[i], self.inputs[i], p=p, compute_mode=exact) for i in range(2))
        change = self.method.scale * (near - far)
        if self.method.variant == "snella":
            change = change + self.alpha * (change / self.gamma).softmax(0) + self.beta
        return change

    def delta(self) -> Tensor:
        """Compute the change, (rows, in)."""
        change = self.dense()
        if not self.method.threshold:
            return change
        size = change.detach().abs()
        # What is above the quantile is above the entry below it; torch 2.11 cannot compile `quantile`.
        below = size.flatten().kthvalue(1 + int(self.method.threshold * (size.numel() - 1))).values
        kept = size > below
        return change * (kept * size if self.method.squared else kept)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Change the rows of (out, in)."""
        dtype = torch.promote_types(weight.dtype, self.inputs.dtype)
        rows = weight[self.start : self.stop].to(dtype) + self.delta().to(dtype)
        return with_rows(weight, self.start, rows)


@register
@dataclass(frozen=True, kw_only=True)
class SNELL(DropPath, Method):
    """Each weight changes by the difference of two distances between points of its row and column; most stay unchanged.

    The largest changes are kept, a tenth by default. The public code multiplies them by their magnitude, so that they
    are squared with their sign; ``squared=False`` keeps them as they are, which is another method. Without a threshold
    it is KLoRA. The random start changes the model's function a little. The public code's dropout inside of the branch
    is left out.
    """

    dim: int = 16
    """Numbers per row and per column; 8 to 32 in the public scripts, half for each distance."""
    threshold: float = 0.9
    """Share of the entries that are left out; 0.3 to 0.9 in the public scripts, 0 for KLoRA."""
    variant: Literal["snell", "snella"] = "snell"
    """``snella`` adds a softmax of the change over the outputs, with three trained numbers."""
    squared: bool = True
    """Multiply kept entries by their magnitude, as the public code does."""
    norm: Literal[1, 2] = 2
    """Norm of the distances."""
    scale: float = 0.1
    """Multiplier of the distances (public code)."""

    name: ClassVar[str] = "snell"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.01800"
    recipes: ClassVar[tuple[Recipe, ...]] = (CIFAR,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "dim")
        check_share(self, "threshold")
        check_factor(self, "scale")
        if self.dim % 2:
            raise ConfigError(f"SNELL(dim={self.dim}): half of the numbers are for each distance. Take an even number.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each site."""
        for site in self.sites(view):
            if site.kind != "linear" or site.role == "head":
                raise SiteError(f"SNELL acts on linear layers of the backbone; {site.role!r} is none.")
            yield PlanItem(site, "snell", partial(SNELLUnit, site, self))

    def parameter_count(self, view: View) -> int:
        """Count ``dim * (in + out)`` per site, and 3 with ``snella``."""
        more = 3 if self.variant == "snella" else 0
        return sum(self.dim * (site.in_features + site.out_features) + more for site in self.sites(view))
