"""The host of a block: the residual stream with room for terms beside the two branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vispeft.adapters.hosts import Host
from vispeft.adapters.units import ParallelUnit

__all__ = ["BlockHost"]


class BlockHost(Host):
    """An adapted block: ``x1 = x + attention(x) + terms(x)``, then ``x1 + mlp(x1) + terms(x1)``.

    A family says how it runs its two branches, with timm's own submodules and everything that stands between them and
    the stream (norms, layer scales, stochastic depth). Without parallel units every call goes to timm's own forward.
    """

    drop_path1: Any
    drop_path2: Any

    def attention_branch(self, x: Tensor, *args: Any, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Run the attention branch.

        Args:
            x: The residual stream.
            *args: What timm hands to the block besides.
            **arguments: The same, by name.

        Returns:
            What is added to the stream, and what the branch's norm made of it; None where the norm comes last.
        """
        raise NotImplementedError

    def mlp_branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the MLP branch; like `attention_branch`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *args: Any, grid: tuple[int, int] | None = None, prefix: int = 0, **arguments: Any
    ) -> Tensor:
        """Run the block.

        Args:
            x: The residual stream, (B, N, D) or (B, H, W, D).
            *args: What timm hands to it besides.
            grid: Height and width of the patches among tokens, where `wants_grid` asks for it.
            prefix: Number of tokens in front of them.
            **arguments: What timm hands to it by name.

        Returns:
            The shape of `x`.
        """
        units = tuple(self.units(ParallelUnit))
        if not units:
            out: Tensor = super().forward(x, *args, **arguments)
            return out
        added, normed = self.attention_branch(x, *args, **arguments)
        x = x + added + sum(self._terms("attn", units, (x, normed), grid, prefix))
        added, normed = self.mlp_branch(x)
        return x + added + sum(self._terms("mlp", units, (x, normed), grid, prefix))

    def _terms(
        self,
        place: str,
        units: tuple[ParallelUnit, ...],
        readable: tuple[Tensor, Tensor | None],
        grid: tuple[int, int] | None,
        prefix: int,
    ) -> Iterator[Tensor]:
        """Compute what the units beside one branch give, from the stream or from what the norm made of it."""
        stream, normed = readable
        drop = self.drop_path1 if place == "attn" else self.drop_path2
        for unit in units:
            if unit.place == place:
                read = stream if unit.reads == "stream" else normed
                assert read is not None, "methods refuse families that normalise behind their branches"
                term = unit.branch(read, grid, prefix).to(stream.dtype)
                yield drop(term) if unit.drops else term

    def wants_grid(self) -> bool:
        """Tell whether an active unit looks at tokens as an image."""
        return any(unit.needs_grid for unit in self.units(ParallelUnit))

    def no_plain_form(self) -> str | None:
        """Say why no plain block does the same, or None where one does."""
        parallel = any(True for _ in self.units(ParallelUnit))
        return "no plain block has a term beside a branch" if parallel else super().no_plain_form()
