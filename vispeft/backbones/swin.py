"""The view of timm's ``SwinTransformer``: maps in NHWC, windows, and patch merging at the start of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from timm.layers import PatchEmbed, resize_rel_pos_bias_table
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn

from vispeft.backbones.parts import Spot, is_absent, mlp_sites, projection_sites
from vispeft.backbones.windows import cut_windows, join_windows
from vispeft.core.families import Family, base_class, check_class, parameter_sizes, register_family
from vispeft.core.model_units import SideUnit
from vispeft.core.sites import Site, View
from vispeft.hosts.attention import WindowAttentionHost
from vispeft.hosts.base import Host
from vispeft.hosts.block import BlockHost
from vispeft.hosts.mlp import MLP_HOSTS
from vispeft.hosts.running import Rung
from vispeft.hosts.stages import StageModelHost
from vispeft.hosts.streams import Streams, split

__all__ = [
    "SWIN",
    "AnySizeBlock",
    "AnySizeSwinBlock",
    "Generation",
    "WindowBlockHost",
    "describe_swin",
    "hierarchical_view",
    "make_any_size",
    "stage_sites",
    "swin_stem_sites",
]

TABLE = "relative_position_bias_table"
"""timm's name for the position bias of an attention."""
NOT_IN_SWIN = {
    "norm_pre": "it has no norm before the first block",
    "attn.q_norm": "its queries are not normalised by a layer",
    "attn.k_norm": "its keys are not normalised by a layer",
    "attn.norm": "it has no norm before the output projection",
    "ls1": "it has no layer scale",
    "ls2": "it has no layer scale",
    "mlp.norm": "its MLP has no norm",
    "fc_norm": "it normalises before pooling",
    "attn_pool": "it pools by average",
}
"""Reasons why Swin lacks some roles of plain models, by role."""


def describe_swin(model: nn.Module) -> View:
    """Describe a `SwinTransformer`.

    Args:
        model: The model.

    Returns:
        Its view.

    Raises:
        BackboneError: If a block, an attention module, patch merging or the patch embedding is of an unsupported class.
    """
    return hierarchical_view(model, SWIN)


@dataclass(frozen=True)
class Generation:
    """The differences between the two generations of Swin."""

    family: str
    """Name of the family."""
    model_class: type[nn.Module]
    """timm's model class."""
    stage_class: type[nn.Module]
    """timm's stage class."""
    block_classes: tuple[type[nn.Module], ...]
    """timm's block class, and ours for maps of any size."""
    block_sites: Callable[[Any, str, Spot], Iterator[Site]]
    """Iterates over the sites of a block."""
    merging_sites: Callable[[Any, str, int], Iterator[Site]]
    """Iterates over the sites of patch merging."""
    size_bound: tuple[str, ...]
    """Last name components of tensors whose shape depends on the image size."""


def hierarchical_view(model: nn.Module, generation: Generation) -> View:
    """Describe a Swin of either generation.

    Args:
        model: The model.
        generation: Its generation.

    Returns:
        The view.

    Raises:
        BackboneError: If a part is of an unsupported class.
    """
    swin: Any = model
    sites = [
        *swin_stem_sites(swin.patch_embed),
        *stage_sites(list(swin.layers), generation),
        *swin_tail_sites(swin),
    ]
    blocks = [site for site in sites if site.role == "block"]
    stages = [tuple(cast(int, b.block) for b in blocks if b.stage == stage) for stage in range(len(swin.layers))]
    return View(
        family=generation.family,
        model_class=generation.model_class.__name__,
        sites=tuple(sites),
        widths=tuple(block.out_features for block in blocks),
        stages=tuple(stages),
        heads=tuple(block.attn.num_heads for layer in swin.layers for block in layer.blocks),
        num_prefix_tokens=0,
        layout="NHWC",
        head_path="head.fc",
        tensors=parameter_sizes(swin, "head.fc"),
        head_drop_paths=("head.drop",),
        drop_path_paths=tuple((f"{b.path}.drop_path1", f"{b.path}.drop_path2") for b in blocks),
        size_bound=generation.size_bound,
        input_bound=("patch_embed.proj.weight",),
        patch_size=swin.patch_embed.patch_size,
        img_size=swin.patch_embed.img_size,
        in_chans=swin.in_chans,
        global_pool=swin.global_pool,
        not_here=NOT_IN_SWIN,
    )


