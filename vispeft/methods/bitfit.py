"""BitFit: the biases of the backbone (Ben Zaken et al., ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import FGVC, Recipe
from vispeft.core.selection import below, selections
from vispeft.core.sites import View, select

__all__ = ["BitFit"]

_BIASES = frozenset({"bias", "q_bias", "v_bias"})
TABLE = "relative_position_bias_table"
"""timm's name for the position bias of an attention in windows."""


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train a copy of every bias of the backbone, used in place of the frozen one.

    Biases are the parameters named ``bias``, in linear layers, convolutions and norms, and the query and value biases
    that SwinV2 and EVA-02 keep on the attention module (form of this project). Published counts for Swin also include
    the relative position bias tables, whose name contains "bias"; ``roles=["rel_pos"]`` trains these tables alone.
    """

    include_rel_pos_bias: bool = False
    """Whether to train Swin's relative position bias tables too."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    recipes: ClassVar[tuple[Recipe, ...]] = (FGVC,)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Select all biases, or only those inside the chosen roles and blocks."""
        yield from selections(view, model, "bitfit", self._wanted(view))

    def parameter_count(self, view: View) -> int:
        """Count the biases."""
        wanted = self._wanted(view)
        owned = [(path, name, size) for path, own in view.tensors.items() for name, size in own.items()]
        return sum(size for path, name, size in owned if wanted(path, name))

    def _wanted(self, view: View) -> Callable[[str, str], bool]:
        """Build the test of whether a tensor, by module path and name, is chosen."""
        # The tables belong to the attention module, whose other biases the role does not mean.
        attention = {site.path for site in select(view, ("rel_pos",), self.blocks, optional=True) if site.inside}
        alone = bool(attention) and "rel_pos" in (self.roles or ())
        others = tuple(role for role in self.roles or () if role != "rel_pos" or not alone)
        rest = dataclasses.replace(self, roles=others or None)
        inside = (lambda path: False) if alone and not others else below(rest, view)
        names = _BIASES | ({TABLE} if self.include_rel_pos_bias else frozenset())
        return lambda path, name: (name in names and inside(path)) or (alone and name == TABLE and path in attention)
