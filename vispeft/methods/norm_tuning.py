"""Norm tuning: weights and biases of the norms (baseline of many papers; Swin-B 0.06 M in V-PETL's tables)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, Recipe
from vispeft.core.selection import below, selections
from vispeft.core.sites import View

__all__ = ["NormTuning"]


@register
@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Train a copy of weight and bias of every norm of the backbone, used in place of the frozen ones.

    Norms are found by role, not by name: those of blocks, of queries and keys, of patch embedding and patch merging,
    and the last one. The norm inside attention pooling belongs to the pooling and stays frozen.
    """

    name: ClassVar[str] = "norm_tuning"
    recipes: ClassVar[tuple[Recipe, ...]] = (FGVC,)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Select the tensors of all norms, or only of those inside the chosen roles and blocks."""
        norms, inside = _norms(view), below(self, view)
        yield from selections(view, model, "norm_tuning", lambda path, name: path in norms and inside(path))

    def parameter_count(self, view: View) -> int:
        """Count weight and bias of each norm."""
        norms, inside = _norms(view), below(self, view)
        return sum(sum(own.values()) for path, own in view.tensors.items() if path in norms and inside(path))


def _norms(view: View) -> set[str]:
    return {site.path for site in view.sites if site.kind == "norm"}
