"""Weighted sums of changes, TIES and DARE.

TIES (arXiv 2306.01708) keeps the largest entries of each change, elects a sign for each place, and averages the entries
of that sign. DARE (arXiv 2311.03099) drops entries at random and divides the others by the share that is kept. Both act
on one tensor at a time, as in Hugging Face's peft; the papers rank the entries of a whole network together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

__all__ = ["Sign", "dare", "draw_mask", "elect", "keep_largest", "ties", "weighted_sum"]

Sign = Literal["total", "frequency"]
"""How the sign of a place is elected: by the sum of its entries, or by the number of entries of each sign."""


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add changes, each multiplied by its weight (task arithmetic, arXiv 2212.04089).

    Args:
        changes: Changes of one tensor, of equal shapes.
        weights: One number for each; a negative one takes a change away.

    Returns:
        The shape of one change.
    """
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total = total + weight * change
    return total


def keep_largest(change: Tensor, density: float) -> Tensor:
    """Set all but the largest entries to zero.

    Args:
        change: Of any shape.
        density: Share of the entries to keep, above 0 and at most 1; their number is rounded down.

    Returns:
        The same shape.
    """
    count = int(density * change.numel())
    kept = torch.zeros_like(change).flatten()
    places = change.flatten().abs().topk(count).indices
    kept[places] = change.flatten()[places]
    return kept.view_as(change)


def elect(changes: Tensor, sign: Sign) -> Tensor:
    """Find the entries that have the sign of the majority at their place; at a tie that is the positive one.

    Args:
        changes: (n, ...), without weights.
        sign: How the sign is elected.

    Returns:
        Truth values (n, ...).
    """
    votes = changes.sum(0) if sign == "total" else changes.sign().sum(0)
    chosen = torch.where(votes >= 0, 1.0, -1.0).to(changes)
    return changes.sign() == chosen


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float, sign: Sign = "total") -> Tensor:
    """Trim changes, elect signs, and average the entries that agree.

    The sign is elected before the weights are applied. Entries are averaged over the changes that agree at their place.

    Args:
        changes: Changes of one tensor, of equal shapes.
        weights: One number for each.
        density: Share of the entries of each change to keep.
        sign: How the sign of a place is elected.

    Returns:
        The shape of one change.
    """
    return _agreed(torch.stack([keep_largest(change, density) for change in changes]), weights, sign)


def _agreed(changes: Tensor, weights: Sequence[float], sign: Sign) -> Tensor:
    """Average the entries of the elected sign, (n, ...) to (...)."""
    agree = elect(changes, sign)
    scale = torch.tensor(weights, dtype=changes.dtype, device=changes.device).view(-1, *[1] * (changes.ndim - 1))
    return (changes * scale * agree).sum(0) / agree.sum(0).clamp_min(1)


def draw_mask(shape: Sequence[int], density: float, generator: Generator) -> Tensor:
    """Draw the entries that DARE keeps.

    Args:
        shape: Shape of the change.
        density: Probability of each entry.
        generator: Source of all randomness, on the CPU.

    Returns:
        Truth values of that shape, on the CPU.
    """
    return torch.rand(tuple(shape), generator=generator) < density


def dare(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    masks: Sequence[Tensor],
    sign: Sign | None = None,
) -> Tensor:
    """Drop entries, divide the kept ones by their share, and add the changes or let them elect signs.

    Args:
        changes: Changes of one tensor, of equal shapes.
        weights: One number for each.
        density: Share of the entries that is kept, 1 - p.
        masks: For each change, the entries that are kept.
        sign: How the sign of a place is elected, as in `ties`; None adds the changes.

    Returns:
        The shape of one change.
    """
    kept = [change * mask.to(change.device) / density for change, mask in zip(changes, masks, strict=True)]
    return weighted_sum(kept, weights) if sign is None else _agreed(torch.stack(kept), weights, sign)
