"""UPerNet's decoder: pyramid pooling on the coarsest map, then a feature pyramid network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vispeft.errors import ConfigError
from vispeft.heads.base import Decoder, register_decoder
from vispeft.heads.layers import ConvBlock, concat_resized, resize

__all__ = ["UPerDecoder"]


@register_decoder
class UPerDecoder(Decoder):
    """Pyramid pooling (arXiv 1612.01105) on the coarsest map, added top-down, all concatenated at the finest.

    Tensors have the names of ``UPerHead`` in mmsegmentation.
    """

    name: ClassVar[str] = "uper"
    paper: ClassVar[str] = "arXiv 1807.10221"
    needs_pyramid: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            channels: Channels of every convolution; 512 in the paper.
            pool_scales: Sides of the grids to which the coarsest map is average-pooled; those of the paper by default.
            dropout: Probability of dropping a channel during training.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        if not pool_scales or min(pool_scales) < 1:
            raise ConfigError(f"Decoder 'uper' was asked for with pool_scales={pool_scales}; give numbers from 1 on.")
        *finer, coarsest = self.in_channels
        self.pool_scales = tuple(pool_scales)
        self.least_batch = 2 if 1 in self.pool_scales else 1  # a 1x1 grid gives BatchNorm one value per image
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(coarsest, channels)) for scale in pool_scales
        )
        self.bottleneck = ConvBlock(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBlock(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvBlock(len(self.in_channels) * channels, channels, 3)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Pool the coarsest map, add it top-down, and concatenate all levels.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i).
        """
        levels = [self.pool(maps[-1])]
        for x, lateral in zip(maps[-2::-1], reversed(self.lateral_convs), strict=True):
            levels.insert(0, lateral(x) + resize(levels[0], x.shape[-2:]))
        finer = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        return self.fpn_bottleneck(concat_resized([*finer, levels[-1]]))

    def pool(self, x: Tensor) -> Tensor:
        """Fuse a map with its averages over grids of several sizes: (B, channels, h, w).

        Args:
            x: The coarsest map (B, in_channels[-1], h, w).

        Raises:
            ConfigError: If BatchNorm would see a single value per channel during training.
        """
        if self.training and x.shape[0] < self.least_batch:
            raise ConfigError(
                "Decoder 'uper' pools each image to one pixel, and BatchNorm cannot be trained on a batch of one "
                "image. Train with at least two, or give pool_scales without 1."
            )
        return self.bottleneck(torch.cat([x, *(resize(part(x), x.shape[-2:]) for part in self.psp_modules)], dim=1))
