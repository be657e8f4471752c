"""Rows: what goes through a block together. Everything a block is told and everything it gives is one of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Rows"]


class Rows(NamedTuple):
    """The tokens of a block, and the rows beside them, which pass the same norms, attention and MLP."""

    tokens: Tensor
    """The residual stream, (B, N, D) or a map (B, H, W, D)."""
    prompts: Tensor | None = None
    """(B, T, D) rows that stand in every window: they see its tokens and are seen by them."""
    queries: Tensor | None = None
    """(B, Q, D) rows that read the tokens and that nothing sees."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Apply a change that acts on each row by itself.

        Args:
            change: A norm, a layer scale, an MLP.

        Returns:
            What it gives, row by row.
        """
        return Rows(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def plus(self, *added: Rows) -> Rows:
        """Add what branches give; rows that the first one gives nothing for end here.

        Args:
            *added: What the branches give.

        Returns:
            The sum.
        """
        sums: list[Tensor | None] = []
        for part, *terms in zip(self, *added, strict=True):
            total = None if terms[0] is None else part
            for term in terms:
                total = total if total is None or term is None else total + term
            sums.append(total)
        return Rows(*sums)  # type: ignore[arg-type]

    @property
    def alone(self) -> bool:
        """Whether there is nothing beside the tokens."""
        return self.prompts is None and self.queries is None
