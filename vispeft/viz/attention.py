"""Where a model looks: the attention of its blocks, of prompts, and to learned keys.

Attention is taken from timm's own modules and from the hosts, which pass it through ``attn_drop`` where it is not
fused: for one forward pass the fused kernels are switched off, and a hook looks at what passes. No forward is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from vispeft.backbones.windows import Windows, cut_windows, join_windows
from vispeft.core.families import describe, unwrap
from vispeft.core.modes import evaluating
from vispeft.core.sites import View
from vispeft.errors import ConfigError, DataError
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import save

__all__ = ["Attention", "attention_of", "attention_picture", "draw_attention", "draw_prompts"]

_PANEL = 1.6
"""Width of one panel in inches."""
_MOST_BLOCKS = 6
"""Blocks that are drawn if none are chosen."""
_MOST_PROMPTS = 8
"""Prompts whose attention is drawn."""
_OPACITY = 0.65
"""Opacity of the attention over the image."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one block on a batch, after its softmax."""

    block: int
    """Index of the block."""
    to_tokens: Tensor
    """How much each place of the map is attended to (B, heads, h, w): by the class token where there is one, else on
    average by all tokens of the map, in windows by those of the same window."""
    to_learned: Tensor
    """How much inserted tokens and learned keys are attended to by the same tokens (B, heads, P); P may be 0."""
    of_prompts: Tensor
    """How much each inserted token attends to each place (B, heads, P, h, w); P may be 0."""
    by_class_token: bool
    """Whether the class token is the one that attends."""


@torch.no_grad()
def attention_of(model: nn.Module, images: Tensor) -> list[Attention]:
    """Look at the attention of every block, with the adapters that act.

    The values are those of the unfused computation; they differ from fused ones by rounding. Mode and settings of the
    model are put back.

    Args:
        model: A timm model of a supported family, with or without adapters. Choose adapter and task before.
        images: Normalised images (B, 3, H, W) on the model's device.

    Returns:
        One entry for each block, in their order, on the CPU in float32.

    Raises:
        BackboneError: If the model is of no supported family, or the images do not fit it.
        ConfigError: If the blocks are compiled, so that nothing can be seen inside of them.
    """
    inner: Any = unwrap(model)
    view = describe(inner)
    if model is not inner and hasattr(model, "_orig_mod"):
        raise ConfigError("The model is compiled, so its attention cannot be seen. Give the model as it was before.")
    grid = (0, 0) if view.has_stages else tuple(inner.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))
    cameras = _cameras(inner, view, grid)
    with contextlib.ExitStack() as open_hooks:
        for camera in cameras.values():
            camera.look(open_hooks)
        open_hooks.enter_context(evaluating(inner))
        inner.forward_features(images)
    unseen = [block for block, camera in cameras.items() if not camera.seen]
    if unseen:
        raise ConfigError(
            f"The attention of block {unseen[0]} could not be seen. Is the model compiled? Look before "
            "`bank.compile`, or with compile: off."
        )
    return [camera.attention() for camera in cameras.values()]


def _cameras(model: Any, view: View, grid: tuple[int, ...]) -> dict[int, _Camera]:
    blocks = {site.block: model.get_submodule(site.path) for site in view.at("block")}
    found: dict[int, _Camera] = {}
    for site in view.at("attn"):
        assert site.block is not None
        module = model.get_submodule(site.path)
        if view.has_stages:
            found[site.block] = _WindowCamera(site.block, module, blocks[site.block])
        else:
            has_class = getattr(model, "cls_token", None) is not None
            found[site.block] = _TokenCamera(site.block, module, view.num_prefix_tokens, (grid[0], grid[1]), has_class)
    return found


class _Camera:
    """Looks at the attention of one block."""

    def __init__(self, block: int, module: Any) -> None:
        self.block, self.module = block, module
        self.seen: list[Tensor] = []

    def look(self, hooks: contextlib.ExitStack) -> None:
        """Switch fused attention off and look until the hooks are closed."""
        hooks.enter_context(_unfused(self.module))
        handle = self.module.attn_drop.register_forward_pre_hook(partial(self._keep))
        hooks.callback(handle.remove)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(inputs[0].float().cpu())

    def attention(self) -> Attention:
        """Return what was seen."""
        raise NotImplementedError


