"""VPT in windows: prompts in the attention of each window, as in the comparison of Polyhistor (arXiv 2210.03265).

`VPT` is the method of its own paper (arXiv 2203.12119), whose prompts pass through the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import MULTI_TASK, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import PrefixUnit
from vispeft.errors import ConfigError

__all__ = ["VPTWindow", "WindowPrompts"]


class WindowPrompts(PrefixUnit):
    """Prompts at the input of one attention."""

    def __init__(self, length: int, width: int) -> None:
        """Allocate the prompts.

        Args:
            length: Number of prompts.
            width: Width of the block.
        """
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(length, width))

    def reset(self, generator: Generator) -> None:
        """Draw the prompts Xavier-uniform (public code)."""
        nn.init.xavier_uniform_(self.prompts, generator=generator)

    def rows(self) -> Tensor:
        """Return the prompts, (length, width)."""
        return self.prompts


@register
@dataclass(frozen=True, kw_only=True)
class VPTWindow(Method):
    """Prompts among the tokens of every window, behind the norm of the attention branch.

    The same prompts stand in all windows of a block, with a position bias and a mask of zero. They pass through the
    attention's own projection, tokens attend to them, and their outputs are discarded, so that each block has prompts
    of its own (deep) or the first block alone (shallow). On a ViT the whole sequence is one window (form of this
    project).
    """

    num_tokens: int = 50
    """Number of prompts; 50 gives the published size."""
    deep: bool = True
    """Whether every block has prompts, or the first one alone."""

    name: ClassVar[str] = "vpt_window"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.03265"
    recipes: ClassVar[tuple[Recipe, ...]] = (MULTI_TASK,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "num_tokens")
        if self.roles not in (None, ("attn",)) or (self.blocks is not None and not self.deep):
            raise ConfigError("VPTWindow puts prompts into attention: leave roles out, and blocks too if deep=False.")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put prompts at each attention, or at the first one."""
        view.needs_norm_first("VPTWindow")
        for site in self._chosen(view):
            yield PlanItem(site, "vpt_window", partial(WindowPrompts, self.num_tokens, site.in_features))

    def _chosen(self, view: View) -> list[Site]:
        sites = self.sites(view)
        return sites if self.deep else sites[:1]

    def parameter_count(self, view: View) -> int:
        """Count ``p`` times the width of each block with prompts."""
        return self.num_tokens * sum(site.in_features for site in self._chosen(view))
