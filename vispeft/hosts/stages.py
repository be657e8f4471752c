"""The forward of a hierarchical model with room for prompts in its windows and for queries that read its blocks.

Prompts and maps stay apart: a block takes both and gives both. Nothing else travels between blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor

from vispeft.core.units import SideUnit, TokensUnit
from vispeft.errors import ConfigError
from vispeft.hosts.reading import joined, taken_apart
from vispeft.hosts.side import ENTRY, SideHost

__all__ = ["Passage", "StageModelHost"]


@dataclass
class Passage:
    """What came out of a run through the stages."""

    map: Tensor
    """(B, H, W, D) behind the last block that was run."""
    prompts: Tensor | None = None
    """(B, T, D) there."""
    levels: list[Tensor] = field(default_factory=list)
    """The map behind each stage."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """The maps behind chosen blocks; under `ENTRY` the one in front of the first."""
    reads: list[Tensor] = field(default_factory=list)
    """What queries read, (B, Q, D) of each block that is read."""


class StageModelHost(SideHost):
    """An adapted model of stages, with maps in NHWC.

    Without prompts, queries and a network beside the model, every call goes to timm's own forward.
    """

    patch_embed: Any
    norm: Any
    head: Any
    global_pool: str

    def stages(self) -> list[Any]:
        """List timm's stages, patch merging first in each."""
        return list(self.layers)  # type: ignore[arg-type]

    def hidden(self, images: Tensor, blocks: frozenset[int], depth: int) -> dict[int, Tensor]:
        """Run whole stages and give (B, H, W, D) behind chosen blocks, and in front of the first one."""
        units = tuple(self.units(TokensUnit))
        return self.run_stages(images, units, blocks, self._ends().index(depth) + 1).blocks

    def checkpoints(self) -> bool:
        """Tell whether blocks are to be computed again in the backward pass."""
        return any(stage.grad_checkpointing for stage in self.stages())

    def _ends(self) -> list[int]:
        """Count the blocks up to the end of each stage."""
        return list(accumulate(len(stage.blocks) for stage in self.stages()))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalised map (B, H, W, D), or rows (B, N, D) where prompts or queries are pooled too."""
        side = self.side()
        if side is not None:
            return self.features_beside(side, self.read_hidden(side, x, frozenset(), side.depth), side.depth)
        units = tuple(self.units(TokensUnit))
        if not units and self.reader() is None:
            out: Tensor = super().forward_features(x)
            return out
        return self._pooled_rows(self.run_stages(x, units), units)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify as timm does, also rows.

        Args:
            x: What `forward_features` gave.
            pre_logits: Leave the classifier out.
        """
        queries = self.reader()
        if queries is not None:
            x, reads = taken_apart(x, queries, 0)
            x = self.head.drop(queries.features(self.head.global_pool(x.unsqueeze(1)), reads))
            return x if pre_logits else self.head.fc(x)
        x = x.unsqueeze(1) if x.ndim == 3 else x
        out: Tensor = super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]  # timm's
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the maps behind chosen stages, as timm does; prompts never show in them."""
        units, side = tuple(self.units(TokensUnit)), self.side()
        if not units and side is None and self.reader() is None:
            return super().forward_intermediates(
                x,
                indices,
                norm=norm,
                stop_early=stop_early,
                output_fmt=output_fmt,
                intermediates_only=intermediates_only,
            )
        if output_fmt != "NCHW":
            raise ConfigError(f"forward_intermediates(output_fmt={output_fmt!r}): use 'NCHW'.")
        count = len(self.stages())
        taken, last = feature_take_indices(count, indices)
        if side is not None:
            final, maps = self._levels_beside(side, x, taken, last if stop_early else count - 1)
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
            return maps if intermediates_only else (final, maps)
        passage = self.run_stages(x, units, depth=last + 1 if stop_early else count)
        maps = [
            self.norm(level) if norm and index == count - 1 else level
            for index, level in enumerate(passage.levels)
            if index in taken
        ]
        maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        if intermediates_only:
            return maps
        whole = len(passage.levels) == count
        return (self._pooled_rows(passage, units) if whole else passage.map), maps

    def _levels_beside(
        self, side: SideUnit, images: Tensor, taken: Sequence[int], last: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Run a network beside the model: what leaves the last stage that is run, and the maps behind chosen ones."""
        ends = self._ends()[: last + 1]
        hidden = self.read_hidden(side, images, frozenset(end - 1 for end in ends), ends[-1])
        states = side.climb(hidden, ends[-1], self.checkpoints())

        def level(stage: int) -> Tensor:
            if ends[stage] == side.depth:
                return side.leave(states[-1]).to(hidden[ENTRY].dtype)
            found = side.level(stage, states[ends[stage] - 1])
            return hidden[ends[stage] - 1] if found is None else found.to(hidden[ENTRY].dtype)

        return level(last), [level(stage) for stage in sorted(taken)]

    def run_stages(
        self,
        images: Tensor,
        units: Sequence[TokensUnit],
        taken: frozenset[int] = frozenset(),
        depth: int | None = None,
    ) -> Passage:
        """Run the stages.

        Args:
            images: (B, C, H, W).
            units: What inserts prompts.
            taken: Blocks whose maps are wanted.
            depth: Number of stages to run; None for all.
        """
        self.check_size(images)
        reader = self.reader()
        entering = self.patch_embed(images)
        passage = Passage(entering if reader is None else reader.enter(entering))
        passage.blocks[ENTRY] = passage.map
        number, stages = 0, self.stages()[:depth]
        blocks = sum(len(stage.blocks) for stage in self.stages())
        coming = [unit.tokens(0, images.shape[0]) for unit in units]
        for stage in stages:
            passage.map = stage.downsample(passage.map)
            passage.prompts = _merged(stage.downsample, passage.prompts)
            for block in stage.blocks:
                passage.prompts = _replaced(passage.prompts, coming, units, passage.map)
                number += 1
                last = number == blocks
                coming = [None if last else unit.tokens(number, images.shape[0]) for unit in units]
                # Prompts that the next block replaces need no rows of their own behind this one.
                keep = self._pools_prompts(units) if last else any(value is None for value in coming)
                queries = None if reader is None else reader.asked(number - 1, images.shape[0])
                self._through(block, passage, queries, keep, bool(stage.grad_checkpointing))
                if number - 1 in taken:
                    passage.blocks[number - 1] = passage.map
            passage.levels.append(passage.map)
        return passage

    def _through(self, block: Any, passage: Passage, queries: Tensor | None, keep: bool, checkpoints: bool) -> None:
        beside = passage.prompts is not None or queries is not None
        queries = None if queries is None else queries.to(passage.map.dtype)
        arguments: dict[str, Any] = {"prompts": passage.prompts, "queries": queries, "keep": keep} if beside else {}
        call = (checkpoint, block) if checkpoints else (block,)
        out = call[0](*call[1:], passage.map, **arguments)
        passage.map, passage.prompts = (out.tokens, out.prompts) if beside else (out, None)
        if queries is not None:
            passage.reads.append(out.queries)

    def _pools_prompts(self, units: Sequence[TokensUnit]) -> bool:
        return bool(self.global_pool) and bool(units) and units[-1].pool != "patches"

    def _pooled_rows(self, passage: Passage, units: Sequence[TokensUnit]) -> Tensor:
        """Give the map, or the rows that pooling is to see."""
        tokens, reader = self.norm(passage.map), self.reader()
        if self._pools_prompts(units) and passage.prompts is not None:
            prompts = self.norm(passage.prompts)
            tokens = torch.cat([prompts, tokens.flatten(1, 2)], dim=1) if units[-1].pool == "all" else prompts
        if reader is None:
            return tokens
        return joined(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens, passage.reads, reader, 0)


def _merged(merging: Any, prompts: Tensor | None) -> Tensor | None:
    """Take prompts through patch merging: each is a map of four equal pixels (public code: the prompt four times)."""
    if prompts is None:
        return None
    images, number, width = prompts.shape
    pixels = prompts.reshape(images * number, 1, 1, width).expand(-1, 2, 2, -1)
    merged = merging(pixels)
    return merged[:, 0, 0].unflatten(0, (images, number))


def _replaced(
    prompts: Tensor | None, coming: Sequence[Tensor | None], units: Sequence[TokensUnit], like: Tensor
) -> Tensor | None:
    """Put each unit's own prompts of the next block in place of those that came out of the one before."""
    if all(value is None for value in coming):
        return prompts
    old = [None] * len(units) if prompts is None else prompts.split([unit.length for unit in units], 1)
    rows = [was if value is None else value.to(like.dtype) for value, was in zip(coming, old, strict=True)]
    return torch.cat([part for part in rows if part is not None], dim=1)
