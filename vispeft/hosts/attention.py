"""The hosts of attention modules: learned keys and values, and streams beside the tokens.

If neither acts, every call goes to timm's own forward pass. Otherwise the attention is computed here with timm's own
submodules: once for ViT and Eva (`TokenAttentionHost`) and once for windows (`WindowAttentionHost`), with differences
in the families' files. With windows, the output projection acts on the reassembled map, so that a task can branch
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import resolve_self_attn_mask
from torch import Tensor, nn

from vispeft.core.streams import StreamRule
from vispeft.core.units import PrefixUnit
from vispeft.hosts.base import Host
from vispeft.hosts.functional import frozen_casts
from vispeft.hosts.row_attention import Reading, read_rows
from vispeft.hosts.streams import Streams, split
from vispeft.hosts.token_merging import MergeStep

__all__ = [
    "AttentionHost",
    "Heads",
    "TokenAttentionHost",
    "WindowAttentionHost",
    "attended",
    "projected",
    "split_heads",
]

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values (B, heads, N, width of a head)."""


class AttentionHost(Host):
    """An adapted attention module."""

    scale: float
    num_heads: int
    qkv: Any
    proj: Any
    proj_drop: Any
    attn_drop: Any

    plain_scores: ClassVar[bool] = True
    """Whether a score is a plain product of query and key, so that reading rows need no keys of the tokens."""
    neutral: ClassVar[float] = 0.0
    """Position bias of a key without a position."""

    def project(self, x: Tensor) -> Heads:
        """Compute queries, keys and values ready for the scores, except for positions.

        Args:
            x: (B, N, D).
        """
        raise NotImplementedError

    def token_heads(self, x: Tensor, arguments: dict[str, Any]) -> Heads:
        """Compute queries, keys and values of the tokens; see `project`."""
        return self.project(x)

    def apply_positions(self, heads: Heads, arguments: dict[str, Any]) -> Heads:
        """Encode positions in the queries and keys of tokens, in families that do so."""
        return heads

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Compute the bias of the tokens' scores, broadcastable to (B, heads, N, N); None for no bias."""
        raise NotImplementedError

    def project_out(self, mixed: Streams, entered: Streams) -> Streams:
        """Apply the steps after the mixing of values: norm, gate, output projection.

        Args:
            mixed: Mixed values with concatenated heads, (..., inner width) for each stream.
            entered: The inputs of the attention, for gates.

        Returns:
            (..., D) for each stream, including those that start at the projection.
        """
        return split(self.proj, mixed).each(self.proj_drop)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the softmax attention of queries, keys and values, fused where timm's module fuses its own.

        Otherwise the attention passes through ``attn_drop``, whose hooks see it, and has second derivatives. Rows of
        streams come before the tokens, so that the last call of a block is that of its tokens.
        """
        bias = None if bias is None else bias.to(queries.dtype)
        if getattr(self, "fused_attn", False):  # SwinV2 has no fused form
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(queries, keys, values, bias, dropout, scale=self.scale)
        scores = (queries * self.scale) @ keys.transpose(-2, -1)
        attention = (scores if bias is None else scores + bias).softmax(dim=-1)
        return cast(Tensor, self.attn_drop(attention)) @ values

    def mixed(self, streams: Streams, arguments: dict[str, Any]) -> Streams:
        """Compute the mixed values of the tokens and of the streams that read.

        Args:
            streams: Normalised tokens (windows, N, D) and streams of rows (B, R, D), each with its rule.
            arguments: The further arguments of timm's module.

        Returns:
            Tokens (windows, N, inner width) and rows (B, R, inner width), averaged over the windows of their image.
        """
        x, rows = streams.tokens, streams.beside
        seen = {name: self.project(y) for name, y in rows.items() if streams.rules[name].seen}
        reading = [name for name in rows if streams.rules[name].reads]
        queries, keys, values = self.apply_positions(self.token_heads(x, arguments), arguments)
        bias = self.bias(x, queries, arguments)
        keys, values = self._joined(keys, values, list(seen.values()))
        extra = keys.shape[2] - queries.shape[2]
        if bias is not None and extra:
            bias = F.pad(bias, (extra, 0), value=self.neutral)
        beside = {}
        for name in reading:
            asking = seen[name][0] if name in seen else self.project(rows[name])[0]
            # Rows of streams have no position; sizes of merged tokens are the same for all that read them.
            out = self.mix(_spread(asking, keys), keys, values, bias if "merging" in arguments else None)
            beside[name] = _averaged(_side_by_side(out), rows[name])
        tokens = _side_by_side(self.mix(queries, keys, values, bias))
        return Streams(tokens, beside, streams.rules)

    def _joined(self, keys: Tensor, values: Tensor, seen: Sequence[Heads]) -> tuple[Tensor, Tensor]:
        """Prepend the keys and values of seen streams, and learned ones, to those of the tokens."""
        for heads in seen:
            keys = torch.cat([_spread(heads[1], keys), keys], dim=2)
            values = torch.cat([_spread(heads[2], values), values], dim=2)
        for unit in self.acting.prefix:
            own_keys, own_values = self._learned(unit, keys)
            keys = torch.cat([own_keys, keys], dim=2)
            values = torch.cat([own_values, values], dim=2)
        return keys, values

    def _learned(self, unit: PrefixUnit, like: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a unit's keys and values by head, expanded over the windows."""
        rows = unit.rows()
        if rows is None:
            keys, values = unit.keys_values()
            return _own(keys, like), _own(values, like)
        _, keys, values = self.project(rows.to(like.dtype).unsqueeze(0))
        return _spread(keys, like), _spread(values, like)

    def reads_alone(self, streams: Streams, arguments: dict[str, Any]) -> bool:
        """Return whether `read_streams` is exact and saves memory: streams only read, and the projection is plain."""
        acting = self.acting
        if acting.prefix or acting.branch or "merging" in arguments or not streams.beside or not self.plain_scores:
            return False
        if any(streams.rules[name] != StreamRule(seen=False, reads=True) for name in streams.beside):
            return False
        if isinstance(self.qkv, Host) and self.qkv.acts():
            return False
        if isinstance(self.proj, Host) and self.proj.acting.branch:
            return False
        plain = isinstance(self.qkv, nn.Linear) and arguments.get("rope") is None
        return plain and all(rows.shape[1] * self.num_heads <= rows.shape[2] for rows in streams.beside.values())

    def read_mixed(self, queries: Tensor, x: Tensor) -> Tensor:
        """Compute the attention of rows to tokens without the tokens' keys and values, see `read_rows`.

        The backward pass needs no activation of the tokens but their normalised input.

        Args:
            queries: (B, Q, D), normalised.
            x: (windows, N, D), normalised.

        Returns:
            (B, Q, inner width).
        """
        weight, bias = frozen_casts(queries, self.qkv.weight, self.qkv.bias, self.routing.casts)
        asked = self.asked(queries, weight, bias)
        heads, width = asked.shape[1], asked.shape[3]
        x, by_head = x.to(asked.dtype), weight.to(asked.dtype).view(3, heads, width, -1)
        own = None if bias is None else bias.view(3, heads, 1, width)[2].to(asked.dtype)
        return read_rows(asked, Reading(x, by_head[1], by_head[2], own, self.scale))

    def asked(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the queries of rows that only read, without their keys and values.

        Args:
            rows: (B, Q, D).
            weight: Weight of the fused projection, (3 inner width, D).
            bias: Its bias, if it has one.

        Returns:
            (B, heads, Q, width of a head).
        """
        inner = weight.shape[0] // 3
        queries = F.linear(rows, weight[:inner], None if bias is None else bias[:inner])
        return queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def read_streams(self, streams: Streams) -> dict[str, Tensor]:
        """Compute the attention of streams that only read, where `reads_alone` holds; (B, R, D) each."""
        mixed = {name: self.read_mixed(rows, streams.tokens) for name, rows in streams.beside.items()}
        entered = {name: streams.beside[name] for name in mixed}
        return {name: self.project_out(Streams(out), Streams(entered[name])).tokens for name, out in mixed.items()}

    def no_plain_form(self) -> str | None:
        """Return why no plain attention is equivalent; None if one is."""
        own = self.acting.carries or self.acting.prefix
        return "no plain attention has keys and values of its own" if own else super().no_plain_form()


class TokenAttentionHost(AttentionHost):
    """An adapted attention over one sequence of tokens (ViT, Eva)."""

    in_merging = True
    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any

    def forward(self, x: Tensor, *args: Any, **arguments: Any) -> Tensor:
        """Compute (B, N, D) from (B, N, D)."""
        if not self.acting.prefix and "merging" not in arguments:
            return cast(Tensor, super().forward(x, *args, **arguments))
        return self.attend(Streams(x), *args, **arguments).tokens

    def attend(self, streams: Streams, *args: Any, **arguments: Any) -> Streams:
        """Compute the attention of the tokens and of the streams beside them.

        Args:
            streams: Normalised tokens (B, N, D), and rows (B, R, D).
            *args: The further arguments of timm's module, by position.
            **arguments: The same, by name.
        """
        arguments = {**arguments, **dict(zip(self.order(), args, strict=False))}
        if self.reads_alone(streams, arguments):
            tokens = super().forward(streams.tokens, **arguments)
            return Streams(tokens, self.read_streams(streams), streams.rules)
        return self.project_out(self.mixed(streams, arguments), streams)

    def order(self) -> tuple[str, ...]:
        """Return the names of timm's positional arguments after the tokens."""
        return "attn_mask", "is_causal"

    def project(self, x: Tensor) -> Heads:
        """Compute normalised queries, keys and values from (B, N, D)."""
        return self.normed(self.in_heads(x))

    def normed(self, heads: Heads) -> Heads:
        """Normalise queries and keys."""
        queries, keys, values = heads
        return self.q_norm(queries), self.k_norm(keys), values

    def token_heads(self, x: Tensor, arguments: dict[str, Any]) -> Heads:
        """Compute the same for the tokens; keys before their norm are what merging compares."""
        step: MergeStep | None = arguments.get("merging")
        if step is None:
            return self.project(x)
        heads = self.in_heads(x)
        step.read(heads[1])
        return self.normed(heads)

    def asked(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute normalised queries of rows that only read."""
        return cast(Tensor, self.q_norm(super().asked(rows, weight, bias)))

    def in_heads(self, x: Tensor) -> Heads:
        """Compute queries, keys and values from (B, N, D), before their norms."""
        return split_heads(self.qkv(x), self.num_heads)

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Return the attention mask given by the caller, or the weights of merged tokens."""
        step: MergeStep | None = arguments.get("merging")
        if step is not None:
            return step.bias(scores_like)
        mask, causal = arguments.get("attn_mask"), arguments.get("is_causal", False)
        return resolve_self_attn_mask(x.shape[1], scores_like, mask, causal)

    def project_out(self, mixed: Streams, entered: Streams) -> Streams:
        """Normalise, gate and project (B, N, inner width)."""
        out = mixed.each(self.norm)
        if self.gate is not None:
            beside = {name: x * self.gate(entered.beside[name]).sigmoid() for name, x in out.beside.items()}
            out = Streams(out.tokens * self.gate(entered.tokens).sigmoid(), beside, out.rules)
        return super().project_out(out, entered)

    def reads_alone(self, streams: Streams, arguments: dict[str, Any]) -> bool:
        """Return whether `read_streams` is exact and saves memory: streams only read, and the projection is plain."""
        return isinstance(self.k_norm, nn.Identity) and super().reads_alone(streams, arguments)


class WindowAttentionHost(AttentionHost):
    """An adapted attention inside the windows of a map (Swin)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute (windows, N, D).

        Args:
            x: Tokens of the windows; the windows of an image are consecutive.
            mask: (windows of an image, N, N), added to the scores; or None.
        """
        if not self.acting.prefix:
            return cast(Tensor, super().forward(x, mask))
        return self.project_out(self.mixed(Streams(x), {"mask": mask}), Streams(x)).tokens

    def project(self, x: Tensor) -> Heads:
        """Compute queries, keys and values from (B, N, D)."""
        return split_heads(self.qkv(x), self.num_heads)

    def position_bias(self) -> Tensor:
        """Return the relative-position bias, (1, heads, N, N)."""
        raise NotImplementedError

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Compute the sum of position bias and mask, (1 or windows, heads, N, N)."""
        bias, mask = self.position_bias(), arguments["mask"]
        if mask is None:
            return bias
        shifted = (bias + mask.unsqueeze(1)).unsqueeze(0)
        return shifted.expand(x.shape[0] // mask.shape[0], -1, -1, -1, -1).flatten(0, 1)


def attended(attn: Any, streams: Streams, *args: Any, **arguments: Any) -> Streams:
    """Run an attention over one sequence on the tokens and the streams beside them.

    Args:
        attn: The attention module.
        streams: Its inputs.
        *args: The further arguments of timm's module, by position.
        **arguments: The same, by name.
    """
    if streams.beside or (isinstance(attn, TokenAttentionHost) and attn.acting.carries):
        return attn.attend(streams, *args, **arguments)
    return Streams(attn(streams.tokens, *args, **arguments), {}, streams.rules)


def projected(attn: Any, x: Tensor) -> Tensor:
    """Compute the fused projection, as timm does in modules that keep its biases.

    Args:
        attn: The attention module.
        x: (B, N, D).

    Returns:
        (B, N, 3 D).
    """
    if getattr(attn, "q_bias", None) is None:
        return cast(Tensor, attn.qkv(x))
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def split_heads(joint: Tensor, heads: int) -> Heads:
    """Split a fused projection into queries, keys and values by head.

    Args:
        joint: (B, N, 3 D).
        heads: Number of heads.
    """
    parts = joint.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return parts[0], parts[1], parts[2]


def _side_by_side(mixed: Tensor) -> Tensor:
    """Concatenate the heads: (B, heads, N, width of a head) to (B, N, inner width)."""
    return mixed.transpose(1, 2).flatten(2)


def _own(table: Tensor, like: Tensor) -> Tensor:
    """Expand a table (length, D) over the images and split it by head."""
    heads = table.to(like.dtype).unflatten(1, (like.shape[1], -1)).transpose(0, 1)
    return heads.unsqueeze(0).expand(like.shape[0], -1, -1, -1)


def _spread(rows: Tensor, windows: Tensor) -> Tensor:
    """Repeat each image's rows for its windows; the windows of an image are consecutive."""
    each = windows.shape[0] // rows.shape[0] if rows.shape[0] else 1
    spread = rows.unsqueeze(1).expand(-1, each, *[-1] * (rows.ndim - 1))
    return spread.flatten(0, 1)


def _averaged(rows: Tensor, images: Tensor) -> Tensor:
    """Average rows (windows, R, D) over the windows of each image."""
    return rows.unflatten(0, (images.shape[0], -1)).mean(dim=1) if images.shape[0] else rows
