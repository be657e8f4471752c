"""Tokens in the sequence of a plain model: the forward of such a model with room for learned tokens.

Nothing travels between blocks but the sequence itself: tokens go in as arguments and come out as rows, so checkpointing
and several calls at once are safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor

from vispeft.adapters.blocks import BlockHost
from vispeft.adapters.model_host import ModelHost
from vispeft.adapters.units import TokensUnit
from vispeft.errors import ConfigError

__all__ = ["PlainModelHost"]


class PlainModelHost(ModelHost):
    """An adapted model with one sequence of tokens.

    Without tokens to insert, and without units that look at tokens as an image, every call goes to timm's own forward.

    A family says how it enters the first block (`enter`) and what its blocks take besides tokens (`block_arguments`).
    """

    num_prefix_tokens: int
    global_pool: str
    grad_checkpointing: bool
    patch_embed: Any
    blocks: Any
    norm_pre: Any
    norm: Any

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
        tokens, _ = self._run(x, units, frozenset(), len(self.blocks))
        return self._pooled_rows(self.norm(tokens), units)

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
        tokens, taps = self._run(x, units, frozenset(taken), depth)
        taps = [self._without_inserted(self.norm(tap) if norm else tap, units) for tap in taps]
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
                named["image_features"] = self._pooled_rows(self.norm(tokens), units)
            return named
        both = return_prefix_tokens and self.num_prefix_tokens > 0
        found: list[Any] = list(zip(maps, prefix, strict=True)) if both else maps
        return found if intermediates_only else (self._pooled_rows(self.norm(tokens), units), found)

    def _runs_itself(self, units: Sequence[TokensUnit]) -> bool:
        return bool(units) or any(_wants_grid(block) for block in self.blocks)

    def _run(
        self, images: Tensor, units: Sequence[TokensUnit], taken: frozenset[int], depth: int
    ) -> tuple[Tensor, list[Tensor]]:
        self.check_size(images)
        tokens, context = self.enter(images)
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        inserted, taps = 0, []
        for index in range(depth):
            tokens, inserted = self._insert(tokens, units, index, inserted)
            arguments = self.block_arguments(context, index, inserted)
            block = self.blocks[index]
            if _wants_grid(block):
                arguments |= {"grid": grid, "prefix": self.num_prefix_tokens + inserted}
            tokens = checkpoint(block, tokens, **arguments) if self.grad_checkpointing else block(tokens, **arguments)
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


def _wants_grid(block: Any) -> bool:
    return isinstance(block, BlockHost) and block.wants_grid()


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ConfigError(
            "An attention mask was given to a model whose adapter inserts tokens, which it has no rows for, or looks "
            "at tokens as an image, of which it hides some. "
            "Disable the adapter for this call, or leave the mask out."
        )
