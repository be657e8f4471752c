"""Units of a whole model: tokens and streams in its sequence, queries that read its blocks, a network beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vispeft.core.streams import Stream
from vispeft.core.units import Unit

__all__ = ["QueryStream", "QueryUnit", "SideUnit", "StreamUnit", "TokensUnit"]


class StreamUnit(Unit):
    """A unit that passes streams of its own through the blocks (`Unit.streams`)."""

    kind = "stream"


class QueryUnit(Unit):
    """Learned queries that attend to the tokens of the blocks, and to which nothing attends."""

    kind = "queries"
    identity_at_start = False

    length: int
    """Number of queries of each block."""
    blocks: tuple[int, ...]
    """The blocks that are read."""
    widths: tuple[int, ...]
    """Their widths."""
    detach_hidden: bool
    """Whether the backbone runs without gradients."""

    def streams(self) -> Sequence[Stream]:
        """Pass the queries through the blocks."""
        return (QueryStream(self),)

    def change_tokens(self, tokens: Tensor) -> Tensor:
        """Change the input of the first block in training mode, if the method needs it."""
        return tokens

    def query_rows(self, batch: int) -> Mapping[int, Tensor]:
        """Return the queries for one pass; it is called once for each.

        Args:
            batch: Number of images.

        Returns:
            By block that is read: (batch, length, width of the block).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement query_rows.")

    def features(self, pooled: Tensor, reads: Sequence[Tensor]) -> Tensor:
        """Compute the input of the classifier.

        Args:
            pooled: The backbone's own feature (batch, width).
            reads: The output rows of the queries in each block that is read, (batch, length, width of the block).

        Returns:
            (batch, features).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement features.")


class QueryStream(Stream):
    """The stream of a unit's queries in one pass: new rows in each block that is read, whose output rows are kept."""

    name = "queries"

    def __init__(self, unit: QueryUnit) -> None:
        """Create the stream.

        Args:
            unit: The unit with the queries.
        """
        self.unit = unit
        self.shapes = tuple((unit.length, width) for width in unit.widths)
        self.queries: Mapping[int, Tensor] | None = None

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the block's queries."""
        if self.queries is None:
            self.queries = self.unit.query_rows(tokens.shape[0])
        return self.queries.get(block)

    def keeps(self, block: int) -> bool:
        """Keep the rows of each block that is read."""
        return block in self.unit.blocks

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Compute the input features of the classifier."""
        return self.unit.features(pooled, kept)


class TokensUnit(Unit):
    """Learned tokens in the sequence; the family's model host inserts them."""

    kind = "tokens"
    identity_at_start = False

    length: int
    """Number of tokens."""
    pool: str
    """The rows that average pooling sees: ``all``, ``patches`` or ``prompts``."""

    def makes_streams(self, layout: str) -> bool:
        """Return whether the tokens are a stream: beside a map they stand in its windows."""
        return layout == "NHWC"

    def tokens(self, block: int, batch: int) -> Tensor | None:
        """Return the learned tokens at the input of a block.

        Args:
            block: Index of the block.
            batch: Number of images.

        Returns:
            (batch, length, width), or None to pass on those from the previous block; a length of 0 removes them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement tokens.")

    def replaces(self, block: int) -> bool:
        """Return whether a block gets new tokens in place of those from the previous block.

        Args:
            block: Index of the block.
        """
        return False


class SideUnit(Unit):
    """A network beside the backbone: it reads the outputs of the blocks and computes the output of the model."""

    kind = "side"
    identity_at_start = False

    reads: frozenset[int]
    """The blocks whose outputs it reads; the input of the first block is always read, as block -1."""
    depth: int
    """Number of blocks of the backbone."""
    detach_hidden: bool
    """Whether the backbone runs without gradients."""

    def climb(self, hidden: Mapping[int, Tensor], depth: int, checkpoints: bool) -> list[Tensor]:
        """Run the network.

        Args:
            hidden: The output of each block it reads, by block.
            depth: Number of backbone blocks that were run.
            checkpoints: Whether to use activation checkpointing for its blocks.

        Returns:
            Its state after each of these blocks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement climb.")

    def project_out(self, state: Tensor) -> Tensor:
        """Project a state of the last stage to the backbone's width.

        Args:
            state: One of the states from `climb`.

        Returns:
            The shape of the output of the backbone's last block.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement project_out.")

    def stage_map(self, stage: int, state: Tensor) -> Tensor | None:
        """Project the state after an earlier stage to the backbone's width.

        Args:
            stage: Index of the stage.
            state: The state after its last block.

        Returns:
            The shape of the stage's output, or None to use the backbone's own map.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement stage_map.")

    def resize_with(self, blocks: Sequence[nn.Module]) -> None:
        """Adapt to the backbone's blocks after a change of the image size.

        Args:
            blocks: All blocks of the backbone.
        """
