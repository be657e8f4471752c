"""The host of a block: the residual stream with room for terms beside the two branches, and for rows beside tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vispeft.core.units import ParallelUnit
from vispeft.hosts.base import Host
from vispeft.hosts.streams import Rows

__all__ = ["BlockHost"]


class BlockHost(Host):
    """An adapted block: ``x1 = x + attention(x) + terms(x)``, then ``x1 + mlp(x1) + terms(x1)``.

    A family says how it runs its two branches, with timm's own submodules and everything that stands between them and
    the stream (norms, layer scales, stochastic depth). Without parallel units and rows beside the tokens every call
    goes to timm's own forward.
    """

    drop_path1: Any
    drop_path2: Any

    def attention_branch(self, rows: Rows, *args: Any, **arguments: Any) -> tuple[Rows, Rows | None]:
        """Run the attention branch.

        Args:
            rows: The residual stream, and rows beside it.
            *args: What timm hands to the block besides.
            **arguments: The same, by name.

        Returns:
            What is added to the stream, and what the branch's norm made of it; None where the norm comes last.
        """
        raise NotImplementedError

    def mlp_branch(self, rows: Rows) -> tuple[Rows, Rows | None]:
        """Run the MLP branch; like `attention_branch`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *args: Any,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        prompts: Tensor | None = None,
        queries: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Run the block.

        Args:
            x: The residual stream, (B, N, D) or (B, H, W, D).
            *args: What timm hands to it besides.
            grid: Height and width of the patches among tokens, where `wants_grid` asks for it.
            prefix: Number of tokens in front of them.
            prompts: (B, T, D) rows that stand in every window.
            queries: (B, Q, D) rows that read the tokens.
            **arguments: What timm hands to it by name.

        Returns:
            The shape of `x`; `Rows` where there are some beside it.
        """
        units = tuple(self.units(ParallelUnit))
        rows = Rows(x, prompts, queries)
        if not units and rows.alone:
            return super().forward(x, *args, **arguments)
        added, normed = self.attention_branch(rows, *args, **arguments)
        rows = rows.plus(added, *self._terms("attn", units, (rows, normed), grid, prefix))
        added, normed = self.mlp_branch(rows)
        rows = rows.plus(added, *self._terms("mlp", units, (rows, normed), grid, prefix))
        return rows.tokens if prompts is None and queries is None else rows

    def _terms(
        self,
        place: str,
        units: tuple[ParallelUnit, ...],
        readable: tuple[Rows, Rows | None],
        grid: tuple[int, int] | None,
        prefix: int,
    ) -> Iterator[Rows]:
        """Compute what the units beside one branch give, from the stream or from what the norm made of it."""
        stream, normed = readable
        drop = self.drop_path1 if place == "attn" else self.drop_path2
        for unit in units:
            if unit.place == place:
                read = stream if unit.reads == "stream" else normed
                assert read is not None, "methods refuse families that normalise behind their branches"
                beside = (None if part is None else _alone(unit, part) for part in (read.prompts, read.queries))
                term = Rows(unit.branch(read.tokens, grid, prefix), *beside).each(lambda x: x.to(stream.tokens.dtype))
                yield term.each(drop) if unit.drops else term

    def wants_grid(self) -> bool:
        """Tell whether an active unit looks at tokens as an image."""
        return any(unit.needs_grid for unit in self.units(ParallelUnit))

    def acts(self) -> bool:
        """Tell whether anything acts here, or passes."""
        return super().acts() or self.passes()

    def no_plain_form(self) -> str | None:
        """Say why no plain block does the same, or None where one does."""
        if any(True for _ in self.units(ParallelUnit)):
            return "no plain block has a term beside a branch"
        return "no plain block takes rows beside its tokens" if self.passes() else super().no_plain_form()


def _alone(unit: ParallelUnit, rows: Tensor) -> Tensor:
    """Compute a term for rows beside the tokens, each of them an image of one pixel, (B, R, D)."""
    pixels = rows.flatten(0, 1)[:, None, None]
    return unit.branch(pixels, None, 0).flatten(1).unflatten(0, rows.shape[:2])
