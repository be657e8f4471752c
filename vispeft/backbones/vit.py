"""The view of timm's ``VisionTransformer``: AugReg, DeiT, CLIP, DINOv2, MAE, SigLIP, AIMv2 and similar models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, AttentionPoolPrr, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
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
from vispeft.core.families import Family, base_class, check_class, parameter_sizes, register_family
from vispeft.core.sites import Site, View
from vispeft.errors import BackboneError
from vispeft.hosts.attention import TokenAttentionHost, attended
from vispeft.hosts.block import BlockHost
from vispeft.hosts.mlp import MLP_HOSTS
from vispeft.hosts.plain import PlainModelHost
from vispeft.hosts.streams import Streams, split

__all__ = ["VitHost", "describe_vit", "plain_view", "stem_sites", "tail_sites"]

NOT_IN_PLAIN_MODELS = {
    "patch_embed.norm": "its patch embedding has no norm",
    "rel_pos": "it has no relative-position bias",
    "downsample.norm": "it has no patch merging",
    "downsample.reduction": "it has no patch merging",
}
"""Reasons why plain models lack some roles of hierarchical ones, by role."""


def describe_vit(model: Any) -> View:
    """Describe a `VisionTransformer`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention module, an MLP or the patch embedding is of an unsupported class, or the
            model has two classifiers.
    """
    vit = model
    if isinstance(vit, VisionTransformerDistilled) and vit.num_classes > 0:
        raise BackboneError(
            f"A {base_class(vit).__name__} with {vit.num_classes} classes has two classifiers, one for each of its "
            "first tokens, and an adapter has one. Create it with num_classes=0, and put a classifier behind its "
            "features."
        )
    sites = [*stem_sites(vit)]
    for index, block in enumerate(vit.blocks):
        check_class(f"blocks.{index}", block, (Block,))
        sites += _block_sites(block, f"blocks.{index}", Spot(vit.embed_dim, index))
    sites += tail_sites(vit)
    return plain_view(vit, "vit", base_class(vit), sites)


def plain_view(model: Any, family: str, model_class: type[nn.Module], sites: list[Site]) -> View:
    """Build the view of a model with one sequence of tokens.

    Args:
        model: The model.
        family: Its family.
        model_class: timm's class.
        sites: Its sites.

    Returns:
        The view.
    """
    depth = len(model.blocks)
    return View(
        family=family,
        model_class=model_class.__name__,
        sites=tuple(sites),
        widths=(model.embed_dim,) * depth,
        stages=(tuple(range(depth)),),
        heads=tuple(block.attn.num_heads for block in model.blocks),
        num_prefix_tokens=model.num_prefix_tokens,
        layout="NLC",
        head_path="head",
        tensors=parameter_sizes(model, "head"),
        head_drop_paths=("head_drop",),
        drop_path_paths=tuple((f"blocks.{i}.drop_path1", f"blocks.{i}.drop_path2") for i in range(depth)),
        size_bound=("pos_embed",),
        input_bound=("patch_embed.proj.weight",),
        patch_size=model.patch_embed.patch_size,
        img_size=model.patch_embed.img_size,
        in_chans=model.in_chans,
        global_pool=model.global_pool,
        not_here=NOT_IN_PLAIN_MODELS,
    )


def stem_sites(vit: Any) -> Iterator[Site]:
    """Iterate over the sites before the first block of a plain model.

    Args:
        vit: The model.

    Yields:
        Its sites, in forward order.

    Raises:
        BackboneError: If the patch embedding is of an unsupported class.
    """
    check_class("patch_embed", vit.patch_embed, (PatchEmbed,))
    spot, proj = Spot(vit.embed_dim), vit.patch_embed.proj
    yield spot.site("patch_embed.proj", "patch_embed", "conv", proj.in_channels, layout="NCHW", kernel=proj.kernel_size)
    if not is_absent(vit.patch_embed.norm):
        yield spot.site("patch_embed.norm", "patch_embed.norm", "norm")
    yield spot.site("", "tokens", "tokens")
    if not is_absent(vit.norm_pre):
        yield spot.site("norm_pre", "norm_pre", "norm")


def tail_sites(vit: Any) -> Iterator[Site]:
    """Iterate over the sites after the last block of a plain model.

    Args:
        vit: The model.

    Yields:
        Its sites, in forward order.

    Raises:
        BackboneError: If attention pooling is of an unsupported class.
    """
    spot = Spot(vit.embed_dim)
    # Under average pooling timm has an identity here and normalises after pooling; the site is the same.
    yield spot.site("norm", "final_norm", "norm")
    if vit.attn_pool is not None:
        check_class("attn_pool", vit.attn_pool, (AttentionPoolLatent, AttentionPoolPrr))
        yield spot.site("attn_pool", "attn_pool", "attention")
    if not is_absent(vit.fc_norm):
        yield spot.site("fc_norm", "fc_norm", "norm")
    yield spot.site("head", "head", "linear", out_features=vit.num_classes)


def _block_sites(block: Any, path: str, spot: Spot) -> Iterator[Site]:
    attn = block.attn
    check_class(f"{path}.attn", attn, (Attention,))
    inner = attn.attn_dim
    yield spot.site(path, "block", "block")
    yield spot.site(f"{path}.norm1", "norm1", "norm", consumers=branch_readers(attn, f"{path}.attn"))
    yield spot.site(f"{path}.attn", "attn", "attention")
    yield from projection_sites(attn, f"{path}.attn", spot, inner)
    yield from query_key_norm_sites(attn, f"{path}.attn", spot, rotated=False)
    yield spot.site(f"{path}.attn", "attn.core", "attention", inner, inner, inside=True)
    if not is_absent(attn.norm):
        # With a gate between this norm and the projection, a shift cannot be merged into the projection.
        readers = (f"{path}.attn.proj",) if attn.gate is None else ()
        yield spot.site(f"{path}.attn.norm", "attn.norm", "norm", inner, inner, consumers=readers)
    yield spot.site(f"{path}.attn.proj", "attn.proj", "linear", inner)
    if not is_absent(block.ls1):
        yield spot.site(f"{path}.ls1", "ls1", "scale")
    yield spot.site(f"{path}.norm2", "norm2", "norm", consumers=first_layers(block.mlp, f"{path}.mlp"))
    yield from mlp_sites(block.mlp, f"{path}.mlp", spot)
    if not is_absent(block.ls2):
        yield spot.site(f"{path}.ls2", "ls2", "scale")


class VitHost(PlainModelHost):
    """An adapted `VisionTransformer`."""

    merges_tokens = True
    _pos_embed: Callable[[Tensor], Tensor]
    patch_drop: nn.Module

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Run patch embedding, positions and the norm before the blocks."""
        tokens = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(self.patch_drop(tokens)), None

    def block_arguments(self, context: Any, block: int, inserted: int) -> dict[str, Any]:
        """Return no arguments: the blocks take tokens only."""
        return {}


class VitBlockHost(BlockHost):
    """An adapted `Block`."""

    attn: Any
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    ls1: nn.Module
    ls2: nn.Module

    def attention_branch(self, streams: Streams, *args: Any, **arguments: Any) -> tuple[Streams, Streams | None]:
        """Run the attention branch."""
        normed = streams.each(self.norm1)
        return attended(self.attn, normed, *args, **arguments).each(self.ls1).each(self.drop_path1), normed

    def mlp_branch(self, streams: Streams) -> tuple[Streams, Streams | None]:
        """Run the MLP branch."""
        normed = streams.each(self.norm2)
        return split(self.mlp, normed).each(self.ls2).each(self.drop_path2), normed


register_family(
    Family(
        name="vit",
        classes=(VisionTransformer, VisionTransformerDistilled),
        describe=describe_vit,
        host=VitHost,
        hosts={Block: VitBlockHost, Attention: TokenAttentionHost, **MLP_HOSTS},
        examples="vit_*, deit_*, deit3_*, DINOv2, CLIP, SigLIP, MAE, AIMv2, AST",
    )
)