@contextlib.contextmanager
def _unfused(module: Any) -> Iterator[None]:
    before = getattr(module, "fused_attn", None)
    if before is not None:
        module.fused_attn = False
    try:
        yield
    finally:
        if before is not None:
            module.fused_attn = before


class _TokenCamera(_Camera):
    """Looks at a sequence: learned keys, prefix tokens, inserted tokens, patches."""

    def __init__(self, block: int, module: Any, prefix: int, grid: tuple[int, int], has_class: bool) -> None:
        super().__init__(block, module)
        self.prefix, self.grid, self.has_class = prefix, grid, has_class

    def attention(self) -> Attention:
        weights = self.seen[-1]  # the rows of streams come before the tokens
        patches = self.grid[0] * self.grid[1]
        keys = weights.shape[3] - weights.shape[2]
        inserted = weights.shape[2] - self.prefix - patches
        if inserted < 0:
            raise ConfigError(
                f"Block {self.block} has {weights.shape[2]} tokens for {patches} patches: some were dropped, so there "
                "is no map of its attention."
            )
        first = self.prefix + inserted
        asking = weights[:, :, :1] if self.has_class else weights[:, :, first:]
        to = asking.mean(2)
        learned = torch.cat([to[..., :keys], to[..., keys + self.prefix : keys + first]], -1)
        prompts = weights[:, :, self.prefix : first, keys + first :]
        return Attention(
            block=self.block,
            to_tokens=to[..., keys + first :].unflatten(-1, self.grid),
            to_learned=learned,
            of_prompts=prompts.unflatten(-1, self.grid),
            by_class_token=self.has_class,
        )


