"""Low-rank terms of a linear layer: their factors, the rows they are added to, and their dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["DRAWS", "NO_DROPOUT", "Branch", "Dropout", "dropped_draws"]

DRAWS = 2**16
"""Number of values of the two random bytes that decide whether dropout drops an entry."""


def dropped_draws(share: float) -> int:
    """Return how many of the `DRAWS` values drop an entry: never all, since kept entries are divided by their share.

    Args:
        share: Share of entries to drop.
    """
    return min(round(share * DRAWS), DRAWS - 1)


@dataclass(frozen=True)
class Dropout:
    """Dropout of a low-rank term."""

    share: float = 0.0
    """Share of channels that are dropped."""
    place: Literal["input", "hidden"] = "input"
    """Before the first factor, or between the two."""

    def at(self, place: Literal["input", "hidden"]) -> float:
        """Return the share dropped at a place."""
        return self.share if place == self.place else 0.0

    @property
    def kept(self) -> float:
        """The share that is kept, exactly as drawn with two bytes."""
        return 1 - dropped_draws(self.share) / DRAWS


NO_DROPOUT = Dropout()
"""Nothing is dropped."""


@dataclass(frozen=True)
class Branch:
    """One low-rank term ``scale * x A^T B^T``, added to some output rows of a linear layer."""

    a: Tensor
    """First factor, (rank, in)."""
    b: Tensor
    """Second factor, (rows, rank)."""
    scale: float
    """Multiplier of the product."""
    start: int
    """First output row it is added to."""
    stop: int
    """End of the output rows, exclusive."""
    # A factory: torch 2.11 cannot compile a default that is an instance of a class it does not know.
    dropout: Dropout = field(default_factory=Dropout)
    """Dropout in this forward pass."""
