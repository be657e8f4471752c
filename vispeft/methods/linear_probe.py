"""Linear probe: the classifier alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.errors import ConfigError

__all__ = ["LinearProbe"]


@register
@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Train only the classifier, on features of the frozen backbone in evaluation mode."""

    name: ClassVar[str] = "linear_probe"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-2,
            weight_decay=1e-4,
            source="chosen out of 1e-3, 1e-2 and 1e-1 in benchmarks/results/fewshot; papers use SGD",
        ),
    )
    cacheable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse `roles` and `blocks`, as the method has no sites."""
        super().__post_init__()
        if self.roles is not None or self.blocks is not None:
            raise ConfigError("LinearProbe adds nothing to the backbone; leave roles and blocks out.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Yield no items."""
        yield from ()

    def parameter_count(self, view: View) -> int:
        """Return 0: the classifier is counted separately."""
        return 0
