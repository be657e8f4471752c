"""The forward pass of a plain model: one sequence of tokens, with learned tokens inserted after the prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vispeft.core.model_units import TokensUnit
from vispeft.core.units import Unit
from vispeft.errors import ConfigError
from vispeft.hosts.block import BlockHost
from vispeft.hosts.running import ENTRY, RunningHost, RunResult, pooled_rows, token_units
from vispeft.hosts.streams import Streams
from vispeft.hosts.token_merging import Merging, unmerged

__all__ = ["PlainModelHost"]


class PlainModelHost(RunningHost):
    """An adapted model with one sequence of tokens.

    Without inserted tokens, streams, units that treat the tokens as an image, and a network beside the model, every
    call goes to timm's own forward pass.

    A family implements the steps before the first block (`embed`) and the arguments of its blocks (`block_arguments`).
    """

    in_merging = takes_side = True
    global_pool: str
    grad_checkpointing: bool
    no_embed_class: bool
    num_prefix_tokens: int
    patch_embed: Any
    blocks: Any
    norm_pre: Any
    pool: Callable[[Tensor], Tensor]
    fc_norm: nn.Module
    head_drop: nn.Module
    head: nn.Module

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Run all steps before the first block, with timm's own submodules.

        Args:
            images: (B, C, H, W).

        Returns:
            Tokens (B, N, D), prefix tokens first, and the context for `block_arguments`.
        """
        raise NotImplementedError

    def block_arguments(self, context: Any, block: int, inserted: int) -> dict[str, Any]:
        """Return the arguments of one block besides the tokens.

        Args:
            context: The second result of `embed`.
            block: Index of the block.
            inserted: Number of tokens between prefix and patches.
        """
        raise NotImplementedError

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for images of another size as timm does, and resize trained positions with those of the base."""
        before = self.patch_embed.grid_size
        super().set_input_size(*args, **kwargs)
        if self.patch_embed.grid_size != before:
            resize = partial(
                resample_abs_pos_embed,
                new_size=self.patch_embed.grid_size,
                old_size=before,
                num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            )
            self.change_selected("pos_embed", resize)

    def checkpoints(self) -> bool:
        """Return whether activation checkpointing is on."""
        return self.grad_checkpointing

    def block_ends(self) -> list[int]:
        """Return the number of blocks; a plain model has one stage."""
        return [len(self.blocks)]

    def runs_itself(self) -> bool:
        """Return whether timm's own forward pass cannot run the route, for example if blocks need the grid."""
        return super().runs_itself() or self.acting.grid

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute normalised tokens (B, N, D); units determine the rows besides prefix and patches."""
        if not self.runs_itself():
            out: Tensor = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
            return out
        return self.features(self.run(x, **self._masked(attn_mask, is_causal)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify as timm does, without a second norm on the output of a network beside the model.

        Args:
            x: (B, N, D), the output of `forward_features`.
            pre_logits: Skip the classifier.

        Returns:
            (B, classes), or (B, D).
        """
        if not self.answering() and not self.acting.side:
            out: Tensor = super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]  # timm's
            return out
        x, kept = self.unpacked(x)
        x = self.pool(x)
        x = x if self.acting.side else self.fc_norm(x)
        x = self.head_drop(self.with_streams(x, kept))
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
        """Compute the tokens after chosen blocks, as timm does; inserted tokens are removed from them."""
        if not self.runs_itself():
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
        self._check_maps()
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"forward_intermediates(output_fmt={output_fmt!r}): use 'NCHW' or 'NLC'.")
        taken, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else len(self.blocks)
        result = self.run(x, taken=frozenset(taken), depth=depth, **self._masked(attn_mask, is_causal))
        taps = [result.taps[block] for block in sorted(taken)]
        taps = [self.norm(tap) if norm and not result.final else tap for tap in taps]
        prefix = [tap[:, : self.num_prefix_tokens] for tap in taps]
        maps = [tap[:, self.num_prefix_tokens :] for tap in taps]
        if output_fmt == "NCHW":
            maps = [self._as_map(patches, x) for patches in maps]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and self.num_prefix_tokens:
                named["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                named["image_features"] = self.features(result)
            return named
        both = return_prefix_tokens and self.num_prefix_tokens > 0
        found: list[Any] = list(zip(maps, prefix, strict=True)) if both else maps
        return found if intermediates_only else (self.features(result), found)

    def maps_of(self, result: RunResult, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Return the normalised maps behind blocks of a run, (B, D, h, w) each."""
        taps = [result.taps[block] for block in sorted(indices)]
        taps = taps if result.final else [self.norm(tap) for tap in taps]
        return [self._as_map(tap[:, self.num_prefix_tokens :], images) for tap in taps]

    def task_maps(
        self, images: Tensor, tasks: Sequence[str], taps: Sequence[int], merged: bool = True, norm: bool = True
    ) -> dict[str, list[Tensor]]:
        """Compute the maps of several tasks in one pass, by default behind the last norm, as those of other methods."""
        self._check_maps()
        result = self.run(images, taken=frozenset(taps), depth=max(taps) + 1)
        maps: dict[str, list[Tensor]] = {task: [] for task in tasks}
        for tap in taps:
            for task, levels in maps.items():
                rows = result.branched[tap].get(task, result.taps[tap])
                rows = self.norm(rows) if norm else rows
                levels.append(self._as_map(rows[:, self.num_prefix_tokens :], images))
        return maps

    def _check_maps(self) -> None:
        """Refuse maps for dense prediction of a model that merges tokens."""
        if self.routing.merging is not None:
            raise ConfigError(
                "Maps were asked for, and the model merges tokens, so that neighbouring patches would have one and the "
                "same value. Switch token merging off (bank.merge_tokens(0)); model.run(images, taken=...) gives the "
                "tokens after chosen blocks as they are."
            )

    def _as_map(self, patches: Tensor, images: Tensor) -> Tensor:
        """Convert patch tokens (B, N, D) of images (B, C, H, W) to a map (B, D, h, w)."""
        height, width = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return patches.transpose(1, 2).reshape(patches.shape[0], -1, height, width).contiguous()

    def backbone(
        self, images: Tensor, units: Sequence[Unit], taken: frozenset[int], depth: int, **arguments: Any
    ) -> RunResult:
        """Run the backbone, with learned tokens after the prefix."""
        tokens, context = self.embed(images)
        tokens = self.entered(tokens)
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        inserting, streams, grids = token_units(units), self.streams_of(units), self.acting.grid
        merging = self.routing.merging
        schedule = (0,) * depth if merging is None else merging.schedule(len(self.blocks))
        result = RunResult(
            Streams(tokens), {ENTRY: tokens}, inserted=(0,) * len(inserting), pool=pooled_rows(inserting)
        )
        for index in range(depth):
            self._insert(result, inserting, index)
            own = {**arguments, **self.block_arguments(context, index, sum(result.inserted))}
            if grids and isinstance(self.blocks[index], BlockHost):
                own |= {"grid": grid, "prefix": self.num_prefix_tokens + sum(result.inserted)}
            weighs = merging is not None and merging.proportional_attention
            if schedule[index] or (weighs and result.streams.merged is not None):
                protected = self.num_prefix_tokens + sum(result.inserted)
                own |= {"merging": Merging(schedule[index], protected, weighs)}
            self.pass_block(self.blocks[index], index, result, streams, **own)
            if index in taken:
                behind = unmerged(self.shown(result.streams), result.streams.merged)
                result.taps[index] = self._without_inserted(behind, result)
                result.branched[index] = self._branched(result)
        result.complete = depth == len(self.blocks)
        result.stages = [result.streams]
        return result

    def features(self, result: RunResult) -> Tensor:
        """Normalise the tokens, keep the rows to be pooled, and insert the rows of streams.

        Each patch gets the token that it was merged into, so that pooling weighs tokens by their patches.
        """
        if result.final:
            return result.tokens
        tokens = unmerged(self.norm(self.shown(result.streams)), result.streams.merged)
        return self.with_kept(self._pooled(tokens, result), result)

    def _masked(self, attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
        """Return the attention-mask arguments of every block; refuse a mask that does not fit the tokens."""
        if attn_mask is None and not is_causal:
            return {}
        acting = self.acting
        if self.routing.merging is not None:
            raise ConfigError(
                "An attention mask was given, and the model merges tokens, for which the mask has no rows. Switch "
                "token merging off (bank.merge_tokens(0)), or omit the mask."
            )
        if acting.tokens or acting.side or acting.queries or acting.stream or acting.grid:
            raise ConfigError(
                "An attention mask was given, and the adapter inserts tokens that the mask has no rows for, treats the "
                "tokens as an image of which the mask hides a part, or is a network beside the model with tokens of "
                "its own. Disable the adapter for this call, or omit the mask."
            )
        return {"attn_mask": attn_mask, "is_causal": is_causal}

    def _insert(self, result: RunResult, units: Sequence[TokensUnit], block: int) -> None:
        """Insert each unit's tokens of this block after the prefix, in place of its earlier ones."""
        tokens, first = result.tokens, self.num_prefix_tokens
        new = [unit.tokens(block, tokens.shape[0]) for unit in units]
        if all(value is None for value in new):
            return
        present = sum(result.inserted)
        old = tokens[:, first : first + present].split(list(result.inserted), 1)
        rows = [was if value is None else value.to(tokens.dtype) for value, was in zip(new, old, strict=True)]
        joined = torch.cat([tokens[:, :first], *rows, tokens[:, first + present :]], dim=1)
        result.streams = result.streams.changed(tokens=joined)
        result.inserted = tuple(part.shape[1] for part in rows)

    def _without_inserted(self, tokens: Tensor, result: RunResult) -> Tensor:
        first, count = self.num_prefix_tokens, sum(result.inserted)
        return torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1) if count else tokens

    def _branched(self, result: RunResult) -> dict[str, Tensor]:
        """Return the streams that started inside the last block."""
        names, beside = [stream.name for stream in self.acting.starting], result.streams.beside
        return {name: self._without_inserted(beside[name], result) for name in names if name in beside}

    def _pooled(self, tokens: Tensor, result: RunResult) -> Tensor:
        """Keep the rows to be pooled; with class-token pooling, the other rows do not matter."""
        count = sum(result.inserted)
        if not count:
            return tokens
        if self.global_pool == "token" or result.pool == "patches":
            return self._without_inserted(tokens, result)
        return tokens if result.pool == "all" else tokens[:, : self.num_prefix_tokens + count]
