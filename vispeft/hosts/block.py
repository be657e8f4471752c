"""The host of a block: terms beside its two branches, and streams beside the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vispeft.core.tracing import in_graph
from vispeft.core.units import ParallelUnit
from vispeft.hosts.base import Host
from vispeft.hosts.streams import Streams
from vispeft.hosts.token_merging import MergeStep, Merging

__all__ = ["BlockHost"]


class BlockHost(Host):
    """An adapted block: ``x1 = x + attention(x) + terms(x)``, then ``x1 + mlp(x1) + terms(x1)``.

    A term may also read the output of its branch, or the sum behind it.

    A family implements the two branches with timm's own submodules, including their norms, layer scales and stochastic
    depth. Without parallel units and streams beside the tokens, every call goes to timm's own forward pass.
    """

    in_merging = True
    drop_path1: Any
    drop_path2: Any

    def attention_branch(self, streams: Streams, *args: Any, **arguments: Any) -> tuple[Streams, Streams | None]:
        """Run the attention branch.

        Args:
            streams: The residual streams.
            *args: The further arguments of timm's block, by position.
            **arguments: The same, by name.

        Returns:
            The terms to add to the streams, and the output of the branch's norm (None if the norm comes last).
        """
        raise NotImplementedError

    def mlp_branch(self, streams: Streams) -> tuple[Streams, Streams | None]:
        """Run the MLP branch; like `attention_branch`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *args: Any,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        beside: Streams | None = None,
        merging: Merging | None = None,
        **arguments: Any,
    ) -> Any:
        """Run the block.

        Args:
            x: The residual stream, (B, N, D) or (B, H, W, D).
            *args: The further arguments of timm's block.
            grid: Height and width of the grid of patch tokens, where a unit treats the tokens as an image.
            prefix: Number of tokens before the patch tokens.
            beside: The streams beside the tokens and the rules of all streams; its ``tokens`` are ignored.
            merging: The tokens to merge between the branches; only together with `beside`.
            **arguments: The further arguments of timm's block, by name.

        Returns:
            The shape of `x`; the whole bundle if `beside` is given.
        """
        acting = self.acting
        units = acting.parallel
        if merging is None and not units and not acting.carries and (beside is None or not beside.beside):
            out = super().forward(x, *args, **arguments)
            return out if beside is None else beside.changed(tokens=out)
        streams = Streams(x) if beside is None else beside.changed(tokens=x)
        merged, step = streams.merged, None
        if merging is not None:
            step = arguments["merging"] = MergeStep(merging, merged)
        place = grid, prefix
        streams = self._joined("attn", streams, self.attention_branch(streams, *args, **arguments), place)
        if step is not None:
            tokens, merged = step.merge(streams.tokens)
            streams = streams.changed(tokens=tokens)
        skipping = [unit for unit in units if unit.skips]
        if not skipping:
            streams = self._joined("mlp", streams, self.mlp_branch(streams), place)
            return streams.tokens if beside is None else streams.changed(merged=merged)
        passed = skipping[0].passes(streams.tokens, prefix)
        for unit in skipping[1:]:
            passed = passed * unit.passes(streams.tokens, prefix)
        whole = beside is not None and beside.whole
        outputs = self.mlp_branch(streams) if whole else self._skipped(streams, passed)
        streams = self._joined("mlp", streams, outputs, place)
        return streams.tokens if beside is None else streams.changed(passed=passed[:, prefix:], merged=merged)

    def _skipped(self, streams: Streams, passed: Tensor) -> tuple[Streams, Streams | None]:
        """Run the MLP branch for the tokens that pass, (B, N, 1) or (B, H, W, 1).

        Without gradients it is computed for these alone. Otherwise, in graphs, and beside units that read its inside it
        is computed for all and multiplied: the same values.
        """
        units = [unit for unit in self.acting.parallel if unit.place == "mlp"]
        inside = any(unit.training or unit.reads in ("normed", "output") for unit in units)
        beside = bool(streams.beside) or self.acting.carries
        if torch.is_grad_enabled() or in_graph() or torch.jit.is_tracing() or inside or beside:
            added, normed = self.mlp_branch(streams)
            return added.changed(tokens=added.tokens * passed.to(added.tokens.dtype)), normed
        chosen = passed[..., 0] > 0
        rows = self.mlp_branch(Streams(streams.tokens[chosen][None]))[0].tokens[0]
        tokens = streams.tokens.new_zeros(streams.tokens.shape, dtype=rows.dtype)
        tokens[chosen] = rows
        return Streams(tokens, rules=streams.rules), None

    def _joined(
        self,
        branch: str,
        stream: Streams,
        outputs: tuple[Streams, Streams | None],
        place: tuple[tuple[int, int] | None, int],
    ) -> Streams:
        """Add the output of a branch and the terms beside it; those that read the sum follow one after the other."""
        added, normed = outputs
        units = [unit for unit in self.acting.parallel if unit.place == branch]
        readable = {"stream": stream, "normed": normed, "output": added}
        terms = [self._term(unit, readable[unit.reads], stream, place) for unit in units if unit.reads != "sum"]
        joined = stream.plus(added, *terms)
        for unit in units:
            if unit.reads == "sum":
                joined = joined.plus(self._term(unit, joined, stream, place))
        return joined

    def _term(
        self,
        unit: ParallelUnit,
        read: Streams | None,
        stream: Streams,
        place: tuple[tuple[int, int] | None, int],
    ) -> Streams:
        """Compute the term of a unit from its input, in the type of the residual stream."""
        assert read is not None, "methods refuse families that normalise after their branches"
        beside = {name: _alone(unit, x, *place) for name, x in read.beside.items()}
        term = Streams(unit.branch(read.tokens, *place), beside)
        if unit.gain is not None:
            term = term.each(unit.gain.mul)
        term = term.each(lambda x: x.to(stream.tokens.dtype))
        drop = self.drop_path1 if unit.place == "attn" else self.drop_path2
        return term.each(drop) if unit.drops else term

    def no_plain_form(self) -> str | None:
        """Return why no plain block is equivalent; None if one is."""
        if self.acting.parallel:
            return "no plain block has a term beside a branch"
        return "no plain block takes streams beside its tokens" if self.acting.carries else super().no_plain_form()


def _alone(unit: ParallelUnit, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
    """Compute a term for a stream: directly for a map, and with each row of (B, R, D) as an image of one pixel."""
    if x.ndim == 4:
        return unit.branch(x, grid, prefix)
    pixels = x.flatten(0, 1)[:, None, None]
    return unit.branch(pixels, None, 0).flatten(1).unflatten(0, x.shape[:2])