def stage_sites(stages: Sequence[Any], generation: Generation) -> Iterator[Site]:
    """Iterate over the sites of the stages, patch merging first.

    Args:
        stages: The stages.
        generation: The generation of Swin.

    Yields:
        Their sites, in forward order.

    Raises:
        BackboneError: If a part is of an unsupported class.
    """
    number = 0
    for stage, layer in enumerate(stages):
        path = f"layers.{stage}"
        check_class(path, layer, (generation.stage_class,))
        yield from generation.merging_sites(layer.downsample, f"{path}.downsample", stage)
        for index, block in enumerate(cast(Iterable[Any], layer.blocks)):
            check_class(f"{path}.blocks.{index}", block, generation.block_classes)
            spot = Spot(block.dim, number, stage, "NHWC")
            yield from generation.block_sites(block, f"{path}.blocks.{index}", spot)
            number += 1


def swin_stem_sites(patch_embed: Any) -> Iterator[Site]:
    """Iterate over the sites before the first stage.

    Args:
        patch_embed: The patch embedding.

    Yields:
        Its sites, in forward order.

    Raises:
        BackboneError: If the patch embedding is of an unsupported class.
    """
    check_class("patch_embed", patch_embed, (PatchEmbed,))
    proj = patch_embed.proj
    spot = Spot(proj.out_channels, stage=0, layout="NHWC")
    yield spot.site("patch_embed.proj", "patch_embed", "conv", proj.in_channels, layout="NCHW", kernel=proj.kernel_size)
    if not is_absent(patch_embed.norm):
        yield spot.site("patch_embed.norm", "patch_embed.norm", "norm")
    yield spot.site("", "tokens", "tokens")


def swin_tail_sites(swin: Any) -> Iterator[Site]:
    """Iterate over the sites after the last stage.

    Args:
        swin: The model.

    Yields:
        Its sites, in forward order.
    """
    spot = Spot(swin.num_features, stage=len(swin.layers) - 1, layout="NHWC")
    if not is_absent(swin.norm):
        yield spot.site("norm", "final_norm", "norm")
    yield spot.site("head.fc", "head", "linear", out_features=swin.num_classes)


def _merging_sites(merging: Any, path: str, stage: int) -> Iterator[Site]:
    if is_absent(merging):
        return
    check_class(path, merging, (PatchMerging,))
    spot = Spot(4 * merging.dim, stage=stage, layout="NHWC")
    yield spot.site(f"{path}.norm", "downsample.norm", "norm", consumers=(f"{path}.reduction",))
    yield spot.site(f"{path}.reduction", "downsample.reduction", "linear", out_features=merging.out_dim)


def _block_sites(block: Any, path: str, spot: Spot) -> Iterator[Site]:
    attn = block.attn
    check_class(f"{path}.attn", attn, (WindowAttention,))
    inner = attn.proj.in_features
    yield spot.site(path, "block", "block")
    # Windows are padded with zeros after this norm; a shift merged into the projection would also act on the padding.
    yield spot.site(f"{path}.norm1", "norm1", "norm")
    yield spot.site(f"{path}.attn", "attn", "attention")
    yield from projection_sites(attn, f"{path}.attn", spot, inner)
    yield spot.site(f"{path}.attn", "rel_pos", "table", inside=True)
    yield spot.site(f"{path}.attn", "attn.core", "attention", inner, inner, inside=True)
    yield spot.site(f"{path}.attn.proj", "attn.proj", "linear", inner)
    yield spot.site(f"{path}.norm2", "norm2", "norm", consumers=(f"{path}.mlp.fc1",))
    yield from mlp_sites(block.mlp, f"{path}.mlp", spot)


class AnySizeBlock(nn.Module):
    """A Swin block that chooses its shift for each map, as timm does for the size a model is built for.

    timm sets the shift to zero along a side that one window covers. A model for any size keeps the window size and the
    bias table and applies this rule, so that for every size whose maps are not smaller than the window it equals the
    model built for that size.
    """

    timm_block: ClassVar[type[nn.Module]]
    """The timm class it replaces."""
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    attn: Any

    def shift_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the shift for a map of this size."""
        down, right = (
            0 if side <= window else by
            for side, window, by in zip((height, width), self.window_size, self.shift_size, strict=True)
        )
        return down, right

    def _attn(self, x: Tensor) -> Tensor:
        windows = cut_windows(self, x)
        return join_windows(windows, self.attn(windows.tokens, windows.mask))


class AnySizeSwinBlock(AnySizeBlock, SwinTransformerBlock):
    """A `SwinTransformerBlock` for maps of any size."""

    timm_block = SwinTransformerBlock


def make_any_size(model: nn.Module, blocks: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Make the blocks of a Swin with fixed windows choose their shift for each map, in place.

    Args:
        model: The model, created with ``always_partition=True`` and ``strict_img_size=False``.
        blocks: Our block class by timm's.
    """
    for module in model.modules():
        if type(module) in blocks:
            module.__class__ = blocks[type(module)]


