"""The view of timm's ``VisionTransformer``: AugReg, DeiT, CLIP, DINOv2, MAE, SigLIP, AIMv2 and their like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionPoolPrr,
    GluMlp,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vispeft.adapters.hosts import base_class
from vispeft.adapters.model_host import ModelHost
from vispeft.adapters.sites import Rows, Site, View
from vispeft.backbones.registry import Family, check_class, parameter_sizes, register_family

__all__ = ["describe_vit"]


def describe_vit(model: nn.Module) -> View:
    """Describe a `VisionTransformer`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention, an MLP or the patch embedding is of a class the view does not cover.
    """
    vit = cast(VisionTransformer, model)
    check_class("patch_embed", vit.patch_embed, (PatchEmbed,))
    width = vit.embed_dim
    sites = [*_stem_sites(vit, width)]
    for index, block in enumerate(vit.blocks):
        check_class(f"blocks.{index}", block, (Block,))
        sites += block_sites(block, f"blocks.{index}", index, width)
    sites += _tail_sites(vit, width)
    depth = len(vit.blocks)
    return View(
        family="vit",
        sites=tuple(sites),
        widths=(width,) * depth,
        stages=(tuple(range(depth)),),
        num_prefix_tokens=vit.num_prefix_tokens,
        layout="NLC",
        head_path="head",
        tensors=parameter_sizes(vit, "head"),
        head_drop_paths=("head_drop",),
        drop_path_paths=tuple((f"blocks.{i}.drop_path1", f"blocks.{i}.drop_path2") for i in range(depth)),
        size_bound=("pos_embed",),
        input_bound=("patch_embed.proj.weight",),
        patch_size=vit.patch_embed.patch_size,
        img_size=vit.patch_embed.img_size,
        in_chans=vit.in_chans,
        global_pool=vit.global_pool,
        not_here={
            "patch_embed.norm": "its patch embedding has no norm",
            "rel_pos": "it has absolute positions",
            "downsample.norm": "it has no patch merging",
            "downsample.reduction": "it has no patch merging",
        },
    )


def _stem_sites(vit: VisionTransformer, width: int) -> Iterator[Site]:
    proj = vit.patch_embed.proj
    yield Site("patch_embed.proj", "patch_embed", "conv", proj.in_channels, width, layout="NCHW")
    if base_class(vit.patch_embed.norm) is not nn.Identity:
        yield Site("patch_embed.norm", "patch_embed.norm", "norm", width, width)
    yield Site("", "tokens", "tokens", width, width)
    if base_class(vit.norm_pre) is not nn.Identity:
        yield Site("norm_pre", "norm_pre", "norm", width, width)


def _tail_sites(vit: VisionTransformer, width: int) -> Iterator[Site]:
    # Under average pooling timm leaves an identity here and normalises behind the pooling; the place is the same.
    yield Site("norm", "final_norm", "norm", width, width)
    if base_class(vit.fc_norm) is not nn.Identity:
        yield Site("fc_norm", "fc_norm", "norm", width, width)
    if vit.attn_pool is not None:
        check_class("attn_pool", vit.attn_pool, (AttentionPoolLatent, AttentionPoolPrr))
        yield Site("attn_pool", "attn_pool", "attention", width, width)
    yield Site("head", "head", "linear", width, vit.num_classes)


def block_sites(block: Block, path: str, index: int, width: int) -> Iterator[Site]:
    """Iterate over the sites of one pre-norm block, in forward order.

    Args:
        block: The block.
        path: Its path.
        index: Its index over all blocks.
        width: Width of its tokens.

    Yields:
        Its sites, the block itself first.

    Raises:
        BackboneError: If the attention or the MLP is of a class the view does not cover.
    """
    check_class(f"{path}.attn", block.attn, (Attention,))
    yield Site(path, "block", "block", width, width, index)
    readers = [f"{path}.attn.qkv"]
    if block.attn.gate is not None:
        readers.append(f"{path}.attn.gate")
    yield Site(f"{path}.norm1", "norm1", "norm", width, width, index, consumers=tuple(readers))
    yield from attention_sites(block.attn, f"{path}.attn", index, width)
    if base_class(block.ls1) is not nn.Identity:
        yield Site(f"{path}.ls1", "ls1", "scale", width, width, index)
    mlp = list(mlp_sites(block.mlp, f"{path}.mlp", index, width))
    first = tuple(dict.fromkeys(s.path for s in mlp if s.role in ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")))
    yield Site(f"{path}.norm2", "norm2", "norm", width, width, index, consumers=first)
    yield from mlp
    if base_class(block.ls2) is not nn.Identity:
        yield Site(f"{path}.ls2", "ls2", "scale", width, width, index)


def attention_sites(attn: Attention, path: str, index: int, width: int) -> Iterator[Site]:
    """Iterate over the sites of an attention module with a fused projection, in forward order.

    Args:
        attn: The module.
        path: Its path.
        index: Index of its block.
        width: Width of its tokens.

    Yields:
        Its sites, the module itself first.
    """
    inner, heads = attn.attn_dim, attn.head_dim
    yield Site(path, "attn", "attention", width, width, index)
    yield Site(f"{path}.qkv", "attn.qkv", "linear", width, 3 * inner, index)
    for part, role in enumerate(("attn.q", "attn.k", "attn.v")):
        rows = Rows(part * inner, (part + 1) * inner)
        yield Site(f"{path}.qkv", role, "linear", width, inner, index, rows=rows)
    for name in ("q_norm", "k_norm"):
        if base_class(getattr(attn, name)) is not nn.Identity:
            # The same shift of every key adds the same to every score of a query, which softmax does not see.
            null = ("bias",) if name == "k_norm" else ()
            yield Site(f"{path}.{name}", f"attn.{name}", "norm", heads, heads, index, null=null)
    yield Site(path, "attn.core", "attention", inner, inner, index)
    if base_class(attn.norm) is not nn.Identity:
        yield Site(f"{path}.norm", "attn.norm", "norm", inner, inner, index, consumers=_if_ungated(attn, path))
    yield Site(f"{path}.proj", "attn.proj", "linear", inner, width, index)


def _if_ungated(attn: Attention, path: str) -> tuple[str, ...]:
    # A gate stands between the norm and the projection: a shift cannot pass it.
    return (f"{path}.proj",) if attn.gate is None else ()


def mlp_sites(mlp: nn.Module, path: str, index: int, width: int) -> Iterator[Site]:
    """Iterate over the sites of a plain or gated MLP, in forward order.

    Args:
        mlp: An `Mlp`, a `GluMlp` (gate and value in one layer) or a `SwiGLU` (two layers).
        path: Its path.
        index: Index of its block.
        width: Width of its tokens.

    Yields:
        Its sites, the module itself first.

    Raises:
        BackboneError: If it is of another class.
    """
    check_class(path, mlp, (Mlp, GluMlp, SwiGLU))
    hidden = mlp.fc2.in_features
    yield Site(path, "mlp", "mlp", width, width, index)
    if base_class(mlp) is SwiGLU:
        yield Site(f"{path}.fc1_g", "mlp.fc1_g", "linear", width, hidden, index)
        yield Site(f"{path}.fc1_x", "mlp.fc1_x", "linear", width, hidden, index)
    else:
        yield Site(f"{path}.fc1", "mlp.fc1", "linear", width, mlp.fc1.out_features, index)
    if base_class(mlp) is GluMlp:
        halves = (Rows(0, hidden), Rows(hidden, 2 * hidden))
        gate, value = reversed(halves) if mlp.gate_last else halves
        yield Site(f"{path}.fc1", "mlp.fc1_g", "linear", width, hidden, index, rows=gate)
        yield Site(f"{path}.fc1", "mlp.fc1_x", "linear", width, hidden, index, rows=value)
    yield Site(f"{path}.act", "mlp.act", "block", hidden, hidden, index)
    if base_class(mlp.norm) is not nn.Identity:
        yield Site(f"{path}.norm", "mlp.norm", "norm", hidden, hidden, index, consumers=(f"{path}.fc2",))
    yield Site(f"{path}.fc2", "mlp.fc2", "linear", hidden, width, index)


register_family(
    Family(
        name="vit",
        classes=(VisionTransformer,),
        describe=describe_vit,
        host=ModelHost,
        examples="vit_*, deit_*, deit3_*, DINOv2, CLIP, SigLIP, MAE, AIMv2",
    )
)
