"""Tokens in the sequence of a plain model: the forward of such a model with room for learned tokens.

Nothing travels between blocks but the sequence itself: tokens go in as arguments and come out as rows, so checkpointing
and several calls at once are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vispeft.core.units import SideUnit, TokensUnit
from vispeft.errors import ConfigError
from vispeft.hosts.block import BlockHost
from vispeft.hosts.reading import joined, taken_apart
from vispeft.hosts.side import ENTRY, SideHost

__all__ = ["PlainModelHost"]


class PlainModelHost(SideHost):
    """An adapted model with one sequence of tokens.

    Without tokens to insert, without units that look at tokens as an image, and without a network beside the model,
    every call goes to timm's own forward.

    A family says how it enters the first block (`enter`) and what its blocks take besides tokens (`block_arguments`).
    """

    takes_side: ClassVar[bool] = True
    num_prefix_tokens: int
    global_pool: str
    grad_checkpointing: bool
    patch_embed: Any
    blocks: Any
    norm_pre: Any
    norm: Any
    pool: Callable[[Tensor], Tensor]
    fc_norm: nn.Module
    head_drop: nn.Module
    head: nn.Module

    def enter(self, images: Tensor) -> tuple[Tensor, Any]:
        """Run what comes in front of the first block, with timm's own submodules.

        Args:
            images: (B, C, H, W).

        Returns:
            Tokens (B, N, D), prefix tokens first, and what `block_arguments` needs.
        """
        raise NotImplementedError

    def block_arguments(self, context: Any, block: int, inserted: int) -> dict[str, Any]:
        """Give what one block takes besides tokens.

        Args:
            context: What `enter` returned.
            block: Index of the block.
            inserted: Number of tokens that stand between prefix and patches.
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute (B, N, D) normalised tokens; which rows are there besides prefix and patches is the unit's choice."""
        units = tuple(self.units(TokensUnit))
        if not self._runs_itself(units):
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        _refuse_mask(attn_mask, is_causal)
        final, _ = self._levels(x, units, frozenset(), len(self.blocks), norm=True)
        return final()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify as timm does; what a network beside the model gives is not normalised again.

        Args:
            x: (B, N, D), what `forward_features` gave.
            pre_logits: Leave the classifier out.

        Returns:
            (B, classes), or (B, D).
        """
        queries = self.reader()
        if queries is not None:
            x, reads = taken_apart(x, queries, self.num_prefix_tokens)
            x = self.head_drop(queries.features(self.fc_norm(self.pool(x)), reads))
            return x if pre_logits else self.head(x)
        if self.side() is None:
            out: Tensor = super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]  # timm's
            return out
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Compute the tokens behind chosen blocks, as timm does; inserted tokens never show in them."""
        units = tuple(self.units(TokensUnit))
        if not self._runs_itself(units):
            asked = {"output_dict": True} if output_dict else {}
            return super().forward_intermediates(
                x,
                indices,
                return_prefix_tokens=return_prefix_tokens,
                norm=norm,
                stop_early=stop_early,
                output_fmt=output_fmt,
                intermediates_only=intermediates_only,
                attn_mask=attn_mask,
                is_causal=is_causal,
                **asked,
            )
        _refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"forward_intermediates(output_fmt={output_fmt!r}): use 'NCHW' or 'NLC'.")
        taken, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else len(self.blocks)
        final, taps = self._levels(x, units, frozenset(taken), depth, norm)
        prefix = [tap[:, : self.num_prefix_tokens] for tap in taps]
        maps = [tap[:, self.num_prefix_tokens :] for tap in taps]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            maps = [m.transpose(1, 2).reshape(m.shape[0], -1, height, width).contiguous() for m in maps]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and self.num_prefix_tokens:
                named["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                named["image_features"] = final()
            return named
        both = return_prefix_tokens and self.num_prefix_tokens > 0
        found: list[Any] = list(zip(maps, prefix, strict=True)) if both else maps
        return found if intermediates_only else (final(), found)

    def _runs_itself(self, units: Sequence[TokensUnit]) -> bool:
        beside = self.side() is not None or self.reader() is not None
        return bool(units) or beside or any(_wants_grid(block) for block in self.blocks)

    def _levels(
        self, images: Tensor, units: Sequence[TokensUnit], taken: frozenset[int], depth: int, norm: bool
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Run the model: what computes its features, and the tokens behind chosen blocks without inserted ones."""
        side = self.side()
        if side is not None:
            hidden = self.read_hidden(side, images, frozenset(), depth)
            states = side.climb(hidden, depth, self.grad_checkpointing)
            dtype = hidden[ENTRY].dtype
            return partial(_left, side, states[-1], dtype), [_left(side, states[i], dtype) for i in sorted(taken)]
        reads: list[Tensor] = []
        tokens, taps = self._run(images, units, taken, depth, reads)
        found = [self._without_inserted(self.norm(tap) if norm else tap, units) for tap in taps]
        first = self.num_prefix_tokens
        return lambda: joined(self._pooled_rows(self.norm(tokens), units), reads, self.reader(), first), found

    def hidden(self, images: Tensor, blocks: frozenset[int], depth: int) -> dict[int, Tensor]:
        """Run the backbone and give (B, N, D) behind chosen blocks, and in front of the first one."""
        units = tuple(self.units(TokensUnit))
        wanted = {ENTRY, *(block for block in blocks if block < depth)}
        _, taps = self._run(images, units, frozenset(wanted), depth)
        rows = [taps[0], *(self._without_inserted(tap, units) if units else tap for tap in taps[1:])]
        return dict(zip(sorted(wanted), rows, strict=True))

    def checkpoints(self) -> bool:
        """Tell whether blocks are to be computed again in the backward pass."""
        return self.grad_checkpointing

    def _run(
        self,
        images: Tensor,
        units: Sequence[TokensUnit],
        taken: frozenset[int],
        depth: int,
        reads: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run blocks; what queries read of them is appended to `reads`, where there is a list for it."""
        self.check_size(images)
        tokens, context = self.enter(images)
        reader = self.reader() if reads is not None else None
        tokens = tokens if reader is None else reader.enter(tokens)
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        inserted, taps = 0, [tokens] if ENTRY in taken else []
        for index in range(depth):
            tokens, inserted = self._insert(tokens, units, index, inserted)
            arguments = self.block_arguments(context, index, inserted)
            block = self.blocks[index]
            if _wants_grid(block):
                arguments |= {"grid": grid, "prefix": self.num_prefix_tokens + inserted}
            queries = None if reader is None else reader.asked(index, tokens.shape[0])
            if queries is not None:
                arguments["queries"] = queries.to(tokens.dtype)
            out = checkpoint(block, tokens, **arguments) if self.grad_checkpointing else block(tokens, **arguments)
            tokens = out if queries is None else out.tokens
            if queries is not None and reads is not None:
                reads.append(out.queries)
            if index in taken:
                taps.append(tokens)
        return tokens, taps

    def _insert(self, tokens: Tensor, units: Sequence[TokensUnit], block: int, present: int) -> tuple[Tensor, int]:
        """Put each unit's tokens of this block behind the prefix, in place of its earlier ones."""
        new = [unit.tokens(block, tokens.shape[0]) for unit in units]
        if all(value is None for value in new):
            return tokens, present
        first = self.num_prefix_tokens
        old = (
            tokens[:, first : first + present].split([unit.length for unit in units], 1)
            if present
            else [None] * len(new)
        )
        middle = [was if value is None else value.to(tokens.dtype) for value, was in zip(new, old, strict=True)]
        rows = [part for part in middle if part is not None]
        joined = torch.cat([tokens[:, :first], *rows, tokens[:, first + present :]], dim=1)
        return joined, sum(unit.length for unit in units)

    def _without_inserted(self, tokens: Tensor, units: Sequence[TokensUnit]) -> Tensor:
        first, count = self.num_prefix_tokens, sum(unit.length for unit in units)
        return torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1)

    def _pooled_rows(self, tokens: Tensor, units: Sequence[TokensUnit]) -> Tensor:
        """Leave the rows that pooling is to see; a class token is pooled whatever stands behind it."""
        if not units:
            return tokens
        pool = units[-1].pool
        first, count = self.num_prefix_tokens, sum(unit.length for unit in units)
        if self.global_pool == "token" or pool == "patches":
            return self._without_inserted(tokens, units)
        return tokens if pool == "all" else tokens[:, : first + count]


def _left(side: SideUnit, state: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute what leaves a network beside the model, in the model's type."""
    return side.leave(state).to(dtype)


def _wants_grid(block: Any) -> bool:
    return isinstance(block, BlockHost) and block.wants_grid()


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ConfigError(
            "An attention mask was given to a model whose adapter inserts tokens, which it has no rows for, looks at "
            "tokens as an image, of which it hides some, or stands beside the model and has tokens of its own. "
            "Disable the adapter for this call, or leave the mask out."
        )