class _WindowCamera(_Camera):
    """Looks at the windows of a map; learned keys and those of streams come before the tokens of a window."""

    def __init__(self, block: int, module: Any, whole: nn.Module) -> None:
        super().__init__(block, module)
        self.whole = whole
        self.windows: Windows | None = None

    def look(self, hooks: contextlib.ExitStack) -> None:
        """Look at the block's input too, whose size says how windows are reassembled."""
        super().look(hooks)
        handle = self.whole.register_forward_pre_hook(self._measure)
        hooks.callback(handle.remove)

    def _measure(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.windows = cut_windows(block, inputs[0][..., :1])

    def _map(self, values: Tensor) -> Tensor:
        """Reassemble (windows, heads, N) to (B, heads, h, w)."""
        assert self.windows is not None
        return join_windows(self.windows, values.transpose(1, 2)).permute(0, 3, 1, 2)

    def attention(self) -> Attention:
        *rows, weights = self.seen
        keys = weights.shape[3] - weights.shape[2]
        to = weights.mean(2)
        tokens = self._map(to[..., keys:])
        images = len(tokens)
        prompts = [self._map(w[:, :, row, keys:]) for w in rows for row in range(w.shape[2])]
        none = tokens.new_zeros(images, tokens.shape[1], 0, *tokens.shape[2:])
        return Attention(
            block=self.block,
            to_tokens=tokens,
            to_learned=to[..., :keys].unflatten(0, (images, -1)).mean(1),
            of_prompts=torch.stack(prompts, 2) if prompts else none,
            by_class_token=False,
        )


def draw_attention(
    pictures: Sequence[Tensor], attention: Sequence[Attention], path: str | Path, blocks: Sequence[int] | None = None
) -> Path:
    """Draw a row for each image: the image, and over it the attention of some blocks, averaged over the heads.

    Each panel has its own scale, from its smallest value (dark) to its largest (bright).

    Args:
        pictures: RGB, uint8 (3, H, W), of the images that were looked at.
        attention: The result of `attention_of`.
        path: The PNG file.
        blocks: Blocks to draw; None takes up to six, evenly spaced.

    Returns:
        The PNG file.

    Raises:
        ConfigError: If there is no such block.
        DataError: If the numbers of images differ.
        FileError: If the picture cannot be written.
    """
    chosen = _chosen(attention, blocks)
    _check(pictures, attention)
    rows = [
        [(picture, None), *((picture, found.to_tokens[index].mean(0)) for found in chosen)]
        for index, picture in enumerate(pictures)
    ]
    who = "the class token" if attention[0].by_class_token else "the tokens of the map"
    return _draw(rows, ["image", *(f"block {found.block}" for found in chosen)], f"attention of {who}", path)


def draw_prompts(
    picture: Tensor, attention: Sequence[Attention], path: str | Path, blocks: Sequence[int] | None = None
) -> Path | None:
    """Draw where the inserted tokens of some blocks look in the first image: a row per block, a column per prompt.

    Above each panel stands how much of the attention goes to that prompt, averaged over the heads.

    Args:
        picture: RGB, uint8 (3, H, W).
        attention: The result of `attention_of`.
        path: The PNG file.
        blocks: Blocks to draw; None takes up to six, evenly spaced.

    Returns:
        The PNG file; None where no token is inserted, and nothing is drawn.

    Raises:
        ConfigError: If there is no such block.
        FileError: If the picture cannot be written.
    """
    chosen = [found for found in _chosen(attention, blocks) if found.of_prompts.shape[2]]
    if not chosen:
        return None
    shown = min(_MOST_PROMPTS, max(found.of_prompts.shape[2] for found in chosen))
    rows: list[list[tuple[Tensor, Tensor | None]]] = []
    titles = []
    for found in chosen:
        maps = found.of_prompts[0].mean(0)[:shown]
        rows.append([(picture, None), *((picture, values) for values in maps)])
        shares = found.to_learned[0].mean(0)[-found.of_prompts.shape[2] :]
        titles += [f"block {found.block}", *(f"{share:.1%}" for share in shares[:shown].tolist())]
    return _draw(rows, titles, "attention of inserted tokens, and the share of attention they get", path)


def _chosen(attention: Sequence[Attention], blocks: Sequence[int] | None) -> list[Attention]:
    if blocks is None:
        places = torch.linspace(0, len(attention) - 1, min(_MOST_BLOCKS, len(attention))).round().long()
        return [attention[place] for place in places.tolist()]
    known = {found.block: found for found in attention}
    wrong = [block for block in blocks if block not in known]
    if wrong or not blocks:
        raise ConfigError(f"blocks={list(blocks)}: choose some of 0 to {len(attention) - 1}.")
    return [known[block] for block in blocks]


def _check(pictures: Sequence[Tensor], attention: Sequence[Attention]) -> None:
    if not attention or not 0 < len(pictures) <= len(attention[0].to_tokens):
        images = len(attention[0].to_tokens) if attention else 0
        raise DataError(f"There are {len(pictures)} pictures, and the attention was seen on {images} images.")


def _draw(
    rows: Sequence[Sequence[tuple[Tensor, Tensor | None]]], titles: Sequence[str], told: str, path: str | Path
) -> Path:
    """Draw panels; with as many titles as panels each has one, else those of the first row."""
    columns = max(map(len, rows))
    names = drawn_names(list(titles), 24)
    each = len(titles) > columns
    with matplotlib.rc_context(settings_for(names, axes_grid=False)):
        height = (_PANEL + (0.25 if each else 0.08)) * len(rows) + 0.5
        figure = Figure(figsize=(max(_PANEL * columns, 4.5), height), layout="constrained")
        panels = figure.subplots(len(rows), columns, squeeze=False)
        used = iter(names)
        for number, row in enumerate(rows):
            for place, panel in zip(panels[number], [*row, *[None] * (columns - len(row))], strict=True):
                place.axis("off")
                if panel is None:
                    continue
                _panel(place, *panel)
                if each or number == 0:
                    place.set_title(next(used), fontsize=8)
        figure.supxlabel(told, fontsize=9)
        return save(figure, path)


def attention_picture(picture: Tensor, values: Tensor) -> Tensor:
    """Lay attention over an image, from dark, its smallest value, to bright, its largest.

    Args:
        picture: RGB, uint8 (3, H, W).
        values: (h, w).

    Returns:
        RGB, uint8 (3, H, W).
    """
    smooth = _resized(values, picture)
    span = float(smooth.max() - smooth.min())
    share = (smooth - smooth.min()) / span if span > 0 else torch.zeros_like(smooth)
    heat = torch.from_numpy(matplotlib.colormaps["inferno"](share.numpy(), bytes=True)[..., :3].copy()).permute(2, 0, 1)
    return ((1 - _OPACITY) * picture.cpu().float() + _OPACITY * heat.float()).round().to(torch.uint8)


def _resized(values: Tensor, picture: Tensor) -> Tensor:
    size = tuple(picture.shape[-2:])
    return F.interpolate(values[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]


def _panel(place: Any, picture: Tensor, values: Tensor | None) -> None:
    drawn = picture.cpu() if values is None else attention_picture(picture, values)
    place.imshow(drawn.permute(1, 2, 0).numpy())
