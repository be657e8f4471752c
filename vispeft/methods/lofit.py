"""LoFiT: scales of attention heads find the important ones, which get offsets (Yin et al., arXiv 2406.01563)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.core.fields import check_roles_in
from vispeft.core.method import Method, PlanItem, Step, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import View
from vispeft.core.units import InputUnit
from vispeft.errors import ConfigError

__all__ = ["HeadUnit", "LoFiT", "head_norms", "top_heads"]


class HeadUnit(InputUnit):
    """Scales and offsets of the concatenated outputs of an attention's heads: ``z' = (1 + A) z + v``."""

    def __init__(self, width: int, heads: int, scaled: bool, moved: tuple[int, ...] | None) -> None:
        """Allocate the tensors.

        Args:
            width: Channels of all heads together.
            heads: Number of heads.
            scaled: Whether there are scales, of all heads.
            moved: The heads with offsets; None for all, empty for none.
        """
        super().__init__()
        self.heads, self.moved = heads, tuple(range(heads)) if moved is None else moved
        self.scales = nn.Parameter(torch.empty(heads, width // heads)) if scaled else None
        self.offsets = nn.Parameter(torch.empty(len(self.moved), width // heads)) if self.moved else None
        self.no_decay = frozenset({"scales", "offsets"})

    def reset(self, generator: Generator) -> None:
        """Start at the identity; both get a gradient there."""
        for tensor in self.parameters():
            tensor.zero_()

    def transform_input(self, x: Tensor) -> Tensor:
        """Scale and move (..., heads * width of a head)."""
        x = x if self.scales is None else x * (1 + self.scales.flatten()).to(x.dtype)
        return x if self.offsets is None else x + self.input_shift().to(x.dtype)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Scale the columns of (out, in)."""
        return weight if self.scales is None else weight * (1 + self.scales.flatten())

    def input_shift(self) -> Tensor:
        """Return the offsets of all heads (in,), zero where there are none."""
        if self.offsets is None:
            assert self.scales is not None
            return torch.zeros_like(self.scales).flatten()
        whole = self.offsets.new_zeros(self.heads, self.offsets.shape[1])
        return whole.index_copy(0, torch.tensor(self.moved, device=whole.device), self.offsets).flatten()

    def needs_bias(self) -> bool:
        """Return whether there are offsets."""
        return self.offsets is not None


@register
@dataclass(frozen=True, kw_only=True)
class LoFiT(Method):
    """Scales of the outputs of all attention heads, from which important heads follow, or offsets of chosen heads.

    Train ``stage="scales"`` with its L1 penalty, choose heads by `vispeft.methods.top_heads`, and train a fresh adapter
    with ``stage="offsets"`` on these: a few hundred numbers. ``vispeft.viz.head_map`` draws how important each head is.
    Scales are discarded with the first adapter. Both start at zero, where the public code draws them with a standard
    deviation of 0.001. A tool for analysis and very small budgets.
    """

    stage: Literal["scales", "offsets", "both"] = "scales"
    """What trains: scales of all heads, offsets of `heads`, or scales and offsets of all heads."""
    heads: tuple[tuple[int, int], ...] | None = None
    """The heads with offsets, as pairs of block and head; None for all."""
    l1: float = 5e-3
    """Weight of the sum of absolute scales in the loss; 0.001 to 0.005 in the public code."""

    name: ClassVar[str] = "lofit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.01563"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=1e-3,
            weight_decay=0.0,
            source="language models: scales at 5e-4 to 1e-3 for 5 epochs, then offsets at 1e-2 (fc2869/lo-fit ebd344a)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("attn.proj",)
    training_fields: ClassVar[frozenset[str]] = frozenset({"l1"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_roles_in(self, self.default_roles)
        if not self.l1 >= 0:
            raise ConfigError(f"LoFiT(l1={self.l1}): a weight of at least 0 is needed.")
        if self.heads is None:
            return
        object.__setattr__(self, "heads", tuple((int(block), int(head)) for block, head in self.heads))
        if self.stage != "offsets" or not self.heads or len(set(self.heads)) != len(self.heads):
            raise ConfigError(
                f"LoFiT(stage={self.stage!r}, heads={self.heads}): give heads for stage='offsets' alone, at least one, "
                "and each once."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit in front of the output projection of each attention that has something to train."""
        for site in self.sites(view):
            moved = self._moved(view, site.block)
            if self.stage == "offsets" and moved == ():
                continue
            scaled = self.stage != "offsets"
            build = partial(HeadUnit, site.in_features, view.heads[site.block or 0], scaled, moved)
            yield PlanItem(site, "lofit", build)

    def _moved(self, view: View, block: int | None) -> tuple[int, ...] | None:
        """Return the heads of a block that have offsets; None for all."""
        if self.stage == "scales":
            return ()
        if self.heads is None:
            return None
        for own, head in self.heads:
            if not (0 <= own < view.depth and 0 <= head < view.heads[own]):
                raise ConfigError(
                    f"LoFiT(heads=...) names head {head} of block {own}; the model has {view.depth} blocks, and "
                    f"{view.heads[min(max(own, 0), view.depth - 1)]} heads there. Both are counted from 0."
                )
        return tuple(sorted(head for own, head in self.heads if own == block))

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor | None:
        """Return ``l1`` times the sum of absolute scales, in the stage that ranks heads."""
        scales = [unit.scales for unit in bank.units(name).values() if getattr(unit, "scales", None) is not None]
        if self.stage != "scales" or not self.l1 or not scales:
            return None
        return self.l1 * torch.stack([scale.abs().sum() for scale in scales]).sum()

    def parameter_count(self, view: View) -> int:
        """Count D per block for scales, and ``D / H`` per head with offsets."""
        total = 0
        for site in self.sites(view):
            heads = view.heads[site.block or 0]
            moved = self._moved(view, site.block)
            total += site.in_features * (self.stage != "offsets")
            total += site.in_features // heads * (heads if moved is None else len(moved))
        return total


def head_norms(bank: Any, name: str | None = None) -> dict[int, Tensor]:
    """Compute how important each attention head is: the norm of its scales.

    Args:
        bank: The bank of the model.
        name: The adapter, a LoFiT with scales; may be None if only one acts.

    Returns:
        Norms (heads,) by block, on the CPU.

    Raises:
        ConfigError: If the adapter has no scales.
    """
    blocks = {item.key: item.site.block for item in bank.plan(name)}
    scaled = {key: unit for key, unit in bank.units(name).items() if getattr(unit, "scales", None) is not None}
    if not scaled:
        raise ConfigError("Heads were to be ranked, and the adapter has no scales. Train LoFiT(stage='scales') first.")
    return {blocks[key]: torch.linalg.vector_norm(unit.scales.detach().cpu(), dim=1) for key, unit in scaled.items()}


def top_heads(bank: Any, count: int, name: str | None = None) -> tuple[tuple[int, int], ...]:
    """Choose the most important heads, for `LoFiT.heads`.

    Args:
        bank: The bank of the model.
        count: Number of heads; 3 % of them in the public code.
        name: The adapter; may be None if only one acts.

    Returns:
        Pairs of block and head, the most important one first.

    Raises:
        ConfigError: If the adapter has no scales, or not so many heads.
    """
    ranked = [
        (float(norm), block, head) for block, own in head_norms(bank, name).items() for head, norm in enumerate(own)
    ]
    if not 1 <= count <= len(ranked):
        raise ConfigError(f"The {count} most important heads were asked for, and there are {len(ranked)}.")
    ranked.sort(key=lambda entry: (-entry[0], entry[1:]))
    return tuple((block, head) for _, block, head in ranked[:count])
