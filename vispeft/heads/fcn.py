"""FCN decoder: a few 3x3 convolutions on one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vispeft.errors import ConfigError
from vispeft.heads.base import Decoder, register_decoder
from vispeft.heads.layers import ConvBlock

__all__ = ["FCNDecoder"]


@register_decoder
class FCNDecoder(Decoder):
    """3x3 convolutions on one chosen map, with that map concatenated to their output (``FCNHead`` of mmsegmentation).

    Scores have the size of that map, so they are resized only once, to the image.
    """

    name: ClassVar[str] = "fcn"
    paper: ClassVar[str] = "arXiv 1411.4038"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        index: int = -1,
        channels: int = 256,
        num_convs: int = 2,
        concat_input: bool = True,
        dropout: float = 0.1,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            index: Index of the map to read; negative ones count from the last.
            channels: Channels of every convolution.
            num_convs: Number of convolutions before the concatenation, at least one.
            concat_input: Whether to concatenate the map to their output, followed by one more convolution.
            dropout: Probability of dropping a channel during training.

        Raises:
            ConfigError: If a number is out of range, or there is no such map.
        """
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        count = len(self.in_channels)
        if not -count <= index < count:
            raise ConfigError(f"Decoder 'fcn' was asked to read map {index} of {count}; give {-count} to {count - 1}.")
        if num_convs < 1:
            raise ConfigError(f"Decoder 'fcn' was asked for with num_convs={num_convs}; give at least 1.")
        self.index = index
        width = self.in_channels[index]
        widths = [width, *[channels] * num_convs]
        self.convs = nn.Sequential(*(ConvBlock(a, channels, 3) for a in widths[:-1]))
        self.conv_cat = ConvBlock(width + channels, channels, 3) if concat_input else None

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Convolve the chosen map.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i).
        """
        x = maps[self.index]
        features = self.convs(x)
        return features if self.conv_cat is None else self.conv_cat(torch.cat([x, features], dim=1))
