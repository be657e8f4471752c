"""The view of timm's ``Eva``: EVA-02, DINOv3, Perception Encoder and rotary ViTs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from vispeft.adapters.blocks import BlockHost
from vispeft.adapters.hosts import register_block_host
from vispeft.adapters.sites import Site, View
from vispeft.adapters.tokens import PlainModelHost
from vispeft.backbones.parts import (
    Spot,
    branch_readers,
    first_layers,
    is_absent,
    mlp_sites,
    projection_sites,
    query_key_norm_sites,
)
from vispeft.backbones.registry import Family, check_class, register_family
from vispeft.backbones.vit import plain_view, stem_sites, tail_sites

__all__ = ["EvaHost", "describe_eva"]


def describe_eva(model: Any) -> View:
    """Describe an `Eva`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention, an MLP or the patch embedding is of a class the view does not cover.
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

    def enter(self, images: Tensor) -> tuple[Tensor, Any]:
        """Run patch embedding, positions and the norm in front of the blocks; rotations go along."""
        tokens, rotations = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(tokens), rotations

    def block_arguments(self, context: Any, block: int, inserted: int) -> dict[str, Any]:
        """Give the rotations, with one that changes nothing for each inserted token.

        timm's attention rotates every row behind the prefix. A sine of 0 and a cosine of 1 leave a row as it is, bit
        for bit, so inserted rows are skipped without telling the attention of another prefix.
        """
        if context is None:
            return {"rope": None}
        rotation = context[block] if self.rope_mixed else context
        shape = (*rotation.shape[:-2], inserted, rotation.shape[-1] // 2)
        still = torch.cat([rotation.new_zeros(shape), rotation.new_ones(shape)], dim=-1)
        return {"rope": torch.cat([still, rotation], dim=-2)}


class EvaBlockHost(BlockHost):
    """An adapted `EvaBlock`."""

    attn: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def attention_branch(self, x: Tensor, *args: Any, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Run the attention branch."""
        normed = self.norm1(x)
        out = self.attn(normed, *args, **arguments)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out), normed

    def mlp_branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the MLP branch."""
        normed = self.norm2(x)
        out = self.mlp(normed)
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out), normed


register_block_host(EvaBlock, EvaBlockHost)
register_family(
    Family(
        name="eva",
        classes=(Eva,),
        describe=describe_eva,
        host=EvaHost,
        examples="eva02_*, vit_*_dinov3, vit_pe_*, vit_*_rope_*",
    )
)
