"""The view of timm's ``SwinTransformer``: maps in NHWC, windows, and patch merging at the start of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

from vispeft.adapters.model_host import ModelHost
from vispeft.adapters.sites import Site, View
from vispeft.backbones.parts import Spot, is_absent, mlp_sites, projection_sites
from vispeft.backbones.registry import Family, check_class, parameter_sizes, register_family

__all__ = ["describe_swin", "hierarchical_view"]

NOT_IN_SWIN = {
    "norm_pre": "it has no norm in front of the first block",
    "attn.q_norm": "its queries are not normalised by a layer",
    "attn.k_norm": "its keys are not normalised by a layer",
    "attn.norm": "it has no norm in front of the output projection",
    "ls1": "it has no layer scale",
    "ls2": "it has no layer scale",
    "mlp.norm": "its MLP has no norm",
    "fc_norm": "it normalises before pooling",
    "attn_pool": "it pools by average",
}
"""Roles of plain models, with the reason why Swin lacks them."""


def describe_swin(model: nn.Module) -> View:
    """Describe a `SwinTransformer`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention, patch merging or the patch embedding is of a class the view does not
            cover.
    """
    swin = cast(SwinTransformer, model)
    sites = [*swin_stem_sites(swin)]
    number = 0
    for stage, layer in enumerate(swin.layers):
        path = f"layers.{stage}"
        sites += _merging_sites(layer.downsample, f"{path}.downsample", stage)
        for index, block in enumerate(layer.blocks):
            check_class(f"{path}.blocks.{index}", block, (SwinTransformerBlock,))
            spot = Spot(block.dim, number, stage, "NHWC")
            sites += _block_sites(block, f"{path}.blocks.{index}", spot)
            number += 1
    sites += swin_tail_sites(swin)
    return hierarchical_view(swin, "swin", sites, size_bound=("relative_position_bias_table",))


def hierarchical_view(swin: nn.Module, family: str, sites: list[Site], size_bound: tuple[str, ...]) -> View:
    """Make the view of a model with stages from its sites.

    Args:
        swin: The model.
        family: Its family.
        sites: Its sites.
        size_bound: Endings of names of tensors whose shape depends on the image size.

    Returns:
        The view.
    """
    blocks = [site for site in sites if site.role == "block"]
    stages = [tuple(cast(int, b.block) for b in blocks if b.stage == stage) for stage in range(len(swin.layers))]
    return View(
        family=family,
        sites=tuple(sites),
        widths=tuple(block.out_features for block in blocks),
        stages=tuple(stages),
        num_prefix_tokens=0,
        layout="NHWC",
        head_path="head.fc",
        tensors=parameter_sizes(swin, "head.fc"),
        head_drop_paths=("head.drop",),
        drop_path_paths=tuple((f"{b.path}.drop_path1", f"{b.path}.drop_path2") for b in blocks),
        size_bound=size_bound,
        input_bound=("patch_embed.proj.weight",),
        patch_size=swin.patch_embed.patch_size,
        img_size=swin.patch_embed.img_size,
        in_chans=swin.in_chans,
        global_pool=swin.global_pool,
        not_here=NOT_IN_SWIN,
    )


def swin_stem_sites(swin: nn.Module) -> Iterator[Site]:
    """Iterate over the sites in front of the first stage.

    Args:
        swin: The model.

    Yields:
        Its sites, in forward order.

    Raises:
        BackboneError: If the patch embedding is of a class the view does not cover.
    """
    check_class("patch_embed", swin.patch_embed, (PatchEmbed,))
    proj = swin.patch_embed.proj
    spot = Spot(proj.out_channels, stage=0, layout="NHWC")
    yield spot.site("patch_embed.proj", "patch_embed", "conv", proj.in_channels, layout="NCHW")
    if not is_absent(swin.patch_embed.norm):
        yield spot.site("patch_embed.norm", "patch_embed.norm", "norm")
    yield spot.site("", "tokens", "tokens")


def swin_tail_sites(swin: nn.Module) -> Iterator[Site]:
    """Iterate over the sites behind the last stage.

    Args:
        swin: The model.

    Yields:
        Its sites, in forward order.
    """
    spot = Spot(swin.num_features, stage=len(swin.layers) - 1, layout="NHWC")
    if not is_absent(swin.norm):
        yield spot.site("norm", "final_norm", "norm")
    yield spot.site("head.fc", "head", "linear", out_features=swin.num_classes)


def _merging_sites(merging: nn.Module, path: str, stage: int) -> Iterator[Site]:
    if is_absent(merging):
        return
    check_class(path, merging, (PatchMerging,))
    spot = Spot(4 * merging.dim, stage=stage, layout="NHWC")
    yield spot.site(f"{path}.norm", "downsample.norm", "norm", consumers=(f"{path}.reduction",))
    yield spot.site(f"{path}.reduction", "downsample.reduction", "linear", out_features=merging.out_dim)


def _block_sites(block: SwinTransformerBlock, path: str, spot: Spot) -> Iterator[Site]:
    attn = block.attn
    check_class(f"{path}.attn", attn, (WindowAttention,))
    inner = attn.proj.in_features
    yield spot.site(path, "block", "block")
    # Windows are padded with zeros behind this norm, which a shift folded into the projection would not reach.
    yield spot.site(f"{path}.norm1", "norm1", "norm")
    yield spot.site(f"{path}.attn", "attn", "attention")
    yield from projection_sites(attn, f"{path}.attn", spot, inner)
    yield spot.site(f"{path}.attn", "rel_pos", "table")
    yield spot.site(f"{path}.attn", "attn.core", "attention", inner, inner)
    yield spot.site(f"{path}.attn.proj", "attn.proj", "linear", inner)
    yield spot.site(f"{path}.norm2", "norm2", "norm", consumers=(f"{path}.mlp.fc1",))
    yield from mlp_sites(block.mlp, f"{path}.mlp", spot)


register_family(
    Family(
        name="swin",
        classes=(SwinTransformer,),
        describe=describe_swin,
        host=ModelHost,
        examples="swin_*",
    )
)
