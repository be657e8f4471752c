"""Streams: rows that pass the blocks beside the tokens, by name and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Stream", "StreamRule", "TaskStream"]


class StreamRule(NamedTuple):
    """How the attention of a block treats the rows of a stream."""

    seen: bool = False
    """Whether the tokens attend to the rows: they are keys and values, on Swin in every window of their image."""
    reads: bool = True
    """Whether the rows attend to the tokens and to seen rows. Rows that are seen but do not read are dropped after the
    block; rows that are neither seen nor read bypass the attention unchanged."""


class Stream:
    """A named stream of rows beside the tokens: its start, its treatment in each block, and its output features.

    Its rows pass through the norms, layer scales and MLPs of the blocks like tokens. Subclass it and return it from
    `Unit.streams`; a stream may also start inside a block, from a `BranchUnit`.
    """

    name: str
    """Name in the bundle of all streams."""
    shapes: tuple[tuple[int, int], ...] = ()
    """Rows and width of each tensor kept for the classifier, in the order of the blocks; empty for none."""

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the stream's rows at the input of a block.

        Args:
            block: Index of the block.
            present: The rows from the previous block, if any.
            tokens: The input tokens of the block, (B, N, D) or a map (B, H, W, D).

        Returns:
            Rows (B, R, width of the block) or a map, or None for none.
        """
        return present

    def merge(self, merging: nn.Module, rows: Tensor) -> Tensor:
        """Pass the rows through patch merging: a map directly, and each row as a map of four equal pixels.

        Rows are repeated four times in the public code of VPT (KMnP/vpt).

        Args:
            merging: timm's module, which takes (B, H, W, D).
            rows: (B, R, D), or a map (B, H, W, D).
        """
        if rows.ndim == 4:
            merged: Tensor = merging(rows)
            return merged
        pixels = rows.reshape(-1, 1, 1, rows.shape[-1]).expand(-1, 2, 2, -1)
        return merging(pixels)[:, 0, 0].unflatten(0, rows.shape[:2])

    def rule(self, block: int) -> StreamRule:
        """Return how the attention of a block treats the rows.

        Args:
            block: Index of the block.
        """
        return StreamRule()

    def keeps(self, block: int) -> bool:
        """Return whether the rows after a block are kept in the run result.

        Args:
            block: Index of the block.
        """
        return False

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Compute the input features of the classifier.

        Args:
            pooled: The features so far (B, width).
            kept: The tensors of `shapes`, each with a leading batch axis.

        Returns:
            (B, features).
        """
        return pooled


class TaskStream(Stream):
    """The stream of one task: it starts behind a layer of a block, as a `BranchUnit` says, and ends with the block."""

    def __init__(self, task: str) -> None:
        """Name the stream.

        Args:
            task: The task.
        """
        self.name = task

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Bring nothing into a block."""
        return None

    def rule(self, block: int) -> StreamRule:
        """Keep the attention as it is."""
        return StreamRule(seen=False, reads=False)
