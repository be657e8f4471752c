"""Maps for dense tasks: the backbone's outputs that a decoder reads, fine to coarse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vispeft.core.families import describe, is_feature_getter, unwrap
from vispeft.core.sites import View
from vispeft.errors import BackboneError, ConfigError

__all__ = ["BEHIND_MAPS", "DensePyramid", "MapReader", "wide"]

LEVELS = ("taps", "vitdet")
BEHIND_MAPS = ("fc_norm", "attn_pool")
"""Roles that act on the pooled feature, so they never affect a map."""


class MapReader(nn.Module):
    """Read maps from a backbone, which it does not own.

    ``taps`` returns the outputs of the chosen blocks (ViT) or stages (Swin), as timm's ``forward_intermediates`` does,
    with the last norm. ``vitdet`` builds four levels, with strides from a quarter of the patch size to twice the patch
    size, from the last tap alone: the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3), for decoders that
    need a pyramid.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[int] | None = None,
        levels: Literal["taps", "vitdet"] = "taps",
        width: int = 256,
        *,
        norm: bool = True,
    ) -> None:
        """Choose the maps to read.

        Args:
            model: A timm model of a supported family, adapted or not.
            taps: Blocks of a ViT or stages of a Swin, in ascending order; negative ones count from the last. None takes
                four evenly spaced blocks, or all stages.
            levels: Return the maps unchanged (``taps``), or build a pyramid (``vitdet``).
            width: Channels of each level of a ``vitdet`` pyramid.
            norm: Apply the backbone's last norm to the maps that have it: the last one of a Swin, all of a plain ViT.

        Raises:
            ConfigError: If a tap does not exist, or ``vitdet`` is chosen for a model that already yields a pyramid.
            BackboneError: If the model returns maps itself and has no ``forward_intermediates``.
        """
        super().__init__()
        if not hasattr(unwrap(model), "forward_intermediates") or is_feature_getter(model):
            raise BackboneError("A features_only model already returns maps. Pass the whole model (num_classes=0).")
        view = describe(unwrap(model))
        self.taps = view.map_taps(taps)
        self.side, self.norm = view.patch_size[0], norm
        widths, strides = _shapes(view, self.taps)
        if levels not in LEVELS:
            raise ConfigError(f"levels={levels!r}: choose 'taps' or 'vitdet'.")
        self.levels: nn.ModuleList | None = None
        if levels == "vitdet":
            if len(set(strides)) > 1:
                raise ConfigError(
                    "levels='vitdet' makes a pyramid out of one map, and this model has one already. Leave it out."
                )
            self.taps, widths, strides = self.taps[-1:], widths[-1:], strides[-1:]
            self.levels = nn.ModuleList(_level(widths[0], width, share) for share in (4, 2, 1, 0.5))
            widths, strides = [width] * 4, [int(strides[0] / share) for share in (4, 2, 1, 0.5)]
        self.channels, self.strides = widths, strides

    @property
    def divisor(self) -> int:
        """Number that should divide height and width, so that no map ends inside a patch."""
        return max(self.side, *self.strides)

    def forward(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Compute the maps.

        Args:
            model: The model this reader was created for, or a copy of it.
            images: (B, 3, H, W) in the model's type.

        Returns:
            Maps (B, C, h, w) in float32 (or the type of autocast), fine to coarse.
        """
        run = cast(Any, unwrap(model)).forward_intermediates
        asked = {"norm": self.norm, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
        maps = run(images, indices=self.taps, **asked)
        maps = wide(maps, images)
        if self.levels is None:
            return maps
        return [level(maps[0]) for level in self.levels]


def wide(maps: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    """Convert maps of a half-precision backbone to float32, in which decoders compute; under autocast leave them.

    Args:
        maps: Maps (B, C, h, w).
        images: The images, on the same device.
    """
    if torch.is_autocast_enabled(images.device.type):
        return list(maps)
    return [level.float() if level.dtype in (torch.bfloat16, torch.float16) else level for level in maps]


class DensePyramid(nn.Module):
    """A backbone with its `MapReader`: images in, maps out."""

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[int] | None = None,
        levels: Literal["taps", "vitdet"] = "taps",
        width: int = 256,
        *,
        norm: bool = True,
    ) -> None:
        """Combine both; see `MapReader` for the arguments."""
        super().__init__()
        self.model = model
        self.reader = MapReader(model, taps, levels, width, norm=norm)
        self.channels, self.strides = self.reader.channels, self.reader.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps, fine to coarse.

        Args:
            images: (B, 3, H, W).
        """
        return cast(list[Tensor], self.reader(self.model, images))


def _shapes(view: View, taps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return channels and strides of the maps at the taps."""
    patch = view.patch_size[0]
    if not view.has_stages:
        return [view.widths[-1]] * len(taps), [patch] * len(taps)
    return [view.widths[view.stages[tap][0]] for tap in taps], [patch * 2**tap for tap in taps]


def _level(width: int, out: int, share: float) -> nn.Sequential:
    """Create one level: resize, then project to the pyramid's width by a 1x1 and a 3x3 convolution."""
    resize: list[nn.Module]
    narrow = width
    if share == 4:
        half, narrow = width // 2, width // 4
        resize = [nn.ConvTranspose2d(width, half, 2, 2), LayerNorm2d(half), nn.GELU()]
        resize += [nn.ConvTranspose2d(half, narrow, 2, 2)]
    elif share == 2:
        narrow = width // 2
        resize = [nn.ConvTranspose2d(width, narrow, 2, 2)]
    else:
        resize = [nn.Identity() if share == 1 else nn.MaxPool2d(2, 2)]
    smooth = [nn.Conv2d(narrow, out, 1, bias=False), LayerNorm2d(out)]
    smooth += [nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out)]
    return nn.Sequential(*resize, *smooth)