SWIN = Generation(
    family="swin",
    model_class=SwinTransformer,
    stage_class=SwinTransformerStage,
    block_classes=(SwinTransformerBlock, AnySizeSwinBlock),
    block_sites=_block_sites,
    merging_sites=_merging_sites,
    size_bound=(TABLE,),
)


class SwinHost(StageModelHost):
    """An adapted `SwinTransformer`."""

    takes_side: ClassVar[bool] = True

    @staticmethod
    def side_block(block: Any, rung: Rung) -> nn.Module:
        """Create a block with the windows of another one, at another width."""
        made: Any = SwinTransformerBlock(
            rung.width,
            block.input_resolution,
            rung.heads,
            window_size=block.window_size,
            shift_size=block.shift_size,
            always_partition=block.always_partition,
            dynamic_mask=block.dynamic_mask,
            mlp_ratio=(rung.hidden + 0.5) / rung.width,  # timm rounds down
        )
        made.target_shift_size = block.target_shift_size
        made.__class__ = base_class(block)
        return cast(nn.Module, made)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for images of another size as timm does; adapt networks beside the model and trained tables."""
        blocks = [block for stage in self.stages() for block in stage.blocks]
        before = [block.attn.window_size for block in blocks]
        super().set_input_size(*args, **kwargs)
        for block, window in zip(blocks, before, strict=True):
            if isinstance(block.attn, Host) and block.attn.window_size != window:
                block.attn.change_selected(TABLE, partial(_resized, block.attn, window))
        for unit in self.modules():
            if isinstance(unit, SideUnit):
                unit.resize_with(blocks)


class WindowBlockHost(BlockHost):
    """An adapted block with attention in windows."""

    attn: Any
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    _attn: Callable[[Tensor], Tensor]

    def attend(self, streams: Streams) -> Streams:
        """Run the attention on a map and the streams beside it; the output projection acts on the whole map.

        Args:
            streams: The attention's inputs: a map (B, H, W, C) and streams beside it.
        """
        attn = self.attn
        if not streams.beside and not (isinstance(attn, WindowAttentionHost) and attn.acting.carries):
            return Streams(self._attn(streams.tokens), {}, streams.rules)
        windows = cut_windows(self, streams.tokens)
        inside, arguments = streams.changed(tokens=windows.tokens), {"mask": windows.mask}
        if attn.reads_alone(inside, arguments):
            return Streams(self._attn(streams.tokens), attn.read_streams(inside), streams.rules)
        mixed: Streams = attn.mixed(inside, arguments)
        out: Streams = attn.project_out(mixed.changed(tokens=join_windows(windows, mixed.tokens)), streams)
        return out


class SwinBlockHost(WindowBlockHost):
    """An adapted `SwinTransformerBlock`."""

    def attention_branch(self, streams: Streams, *args: Any, **arguments: Any) -> tuple[Streams, Streams | None]:
        """Run the attention branch on a map (B, H, W, C) and the streams beside it."""
        normed = streams.each(self.norm1)
        return self.attend(normed).each(self.drop_path1), normed

    def mlp_branch(self, streams: Streams) -> tuple[Streams, Streams | None]:
        """Run the MLP branch."""
        normed = streams.each(self.norm2)
        return split(self.mlp, normed).each(self.drop_path2), normed


class SwinAttentionHost(WindowAttentionHost):
    """An adapted `WindowAttention`."""

    _get_rel_pos_bias: Callable[[], Tensor]

    def position_bias(self) -> Tensor:
        """Return timm's relative-position bias, (1, heads, N, N)."""
        return self._get_rel_pos_bias()


def _resized(attn: Any, window: tuple[int, int], table: Tensor) -> Tensor:
    """Resize a table of position biases for the present window as timm does."""
    down, right = attn.window_size
    shape = (2 * down - 1) * (2 * right - 1), attn.num_heads
    return resize_rel_pos_bias_table(table, attn.window_size, shape, old_window_size=window)


register_family(
    Family(
        name="swin",
        classes=(SwinTransformer,),
        describe=describe_swin,
        host=SwinHost,
        hosts={
            SwinTransformerBlock: SwinBlockHost,
            AnySizeSwinBlock: SwinBlockHost,
            WindowAttention: SwinAttentionHost,
            **MLP_HOSTS,
        },
        examples="swin_*",
    )
)
