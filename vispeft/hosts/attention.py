"""The hosts of attention modules: keys and values of an adapter's own, prompts in windows, and queries that only read.

Where nothing of that acts, every call goes to timm's own forward. Where something does, the attention is computed here,
from timm's own submodules: once for ViT and Eva (`TokenAttentionHost`) and once for windows (`WindowAttentionHost`); a
family's file says what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import resolve_self_attn_mask
from torch import Tensor, nn

from vispeft.core.units import PrefixUnit
from vispeft.hosts.base import Host
from vispeft.hosts.streams import Rows

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

    folds: ClassVar[bool] = True
    """Whether a score is a plain product of query and key, so that keys need not be computed for queries that read."""
    neutral: ClassVar[float] = 0.0
    """The position bias of a key that has no position."""

    def project(self, x: Tensor) -> Heads:
        """Compute queries, keys and values as scores need them, without positions.

        Args:
            x: (B, N, D).
        """
        raise NotImplementedError

    def place(self, heads: Heads, arguments: dict[str, Any]) -> Heads:
        """Write positions into queries and keys of tokens, where the family does it there."""
        return heads

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Give what is added to the scores of tokens, broadcast over (B, heads, N, N); None for nothing."""
        raise NotImplementedError

    def leave(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Bring mixed values (B, heads, N, width of a head) behind the output projection.

        Args:
            mixed: The values.
            x: What entered, for gates.

        Returns:
            (B, N, D).
        """
        raise NotImplementedError

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Compute softmax of queries and keys, times values."""
        bias = None if bias is None else bias.to(queries.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(queries, keys, values, bias, dropout, scale=self.scale)

    def attend(self, rows: Rows, keep: bool, arguments: dict[str, Any]) -> Rows:
        """Compute the attention of tokens and of what is beside them.

        Args:
            rows: Normalised tokens (windows, N, D), and rows beside them (B, ., D).
            keep: Whether what leaves at the prompts' rows is needed.
            arguments: What timm hands to the module besides.

        Returns:
            What leaves; at rows beside windows the average over the windows of the image.
        """
        prefixes = tuple(self.units(PrefixUnit))
        x = rows.tokens
        if rows.queries is not None and rows.prompts is None and not prefixes and self._folds(rows.queries, arguments):
            return Rows(super().forward(x, **arguments), None, self._read_folded(rows.queries, x))
        queries, keys, values = self.place(self.project(x), arguments)
        bias = self.bias(x, queries, arguments)
        prompts = None if rows.prompts is None else self.project(rows.prompts)
        keys, values = _joined(keys, values, prompts, [unit.keys_values() for unit in prefixes])
        extra = keys.shape[2] - queries.shape[2]
        if bias is not None and extra:
            bias = F.pad(bias, (extra, 0), value=self.neutral)
        out = self.leave(self.mix(queries, keys, values, bias), x)
        seen = None if prompts is None or not keep else self._beside(prompts[0], rows.prompts, keys, values)
        read = None if rows.queries is None else self._beside(self.project(rows.queries)[0], rows.queries, keys, values)
        return Rows(out, seen, read)

    def _beside(self, queries: Tensor, x: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        """Let rows beside the tokens read keys and values, without positions, and average over windows."""
        x = cast(Tensor, x)
        mixed = self.mix(_spread(queries, keys), keys, values, None)
        return _averaged(self.leave(mixed, _spread(x, keys)), x)

    def _folds(self, queries: Tensor, arguments: dict[str, Any]) -> bool:
        """Tell whether reading through the projection's weight is exact, and keeps less than keys and values."""
        adapted = isinstance(self.qkv, Host) and self.qkv.acts()
        plain = self.folds and isinstance(self.qkv, nn.Linear) and not adapted and arguments.get("rope") is None
        return plain and queries.shape[1] * self.num_heads <= queries.shape[2]

    def _read_folded(self, queries: Tensor, x: Tensor) -> Tensor:
        """Let queries read tokens without keys and values.

        ``(W_k n + b_k) . q = n . (W_k^T q)`` up to a number that is the same for all tokens, which softmax does not
        see; and weights that sum to one mix ``W_v n + b_v`` as ``W_v`` of the mixed ``n``, plus ``b_v``. Of the tokens
        nothing but ``n`` is kept for the backward pass.

        Args:
            queries: (B, Q, D), normalised.
            x: (windows, N, D), normalised.

        Returns:
            (B, Q, D).
        """
        asked = self.project(queries)[0]
        heads, count, width = asked.shape[1:]
        weight = cast(Tensor, self.qkv.weight).to(asked.dtype).view(3, heads, width, -1)
        keys = _by_head(asked * self.scale, weight[1])
        scores = _spread(keys, x).flatten(1, 2) @ x.transpose(1, 2).to(asked.dtype)
        mixed = (scores.softmax(dim=-1) @ x.to(asked.dtype)).unflatten(1, (heads, count))
        values = _by_head(mixed, weight[2].transpose(1, 2))
        if self.qkv.bias is not None:
            values = values + self.qkv.bias.view(3, heads, 1, width)[2].to(values.dtype)
        return _averaged(self.leave(values, _spread(queries, x)), queries)

    def acts(self) -> bool:
        """Tell whether anything acts here, or passes."""
        return super().acts() or self.passes()

    def no_plain_form(self) -> str | None:
        """Say why no plain attention does the same, or None where one does."""
        own = self.passes() or any(True for _ in self.units(PrefixUnit))
        return "no plain attention has keys and values of its own" if own else super().no_plain_form()


class TokenAttentionHost(AttentionHost):
    """An adapted attention over one sequence of tokens (ViT, Eva)."""

    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any

    def forward(self, x: Tensor, *args: Any, beside: Rows | None = None, **arguments: Any) -> Any:
        """Compute (B, N, D) from (B, N, D), or all rows where there are some beside."""
        if beside is None and not any(True for _ in self.units(PrefixUnit)):
            return super().forward(x, *args, **arguments)
        arguments = {**arguments, **dict(zip(self.order(), args, strict=False))}
        out = self.attend(Rows(x) if beside is None else beside, True, arguments)
        return out.tokens if beside is None else out

    def order(self) -> tuple[str, ...]:
        """Name what timm hands to the module by position, behind the tokens."""
        return "attn_mask", "is_causal"

    def project(self, x: Tensor) -> Heads:
        """Compute normalised queries, keys and values from (B, N, D)."""
        queries, keys, values = self.in_heads(x)
        return self.q_norm(queries), self.k_norm(keys), values

    def in_heads(self, x: Tensor) -> Heads:
        """Compute queries, keys and values in front of their norms from (B, N, D)."""
        return split_heads(self.qkv(x), self.num_heads)

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Give the mask a caller hands over."""
        mask, causal = arguments.get("attn_mask"), arguments.get("is_causal", False)
        return resolve_self_attn_mask(x.shape[1], scores_like, mask, causal)

    def leave(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and project (B, heads, N, width of a head)."""
        out = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return cast(Tensor, self.proj_drop(self.proj(out)))

    def _folds(self, queries: Tensor, arguments: dict[str, Any]) -> bool:
        return isinstance(self.k_norm, nn.Identity) and super()._folds(queries, arguments)


class WindowAttentionHost(AttentionHost):
    """An adapted attention inside the windows of a map (Swin)."""

    def forward(self, x: Tensor, mask: Tensor | None = None, beside: Rows | None = None, keep: bool = True) -> Any:
        """Compute (windows, N, D), or all rows where there are some beside.

        Args:
            x: Tokens of the windows; those of one image follow each other.
            mask: (windows of an image, N, N) added to scores, or None.
            beside: Rows beside the tokens, already normalised.
            keep: Whether what leaves at the prompts' rows is needed.
        """
        if beside is None and not any(True for _ in self.units(PrefixUnit)):
            return super().forward(x, mask)
        rows = Rows(x) if beside is None else beside._replace(tokens=x)
        out = self.attend(rows, keep, {"mask": mask})
        return out.tokens if beside is None else out

    def project(self, x: Tensor) -> Heads:
        """Compute queries, keys and values from (B, N, D)."""
        return split_heads(self.qkv(x), self.num_heads)

    def position_bias(self) -> Tensor:
        """Give the relative-position bias, (1, heads, N, N)."""
        raise NotImplementedError

    def bias(self, x: Tensor, scores_like: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """Add position bias and mask, (1 or windows, heads, N, N)."""
        bias, mask = self.position_bias(), arguments["mask"]
        if mask is None:
            return bias
        shifted = (bias + mask.unsqueeze(1)).unsqueeze(0)
        return shifted.expand(x.shape[0] // mask.shape[0], -1, -1, -1, -1).flatten(0, 1)

    def leave(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Project (windows, heads, N, width of a head)."""
        return cast(Tensor, self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2))))


def attended(attn: Any, rows: Rows, *args: Any, **arguments: Any) -> Rows:
    """Run an attention on tokens and on what is beside them.

    Args:
        attn: The attention module.
        rows: What enters it.
        *args: What timm hands to it besides.
        **arguments: The same, by name.
    """
    if rows.alone:
        return Rows(attn(rows.tokens, *args, **arguments))
    out: Rows = attn(rows.tokens, *args, beside=rows, **arguments)
    return out


def projected(attn: Any, x: Tensor) -> Tensor:
    """Compute a joint projection as timm does in modules that keep its biases.

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
    """Split a joint projection into its parts, head by head.

    Args:
        joint: (B, N, 3 D).
        heads: Number of heads.
    """
    parts = joint.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return parts[0], parts[1], parts[2]


def _joined(
    keys: Tensor, values: Tensor, prompts: Heads | None, prefixes: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Put keys and values of prompts, and those of an adapter's own, in front of the tokens'."""
    if prompts is not None:
        keys = torch.cat([_spread(prompts[1], keys), keys], dim=2)
        values = torch.cat([_spread(prompts[2], values), values], dim=2)
    for own_keys, own_values in prefixes:
        keys = torch.cat([_own(own_keys, keys), keys], dim=2)
        values = torch.cat([_own(own_values, values), values], dim=2)
    return keys, values


def _by_head(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows (B, heads, R, width) by a matrix of each head (heads, width, out), which is not copied for it."""
    joined = rows.transpose(0, 1).flatten(1, 2) @ weight
    return joined.unflatten(1, (-1, rows.shape[2])).transpose(0, 1)


def _own(table: Tensor, like: Tensor) -> Tensor:
    """Give a table (length, D) to every image and head."""
    heads = table.to(like.dtype).unflatten(1, (like.shape[1], -1)).transpose(0, 1)
    return heads.unsqueeze(0).expand(like.shape[0], -1, -1, -1)


def _spread(rows: Tensor, windows: Tensor) -> Tensor:
    """Repeat what belongs to an image for each of its windows, which follow each other."""
    images = rows.shape[0]
    spread = rows.unsqueeze(1).expand(-1, windows.shape[0] // images, *[-1] * (rows.ndim - 1))
    return spread.flatten(0, 1)


def _averaged(rows: Tensor, images: Tensor) -> Tensor:
    """Average rows (windows, R, D) over the windows of each image."""
    return rows.unflatten(0, (images.shape[0], -1)).mean(dim=1)
