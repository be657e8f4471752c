"""The forward pass of a hierarchical model: maps in stages, prompts in the windows, and other streams.

Prompts and maps stay separate: a block takes and returns both, and blocks share no other state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from vispeft.core.model_units import TokensUnit
from vispeft.core.streams import Stream, StreamRule
from vispeft.core.units import Unit
from vispeft.errors import ConfigError
from vispeft.hosts.running import ENTRY, RunningHost, RunResult, pooled_rows, token_units
from vispeft.hosts.streams import Streams

__all__ = ["StageModelHost"]

PROMPTS = "prompts"


class PromptStream(Stream):
    """The prompts of all units, which stand in every window; a unit's new prompts replace its earlier ones."""

    name = PROMPTS

    def __init__(self, units: Sequence[TokensUnit], blocks: int, pooled: bool) -> None:
        """Make the stream.

        Args:
            units: The units that insert prompts.
            blocks: Number of blocks of the model.
            pooled: Whether pooling includes the rows after the last block.
        """
        self.units, self.blocks, self.pooled = units, blocks, pooled
        self._lengths: list[int] = []

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Replace each unit's prompts from the previous block by its new ones for this block, if any."""
        coming = [unit.tokens(block, tokens.shape[0]) for unit in self.units]
        if all(value is None for value in coming):
            return present
        old = [None] * len(coming) if present is None else present.split(self._lengths, 1)
        rows = [was if value is None else value.to(tokens.dtype) for value, was in zip(coming, old, strict=True)]
        self._lengths = [0 if part is None else part.shape[1] for part in rows]
        return torch.cat([part for part in rows if part is not None], dim=1)

    def rule(self, block: int) -> StreamRule:
        """Let the tokens see the prompts; prompts that the next block replaces need no output rows."""
        last = block == self.blocks - 1
        needed = self.pooled if last else any(not unit.replaces(block + 1) for unit in self.units)
        return StreamRule(seen=True, reads=needed)


class StageModelHost(RunningHost):
    """An adapted model of stages, with maps in NHWC.

    Without prompts, streams and a network beside the model, every call goes to timm's own forward pass.
    """

    num_prefix_tokens = 0
    patch_embed: Any
    head: Any
    global_pool: str

    def stages(self) -> list[Any]:
        """List timm's stages, patch merging first in each."""
        return list(self.layers)  # type: ignore[arg-type]

    def checkpoints(self) -> bool:
        """Return whether activation checkpointing is on."""
        return any(stage.grad_checkpointing for stage in self.stages())

    def block_ends(self) -> list[int]:
        """Return the number of blocks up to the end of each stage."""
        return list(accumulate(len(stage.blocks) for stage in self.stages()))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalised map (B, H, W, D), or rows (B, N, D) where prompts or queries are pooled too."""
        if not self.runs_itself():
            out: Tensor = super().forward_features(x)
            return out
        return self.features(self.run(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify as timm does, maps as well as rows.

        Args:
            x: The output of `forward_features`.
            pre_logits: Skip the classifier.
        """
        if not self.answering():
            x = x.unsqueeze(1) if x.ndim == 3 else x
            out: Tensor = super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]  # timm's
            return out
        x, kept = self.unpacked(x)
        x = self.head.global_pool(x.unsqueeze(1))
        x = self.head.drop(self.with_streams(x, kept))
        return x if pre_logits else self.head.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the maps after chosen stages, as timm does, without prompts."""
        if not self.runs_itself():
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
        result = self.run(x, depth=self.block_ends()[last if stop_early else count - 1])
        levels = [self.shown(level) for level in result.stages]
        maps = [
            _channels_first(self.norm(level) if norm and index == count - 1 and not result.final else level)
            for index, level in enumerate(levels)
            if index in taken
        ]
        if intermediates_only:
            return maps
        return (self.features(result) if result.complete else self.shown(result.streams)), maps

    def maps_of(self, result: RunResult, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Return the maps behind stages of a run, that of the last one normalised, (B, D, h, w) each."""
        last = len(self.stages()) - 1
        levels = [(index, self.shown(result.stages[index])) for index in sorted(indices)]
        normed = [self.norm(level) if index == last and not result.final else level for index, level in levels]
        return [_channels_first(level) for level in normed]

    def task_maps(
        self, images: Tensor, tasks: Sequence[str], taps: Sequence[int], merged: bool = True, norm: bool = True
    ) -> dict[str, list[Tensor]]:
        """Compute the maps of several tasks in one pass, by default behind the patch merging that follows a stage.

        No patch merging follows the last stage, and no norm any of them (public code of MTLoRA, scale-lab/MTLoRA).
        """
        result = self.run(images)
        ends = [*result.entries[1:], result.streams] if merged else result.stages
        levels = [ends[tap] for tap in taps]
        return {task: [_channels_first(level.beside.get(task, level.tokens)) for level in levels] for task in tasks}

    def backbone(
        self, images: Tensor, units: Sequence[Unit], taken: frozenset[int], depth: int, **arguments: Any
    ) -> RunResult:
        """Run whole stages, with prompts in the windows."""
        entering = self.entered(self.patch_embed(images))
        inserting, streams = token_units(units), self.streams_of(units)
        ends = self.block_ends()
        pool = pooled_rows(inserting)
        if inserting:
            streams.insert(0, PromptStream(inserting, ends[-1], bool(self.global_pool) and pool != "patches"))
        result = RunResult(Streams(entering), {ENTRY: entering}, pool=pool)
        index = 0
        for stage, end in zip(self.stages(), ends, strict=True):
            if index >= depth:
                break
            result.streams = self._merged(stage.downsample, result.streams, streams)
            result.entries.append(result.streams)
            for block in stage.blocks:
                self.pass_block(block, index, result, streams, **arguments)
                if index in taken:
                    result.taps[index] = result.tokens
                index += 1
            result.stages.append(result.streams)
            assert index == end
        result.complete = index == ends[-1]
        return result

    @staticmethod
    def _merged(merging: Any, bundle: Streams, streams: Sequence[Stream]) -> Streams:
        """Pass tokens and streams through patch merging."""
        rules = {stream.name: stream for stream in streams}
        beside = {name: rules[name].merge(merging, rows) for name, rows in bundle.beside.items()}
        return Streams(merging(bundle.tokens), beside, bundle.rules)

    def features(self, result: RunResult) -> Tensor:
        """Normalise the map and insert the rows to be pooled."""
        if result.final:
            return result.tokens
        tokens = self.norm(self.shown(result.streams))
        prompts = result.streams.beside.get(PROMPTS)
        if prompts is not None and self.global_pool and result.pool != "patches":
            prompts = self.norm(prompts)
            tokens = torch.cat([prompts, tokens.flatten(1, 2)], dim=1) if result.pool == "all" else prompts
        return self.with_kept(tokens, result)


def _channels_first(level: Tensor) -> Tensor:
    """Convert a map (B, H, W, D) to (B, D, H, W)."""
    return level.permute(0, 3, 1, 2).contiguous()
