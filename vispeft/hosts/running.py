"""The forward pass of a model by its host: inserted tokens, streams beside them, and a network beside the model.

Tokens and streams pass through the blocks as arguments and results. Modules keep no state, so activation checkpointing
and concurrent calls are safe. A network beside the model runs after the backbone, on the outputs of its blocks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vispeft.core.model_units import SideUnit, TokensUnit
from vispeft.core.streams import Stream
from vispeft.core.units import Unit
from vispeft.errors import ConfigError
from vispeft.hosts.block import BlockHost
from vispeft.hosts.model import ModelHost
from vispeft.hosts.reading import joined, taken_apart
from vispeft.hosts.streams import Streams

__all__ = ["ENTRY", "RunResult", "Rung", "RunningHost", "pooled_rows", "token_units"]

ENTRY = -1
"""Key of the first block's input in dictionaries of block outputs."""


@dataclass(frozen=True)
class Rung:
    """The size of a network beside one block of a backbone."""

    block: int
    """Index of the block."""
    stage: int
    """Its stage."""
    wide: int
    """Width of the backbone at that block."""
    width: int
    """Width of the network."""
    heads: int
    """Its attention heads."""
    hidden: int
    """Width inside its MLP."""


@dataclass
class RunResult:
    """The run result: one sequence of tokens, or a pyramid of maps."""

    streams: Streams
    """Tokens and streams after the last block that was run; in a sequence the tokens include inserted ones, and merged
    ones are single."""
    taps: dict[int, Tensor] = field(default_factory=dict)
    """Tokens after chosen blocks, without inserted ones, and a merged one for each of its patches; under `ENTRY` the
    input of the first block."""
    stages: list[Streams] = field(default_factory=list)
    """The bundle after each stage, before patch merging."""
    entries: list[Streams] = field(default_factory=list)
    """The bundle at the input of each stage's blocks, after patch merging."""
    branched: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """In a sequence, the streams that started inside chosen blocks, by block, without inserted tokens."""
    passed: dict[int, Tensor] = field(default_factory=dict)
    """Which patch tokens passed through the MLP, (B, N, 1) or (B, H, W, 1), by block with units that decide it."""
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    """Rows by stream, after each block for which the stream keeps them."""
    inserted: tuple[int, ...] = ()
    """Number of tokens inserted by each unit."""
    pool: str = "patches"
    """The rows that average pooling includes: ``all``, ``patches`` or ``prompts``."""
    complete: bool = True
    """Whether all blocks were run."""
    final: bool = False
    """Whether the tokens are final features, computed by a network beside the model, with no norm to follow."""

    @property
    def tokens(self) -> Tensor:
        """The tokens after the last block that was run."""
        return self.streams.tokens


