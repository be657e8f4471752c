"""Queries of several adapters in one stream: they read the tokens of one pass, and nothing reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vispeft.core.model_units import QueryUnit, StreamUnit
from vispeft.core.streams import Stream

__all__ = ["JointQueries", "Reader"]


@dataclass(frozen=True)
class Reader:
    """The queries of one adapter, and the rows of the batch that they read."""

    name: str
    """The adapter."""
    unit: QueryUnit
    """Its queries."""
    rows: tuple[int, ...]
    """The rows, each once."""


class _JointStream(Stream):
    """The queries of adapters that read the same blocks, side by side.

    Rows of a stream attend to the tokens and never to each other, so that each query reads what it would read alone.
    """

    def __init__(self, name: str, readers: Sequence[Reader], batch: int, device: torch.device) -> None:
        self.name, self.readers, self.blocks = name, tuple(readers), readers[0].unit.blocks
        self.queries = [reader.unit.query_rows(1) for reader in readers]
        places: list[list[int]] = [[] for _ in range(batch)]
        self.starts: dict[str, Tensor] = {}
        first = 0
        for reader in readers:
            starts = []
            for row in reader.rows:
                starts.append(len(places[row]))
                places[row] += range(first, first + reader.unit.length)
            self.starts[reader.name] = torch.tensor(starts, device=device)
            first += reader.unit.length
        longest = max(map(len, places))
        # A row that is asked for less gets the first query again, whose output nobody reads.
        self.index = torch.tensor([own + [0] * (longest - len(own)) for own in places], device=device)

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the queries of a block, (B, queries, width)."""
        found = [own[block][0] for own in self.queries if block in own]
        return torch.cat(found)[self.index] if found else None

    def keeps(self, block: int) -> bool:
        """Keep the rows of each block that is read."""
        return block in self.blocks

    def of(self, reader: Reader, kept: Sequence[Tensor]) -> list[Tensor]:
        """Return what the queries of an adapter read, for its rows.

        Args:
            reader: The adapter.
            kept: The stream's rows behind each block that is read, (B, queries, width).

        Returns:
            (rows, length, width) for each block.
        """
        rows = torch.tensor(reader.rows, device=self.index.device)[:, None]
        places = self.starts[reader.name][:, None] + torch.arange(reader.unit.length, device=self.index.device)
        return [block[rows, places] for block in kept]


class JointQueries(StreamUnit):
    """The queries of several adapters, as units of one pass: one stream for all that read the same blocks."""

    def __init__(self, readers: Sequence[Reader], batch: int, device: torch.device) -> None:
        """Sort the queries by the blocks they read.

        Args:
            readers: The adapters and their rows.
            batch: Number of rows of the batch.
            device: Where the model is.
        """
        super().__init__()
        groups: dict[tuple[int, ...], list[Reader]] = {}
        for reader in readers:
            groups.setdefault(reader.unit.blocks, []).append(reader)
        self._streams = tuple(
            _JointStream(f"queries_{number}", group, batch, device) for number, group in enumerate(groups.values())
        )

    def streams(self) -> Sequence[Stream]:
        """Return the streams."""
        return self._streams

    def reads(self, kept: dict[str, list[Tensor]]) -> list[tuple[Reader, list[Tensor]]]:
        """Sort what was read by adapter.

        Args:
            kept: Kept rows by stream (`RunResult.kept`).

        Returns:
            Each adapter, and (rows, length, width) for each block that it reads.
        """
        return [(reader, stream.of(reader, kept[stream.name])) for stream in self._streams for reader in stream.readers]
