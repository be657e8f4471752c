"""BitFit: the biases of the backbone (Ben Zaken et al., ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, Recipe
from vispeft.core.selection import below, selections
from vispeft.core.sites import View

__all__ = ["BitFit"]

_BIASES = frozenset({"bias", "q_bias", "v_bias"})


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train a copy of every bias of the backbone, used in place of the frozen one.

    Biases are the parameters named ``bias``, in linear layers, convolutions and norms, and the query and value biases
    that SwinV2 and EVA-02 keep on the attention module (form of this project). Published counts for Swin also include
    the relative position bias tables, whose name contains "bias".
    """

    include_rel_pos_bias: bool = False
    """Whether to train Swin's relative position bias tables too."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    recipes: ClassVar[tuple[Recipe, ...]] = (FGVC,)

    def _chosen(self) -> frozenset[str]:
        return _BIASES | ({"relative_position_bias_table"} if self.include_rel_pos_bias else frozenset())

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Select all biases, or only those inside the chosen roles and blocks."""
        inside = below(self, view)
        yield from selections(view, model, "bitfit", lambda path, name: name in self._chosen() and inside(path))

    def parameter_count(self, view: View) -> int:
        """Count the biases."""
        inside, chosen = below(self, view), self._chosen()
        owned = [(path, name, size) for path, own in view.tensors.items() for name, size in own.items()]
        return sum(size for path, name, size in owned if name in chosen and inside(path))