class RunningHost(ModelHost):
    """An adapted model with a forward pass of its own; each family implements the steps."""

    merges_tokens: ClassVar[bool] = False
    """Whether the family supports token merging: its blocks take one sequence, whose positions only enter before it."""
    takes_side: ClassVar[bool] = False
    """Whether the family supports a network beside the model, whose blocks `side_block` creates."""
    num_prefix_tokens: int
    norm: Any

    def checkpoints(self) -> bool:
        """Return whether activation checkpointing is on."""
        raise NotImplementedError

    def backbone(
        self, images: Tensor, units: Sequence[Unit], taken: frozenset[int], depth: int, **arguments: Any
    ) -> RunResult:
        """Run the backbone.

        Args:
            images: (B, C, H, W).
            units: The acting units with tokens, streams or queries.
            taken: Blocks whose outputs to return.
            depth: Number of blocks to run.
            **arguments: Further arguments of every block.
        """
        raise NotImplementedError

    def block_ends(self) -> list[int]:
        """Return the number of blocks up to the end of each stage."""
        raise NotImplementedError

    def features(self, result: RunResult) -> Tensor:
        """Compute the output of `forward_features` from a run.

        Args:
            result: The run of all blocks.
        """
        raise NotImplementedError

    def maps_of(self, result: RunResult, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Return maps of a run, as `forward_intermediates` does with ``norm=True``.

        Args:
            result: The run; of a plain model, with these blocks taken.
            images: Its images.
            indices: Blocks of a plain model, stages of others, from 0; in rising order.

        Returns:
            (B, D, h, w) each.
        """
        raise NotImplementedError

    def task_maps(
        self, images: Tensor, tasks: Sequence[str], taps: Sequence[int], merged: bool = True, norm: bool = True
    ) -> dict[str, list[Tensor]]:
        """Compute the maps of several tasks in one pass, from streams of their names that start inside blocks.

        Args:
            images: (B, C, H, W).
            tasks: The tasks; one without a stream at a tap gets the shared map there.
            taps: Stages, or blocks of a plain model, in rising order.
            merged: Take the maps behind the patch merging that follows a stage, not those in front of it; without
                effect on a plain model.
            norm: Apply the last norm to the maps of a plain model; without effect on one of stages.

        Returns:
            Maps (B, C, h, w) by task, in the order of `taps`.
        """
        raise NotImplementedError

    def shown(self, bundle: Streams) -> Tensor:
        """Return the stream of the chosen task, or the tokens where there is none.

        Args:
            bundle: Tokens and streams behind a block or a stage.
        """
        task = self.routing.present().task
        if task is None or all(stream.name != task for stream in self.acting.starting):
            return bundle.tokens
        return bundle.beside.get(task, bundle.tokens)

    def run(
        self,
        images: Tensor,
        units: Sequence[Unit] = (),
        *,
        taken: frozenset[int] = frozenset(),
        depth: int | None = None,
        instead: bool = False,
        **arguments: Any,
    ) -> RunResult:
        """Run the adapted model and hand out all that leaves it.

        Args:
            images: (B, C, H, W).
            units: Units that act besides those of the route, made for this batch and not attached: tokens whose number
                may differ by block, streams, queries.
            taken: Blocks whose outputs to return.
            depth: Number of blocks to run, on a pyramid up to the end of a stage; None for all.
            instead: Leave out the tokens, streams and queries of the route; its other units act.
            **arguments: Further arguments of every block; ``whole=True`` lets all tokens pass through all MLPs,
                whatever units decide.

        Returns:
            The result; give it to `features` for the output of `forward_features`.

        Raises:
            BackboneError: If the images do not fit the model.
        """
        self.check_size(images)
        acting = self.acting
        depth = self.block_ends()[-1] if depth is None else depth
        every = [*units] if instead else [*acting.tokens, *acting.stream, *acting.queries, *units]
        if not acting.side:
            return self.backbone(images, every, taken, depth, **arguments)
        return self._beside(acting.side[0], images, every, taken, depth)

    def _beside(
        self, side: SideUnit, images: Tensor, units: Sequence[Unit], taken: frozenset[int], depth: int
    ) -> RunResult:
        """Run the backbone, without gradients unless the network asks for them, and then the network."""
        ends = [end for end in self.block_ends() if end <= depth]
        hidden = self.read_hidden(side, images, frozenset(end - 1 for end in ends), depth, units)
        states = side.climb(hidden, depth, self.checkpoints())
        dtype = hidden[ENTRY].dtype

        def state(block: int) -> Tensor:
            stage = next(i for i, end in enumerate(self.block_ends()) if block < end)
            if len(self.block_ends()) == 1 or block == side.depth - 1:
                return side.project_out(states[block]).to(dtype)
            found = side.stage_map(stage, states[block])
            return hidden[block] if found is None else found.to(dtype)

        stages = [Streams(state(end - 1)) for end in ends]
        taps = {ENTRY: hidden[ENTRY], **{block: state(block) for block in taken if 0 <= block < depth}}
        complete = depth == self.block_ends()[-1]
        last = stages[-1] if ends and ends[-1] == depth else Streams(state(depth - 1))
        return RunResult(last, taps, stages, complete=complete, final=True)

    def read_hidden(
        self, side: SideUnit, images: Tensor, extra: frozenset[int], depth: int, units: Sequence[Unit] = ()
    ) -> dict[int, Tensor]:
        """Run the backbone for a network beside it, without gradients unless the network needs them.

        Args:
            side: The network.
            images: (B, C, H, W).
            extra: Blocks whose outputs to return besides those the network reads.
            depth: Number of blocks to run.
            units: The acting units with tokens or streams.

        Returns:
            The output of each of these blocks without inserted tokens, and under `ENTRY` the input of the first block.
        """
        self.check_size(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not side.detach_hidden):
            return self.backbone(images, units, side.reads | extra, depth).taps

    def side(self) -> SideUnit | None:
        """Return the acting network beside the backbone, if any."""
        return next(iter(self.acting.side), None)

    def features_beside(self, side: SideUnit, hidden: Mapping[int, Tensor]) -> Tensor:
        """Compute the output of `forward_features` from the outputs of the backbone's blocks.

        Args:
            side: The network.
            hidden: The result of `read_hidden`.
        """
        states = side.climb(hidden, side.depth, self.checkpoints())
        return side.project_out(states[-1]).to(hidden[ENTRY].dtype)

    def runs_itself(self) -> bool:
        """Return whether timm's own forward pass cannot run the current route.

        With activation checkpointing it cannot: the recomputation must use the same route.
        """
        acting = self.acting
        units = acting.tokens or acting.stream or acting.queries or acting.side or acting.carries
        if units or self.routing.merging is not None:
            return True
        return self.checkpoints() and torch.is_grad_enabled()

    def streams_of(self, units: Sequence[Unit]) -> list[Stream]:
        """List the streams of the given units, and those that start inside blocks.

        Args:
            units: The units.
        """
        return [*(stream for unit in units for stream in unit.streams()), *self.acting.starting]

    def pass_block(
        self, block: Any, index: int, result: RunResult, streams: Sequence[Stream], **arguments: Any
    ) -> None:
        """Run one block on the bundle of a run result, in place, and store the rows that streams keep.

        Args:
            block: The block.
            index: Its index.
            result: The run so far.
            streams: All streams.
            **arguments: Further arguments of the block.
        """
        bundle, beside = result.streams, {}
        for stream in streams:
            rows = stream.enter(index, bundle.beside.get(stream.name), bundle.tokens)
            if rows is not None:
                beside[stream.name] = rows.to(bundle.tokens.dtype)
        rules = {stream.name: stream.rule(index) for stream in streams}
        hosted, whole = isinstance(block, BlockHost), arguments.pop("whole", False)
        carries = hosted and (block.acting.carries or any(unit.skips for unit in block.acting.parallel))
        if beside and not hosted:
            raise ConfigError(
                f"Streams beside the tokens ({', '.join(beside)}) were given to a run, but the blocks of this model "
                "carry none. Attach a method that makes streams."
            )
        if beside or carries or "merging" in arguments or bundle.merged is not None:
            arguments["beside"] = Streams(bundle.tokens, beside, rules, whole, merged=bundle.merged)
        if self.checkpoints():
            out = self.recomputed(block, bundle.tokens, **arguments)
        else:
            out = block(bundle.tokens, **arguments)
        result.streams = out if isinstance(out, Streams) else Streams(out)
        if result.streams.passed is not None:
            result.passed[index] = result.streams.passed
        for stream in streams:
            if stream.keeps(index) and stream.name in result.streams.beside:
                result.kept.setdefault(stream.name, []).append(result.streams.beside[stream.name])

    def entered(self, tokens: Tensor) -> Tensor:
        """Apply `QueryUnit.change_tokens` to the input of the first block, (B, N, D) or (B, H, W, D)."""
        for unit in self.acting.queries:
            tokens = unit.change_tokens(tokens)
        return tokens

    def with_kept(self, tokens: Tensor, result: RunResult) -> Tensor:
        """Insert the rows that the classifier reads after the prefix, (B, N + rows, D).

        The rows of a truncated run are left out, since they reach no classifier.
        """
        for stream in self.answering() if result.complete else ():
            tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
            tokens = joined(tokens, result.kept[stream.name], self.num_prefix_tokens)
        return tokens

    def unpacked(self, tokens: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Undo `with_kept`.

        Args:
            tokens: (B, N + rows, D).

        Returns:
            The tokens (B, N, D), and the rows of each stream of `answering`.
        """
        kept = []
        for stream in reversed(self.answering()):  # the stream packed last comes first
            tokens, rows = taken_apart(tokens, stream, self.num_prefix_tokens)
            kept.append(rows)
        return tokens, kept[::-1]

    def with_streams(self, pooled: Tensor, kept: Sequence[Sequence[Tensor]]) -> Tensor:
        """Compute the features the classifier reads, (B, features).

        Args:
            pooled: The pooled tokens, (B, D).
            kept: The rows of each stream, as from `unpacked`.
        """
        for stream, rows in zip(self.answering(), kept, strict=True):
            pooled = stream.features(pooled, rows)
        return pooled

    def answering(self) -> list[Stream]:
        """List the acting streams whose rows the classifier reads."""
        units = (*self.acting.stream, *self.acting.queries)
        return [stream for unit in units for stream in unit.streams() if stream.shapes]

    @staticmethod
    def side_block(block: Any, rung: Rung) -> nn.Module:
        """Create a block of the family at another size.

        Args:
            block: The backbone's block it belongs to.
            rung: Its size.

        Returns:
            The block: pre-norm, biases everywhere, GELU, no layer scale, no dropout.
        """
        # Half a channel more, since timm rounds the hidden width of the MLP down.
        ratio = (rung.hidden + 0.5) / rung.width
        norm: Any = partial(LayerNorm, eps=1e-6)
        return Block(rung.width, rung.heads, ratio, qkv_bias=True, norm_layer=norm)


def pooled_rows(units: Sequence[TokensUnit]) -> str:
    """Return the rows that average pooling includes, as set by the last unit.

    Args:
        units: The units that insert tokens.
    """
    return units[-1].pool if units else "patches"


def token_units(units: Sequence[Unit]) -> list[TokensUnit]:
    """List the units that insert tokens.

    Args:
        units: All units of a run.
    """
    return [unit for unit in units if isinstance(unit, TokensUnit)]
