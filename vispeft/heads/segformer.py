"""SegFormer's all-MLP decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from vispeft.heads.base import Decoder, register_decoder
from vispeft.heads.layers import ConvBlock, concat_resized, conv2d

__all__ = ["SegFormerDecoder"]


@register_decoder
class SegFormerDecoder(Decoder):
    """A 1x1 convolution per map; the results are resized to the finest, concatenated and mixed by another one.

    Follows ``SegformerHead`` of mmsegmentation, which, unlike the paper's formula (equation 4), also has BatchNorm and
    ReLU after the layer of each map; ``level_norm=False`` gives the formula. The maps may have any sizes, so a plain
    ViT works too.
    """

    name: ClassVar[str] = "segformer"
    paper: ClassVar[str] = "arXiv 2105.15203"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        dropout: float = 0.1,
        level_norm: bool = True,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            channels: Channels each map is projected to; 256 in the paper for B0 and B1, 768 for larger ones.
            dropout: Probability of dropping a channel during training.
            level_norm: Normalise each projected map, and apply a ReLU; otherwise its projection has a bias instead.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        layer = ConvBlock if level_norm else partial(conv2d, bias=True)
        self.convs = nn.ModuleList(layer(width, channels) for width in self.in_channels)
        self.fusion_conv = ConvBlock(channels * len(self.in_channels), channels)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Project, resize, concatenate and mix the maps.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i).
        """
        return self.fusion_conv(concat_resized([conv(x) for conv, x in zip(self.convs, maps, strict=True)]))
