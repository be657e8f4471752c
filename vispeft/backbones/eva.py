"""The view of timm's ``Eva``: EVA-02, DINOv3, Perception Encoder and rotary ViTs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from vispeft.backbones.parts import (
    Spot,
    branch_readers,
    first_layers,
    is_absent,
    mlp_sites,
    projection_sites,
    query_key_norm_sites,
)
from vispeft.backbones.vit import plain_view, stem_sites, tail_sites
from vispeft.core.families import Family, check_class, register_family
from vispeft.core.sites import Site, View
from vispeft.hosts.attention import Heads, TokenAttentionHost, attended, projected, split_heads
from vispeft.hosts.block import BlockHost
from vispeft.hosts.layers import ReaderHost
from vispeft.hosts.mlp import MLP_HOSTS
from vispeft.hosts.plain import PlainModelHost
from vispeft.hosts.streams import Streams, split

__all__ = ["EvaHost", "describe_eva"]


def describe_eva(model: Any) -> View:
    """Describe an `Eva`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention module, an MLP or the patch embedding is of an unsupported class.
    """
    eva = model
    sites = [*stem_sites(eva)]
    for index, block in enumerate(eva.blocks):
        check_class(f"blocks.{index}", block, (EvaBlock,))
        sites += _block_sites(block, f"blocks.{index}", Spot(eva.embed_dim, index), rotated=eva.rope is not None)
    sites += tail_sites(eva)
    return plain_view(eva, "eva", Eva, sites)


def _block_sites(block: Any, path: str, spot: Spot, rotated: bool) -> Iterator[Site]:
    attn = block.attn
    check_class(f"{path}.attn", attn, (EvaAttention, AttentionRope))
    inner = attn.num_heads * attn.head_dim
    yield spot.site(path, "block", "block")
    yield spot.site(f"{path}.norm1", "norm1", "norm", consumers=branch_readers(attn, f"{path}.attn"))
    yield spot.site(f"{path}.attn", "attn", "attention")
    yield from projection_sites(attn, f"{path}.attn", spot, inner)
    yield from query_key_norm_sites(attn, f"{path}.attn", spot, rotated)
    yield spot.site(f"{path}.attn", "attn.core", "attention", inner, inner, inside=True)
    if not is_absent(attn.norm):
        readers = (f"{path}.attn.proj",) if attn.gate is None else ()
        yield spot.site(f"{path}.attn.norm", "attn.norm", "norm", inner, inner, consumers=readers)
    yield spot.site(f"{path}.attn.proj", "attn.proj", "linear", inner)
    if block.gamma_1 is not None:
        yield spot.site(path, "ls1", "scale", inside=True)
    yield spot.site(f"{path}.norm2", "norm2", "norm", consumers=first_layers(block.mlp, f"{path}.mlp"))
    yield from mlp_sites(block.mlp, f"{path}.mlp", spot)
    if block.gamma_2 is not None:
        yield spot.site(path, "ls2", "scale", inside=True)


class EvaHost(PlainModelHost):
    """An adapted `Eva`."""

    _pos_embed: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    rope_mixed: bool

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Run patch embedding, positions and the norm before the blocks; also return the rotary embeddings."""
        tokens, rotations = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(tokens), rotations

    def block_arguments(self, context: Any, block: int, inserted: int) -> dict[str, Any]:
        """Return the rotary embeddings, with an identity rotation for each inserted token.

        timm's attention rotates every row after the prefix. A sine of 0 and a cosine of 1 leave a row unchanged bit for
        bit, so inserted rows are not rotated although the attention still uses the model's own prefix length.
        """
        if context is None:
            return {"rope": None}
        rotation = context[block] if self.rope_mixed else context
        shape = (*rotation.shape[:-2], inserted, rotation.shape[-1] // 2)
        still = torch.cat([rotation.new_zeros(shape), rotation.new_ones(shape)], dim=-1)
        return {"rope": torch.cat([still, rotation], dim=-2)}


class EvaBlockHost(BlockHost):
    """An adapted `EvaBlock`."""

    attn: Any
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def attention_branch(self, streams: Streams, *args: Any, **arguments: Any) -> tuple[Streams, Streams | None]:
        """Run the attention branch."""
        normed = streams.each(self.norm1)
        out = attended(self.attn, normed, *args, **arguments)
        return out.each(partial(_scaled, self.gamma_1)).each(self.drop_path1), normed

    def mlp_branch(self, streams: Streams) -> tuple[Streams, Streams | None]:
        """Run the MLP branch."""
        normed = streams.each(self.norm2)
        return split(self.mlp, normed).each(partial(_scaled, self.gamma_2)).each(self.drop_path2), normed


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale * x


class EvaAttentionHost(TokenAttentionHost):
    """An adapted `EvaAttention` or `AttentionRope`, with rotary position embedding of queries and keys."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    head_dim: int
    num_prefix_tokens: int
    rotate_half: bool
    plain_scores = False

    def order(self) -> tuple[str, ...]:
        """Return the names of timm's positional arguments after the tokens."""
        return "rope", "attn_mask", "is_causal"

    def in_heads(self, x: Tensor) -> Heads:
        """Compute queries, keys and values before their norms, from a fused or split projection."""
        if self.qkv is not None:
            return split_heads(projected(self, x), self.num_heads)
        parts = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        return queries, keys, values

    def project(self, x: Tensor) -> Heads:
        """Compute normalised queries, keys and values; shared keys and values are repeated for each query head."""
        queries, keys, values = super().project(x)
        shared = self.num_heads // keys.shape[1]
        return queries, keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)

    def apply_positions(self, heads: Heads, arguments: dict[str, Any]) -> Heads:
        """Rotate queries and keys after the prefix."""
        queries, keys, values = heads
        rope = arguments.get("rope")
        if rope is None:
            return heads
        return self._rotated(queries, rope).type_as(values), self._rotated(keys, rope).type_as(values), values

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        first = self.num_prefix_tokens
        return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=self.rotate_half)], dim=2)


class EvaReadingHost(EvaAttentionHost, ReaderHost):
    """The host of a module that keeps the biases of its projection."""


register_family(
    Family(
        name="eva",
        classes=(Eva,),
        describe=describe_eva,
        host=EvaHost,
        hosts={EvaBlock: EvaBlockHost, EvaAttention: EvaAttentionHost, AttentionRope: EvaAttentionHost, **MLP_HOSTS},
        reading_hosts={EvaAttention: EvaReadingHost},
        examples="eva02_*, vit_*_dinov3, vit_pe_*, vit_*_rope_*",
    )
)
