"""The view of timm's ``SwinTransformerV2``: cosine attention, norms after the branches and after patch merging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
    WindowAttention,
)
from torch import Tensor, nn

from vispeft.backbones.parts import Spot, is_absent, mlp_sites, projection_sites
from vispeft.backbones.swin import AnySizeBlock, Generation, WindowBlockHost, hierarchical_view
from vispeft.core.families import Family, check_class, register_family
from vispeft.core.sites import Site, View
from vispeft.hosts.attention import WindowAttentionHost, projected, split_heads
from vispeft.hosts.layers import ReaderHost
from vispeft.hosts.mlp import MLP_HOSTS
from vispeft.hosts.stages import StageModelHost
from vispeft.hosts.streams import Streams, split

__all__ = ["SWINV2", "AnySizeSwinV2Block", "describe_swinv2"]


def describe_swinv2(model: nn.Module) -> View:
    """Describe a `SwinTransformerV2`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention module, patch merging or the patch embedding is of an unsupported class.
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


class SwinV2BlockHost(WindowBlockHost):
    """An adapted `SwinTransformerV2Block`, which normalises after its branches."""

    def attention_branch(self, streams: Streams, *args: Any, **arguments: Any) -> tuple[Streams, Streams | None]:
        """Run the attention branch on a map (B, H, W, C) and the streams beside it."""
        return self.attend(streams).each(self.norm1).each(self.drop_path1), None

    def mlp_branch(self, streams: Streams) -> tuple[Streams, Streams | None]:
        """Run the MLP branch."""
        return split(self.mlp, streams).each(self.norm2).each(self.drop_path2), None


class SwinV2AttentionHost(WindowAttentionHost):
    """An adapted `WindowAttention` of SwinV2, whose scores are cosines times a learned scale."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    relative_position_index: Tensor
    window_size: tuple[int, int]
    scale = 1.0
    plain_scores = False
    neutral = 8.0  # timm's bias, 16 * sigmoid(output of cpb_mlp), for an output of 0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values from (B, N, D), before their normalisation for the cosine."""
        return split_heads(projected(self, x), self.num_heads)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the attention with cosine scores, also for an adapter's learned keys."""
        scale = self.logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
        queries = (F.normalize(queries, dim=-1) * scale).to(values.dtype)
        return super().mix(queries, F.normalize(keys, dim=-1).to(values.dtype), values, bias)

    def position_bias(self) -> Tensor:
        """Compute the relative-position bias, (1, heads, N, N)."""
        area = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).unsqueeze(0)


class SwinV2ReadingHost(SwinV2AttentionHost, ReaderHost):
    """The host of a module that keeps the biases of its projection."""


class SwinV2Host(StageModelHost):
    """An adapted `SwinTransformerV2`."""


register_family(
    Family(
        name="swinv2",
        classes=(SwinTransformerV2,),
        describe=describe_swinv2,
        host=SwinV2Host,
        hosts={
            SwinTransformerV2Block: SwinV2BlockHost,
            AnySizeSwinV2Block: SwinV2BlockHost,
            WindowAttention: SwinV2AttentionHost,
            **MLP_HOSTS,
        },
        reading_hosts={WindowAttention: SwinV2ReadingHost},
        examples="swinv2_*",
    )
)
