"""Full fine-tuning: every tensor of the backbone, as the yardstick of all adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.adapters.method import Method, PlanItem, register
from vispeft.adapters.selection import selections
from vispeft.adapters.sites import View
from vispeft.errors import ConfigError

__all__ = ["Full"]


@register
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every parameter of the backbone trains, on values of its own beside the frozen ones.

    It can therefore be saved, switched and taken off like any adapter, at the price of a second copy of the weights.
    """

    drop_path: float = 0.0
    """Rate of stochastic depth in the last block while training."""

    name: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"Full(drop_path={self.drop_path}): a rate from 0 up to, not including, 1 is needed.")

    def stochastic_depth(self) -> float:
        """Give the rate of the last block."""
        return self.drop_path

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Select every parameter, or those below the chosen roles and blocks."""
        chosen = None if self.roles is None and self.blocks is None else self._paths(view)
        yield from selections(view, model, "full", lambda path, module, name: chosen is None or _below(path, chosen))

    def _paths(self, view: View) -> list[str]:
        if self.roles is None:
            return [site.path for site in Full(roles=("block",), blocks=self.blocks).sites(view)]
        return [site.path for site in self.sites(view)]

    def parameter_count(self, view: View) -> int:
        """Count all parameters of the backbone, as the view lists them."""
        chosen = None if self.roles is None and self.blocks is None else self._paths(view)
        return sum(
            size
            for path, tensors in view.tensors.items()
            if chosen is None or _below(path, chosen)
            for size in tensors.values()
        )


def _below(path: str, parents: list[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)
