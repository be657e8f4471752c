"""Full fine-tuning: every tensor of the backbone trains, as the baseline for all adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.core.fields import DropPath
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.selection import below, selections
from vispeft.core.sites import View

__all__ = ["Full"]


@register
@dataclass(frozen=True, kw_only=True)
class Full(DropPath, Method):
    """Train a copy of every parameter of the backbone, used in place of the frozen one.

    It can therefore be saved, switched and detached like any adapter, at the cost of a second copy of the weights.
    """

    name: ClassVar[str] = "full"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-4,
            weight_decay=1e-2,
            source="FGVC: AdamW, searched from 1e-4 to 5e-3 times batch / 256, decay 0 to 0.01 (KMnP/vpt 4410440)",
        ),
    )
    trains_base: ClassVar[bool] = True

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Select all parameters, or only those inside the chosen roles and blocks."""
        inside = below(self, view)
        yield from selections(view, model, "full", lambda path, name: inside(path))

    def parameter_count(self, view: View) -> int:
        """Count all parameters of the backbone listed by the view."""
        inside = below(self, view)
        return sum(sum(own.values()) for path, own in view.tensors.items() if inside(path))
