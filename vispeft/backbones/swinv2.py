"""The view of timm's ``SwinTransformerV2``: cosine attention, norms behind the branches, reduction before norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
    WindowAttention,
)
from torch import Tensor, nn

from vispeft.adapters.blocks import BlockHost
from vispeft.adapters.hosts import register_block_host
from vispeft.adapters.model_host import ModelHost
from vispeft.adapters.sites import Site, View
from vispeft.backbones.parts import Spot, is_absent, mlp_sites, projection_sites
from vispeft.backbones.registry import Family, check_class, register_family
from vispeft.backbones.swin import AnySizeBlock, Generation, hierarchical_view

__all__ = ["SWINV2", "AnySizeSwinV2Block", "describe_swinv2"]


def describe_swinv2(model: nn.Module) -> View:
    """Describe a `SwinTransformerV2`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention, patch merging or the patch embedding is of a class the view does not
            cover.
    """
    return hierarchical_view(model, SWINV2)


def _merging_sites(merging: Any, path: str, stage: int) -> Iterator[Site]:
    if is_absent(merging):
        return
    check_class(path, merging, (PatchMerging,))
    spot = Spot(merging.out_dim, stage=stage, layout="NHWC")
    yield spot.site(f"{path}.reduction", "downsample.reduction", "linear", 4 * merging.dim)
    yield spot.site(f"{path}.norm", "downsample.norm", "norm")


def _block_sites(block: Any, path: str, spot: Spot) -> Iterator[Site]:
    attn = block.attn
    check_class(f"{path}.attn", attn, (WindowAttention,))
    yield spot.site(path, "block", "block")
    yield spot.site(f"{path}.attn", "attn", "attention")
    yield from projection_sites(attn, f"{path}.attn", spot, spot.width)
    yield spot.site(f"{path}.attn.cpb_mlp", "rel_pos", "table")
    yield spot.site(f"{path}.attn", "attn.core", "attention", inside=True)
    yield spot.site(f"{path}.attn.proj", "attn.proj", "linear")
    yield spot.site(f"{path}.norm1", "norm1", "norm")
    yield from mlp_sites(block.mlp, f"{path}.mlp", spot)
    yield spot.site(f"{path}.norm2", "norm2", "norm")


class AnySizeSwinV2Block(AnySizeBlock, SwinTransformerV2Block):
    """A `SwinTransformerV2Block` for maps of any size."""

    timm_block = SwinTransformerV2Block


SWINV2 = Generation(
    family="swinv2",
    model_class=SwinTransformerV2,
    stage_class=SwinTransformerV2Stage,
    block_classes=(SwinTransformerV2Block, AnySizeSwinV2Block),
    block_sites=_block_sites,
    merging_sites=_merging_sites,
    size_bound=(),
)


class SwinV2BlockHost(BlockHost):
    """An adapted `SwinTransformerV2Block`, which normalises behind its branches."""

    _attn: Callable[[Tensor], Tensor]
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module

    def attention_branch(self, x: Tensor, *args: Any, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Run the attention branch on a map (B, H, W, C)."""
        return self.drop_path1(self.norm1(self._attn(x))), None

    def mlp_branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the MLP branch on a map (B, H, W, C)."""
        return self.drop_path2(self.norm2(self.mlp(x))), None


register_block_host(SwinTransformerV2Block, SwinV2BlockHost)
register_family(
    Family(
        name="swinv2",
        classes=(SwinTransformerV2,),
        describe=describe_swinv2,
        host=ModelHost,
        examples="swinv2_*",
    )
)
