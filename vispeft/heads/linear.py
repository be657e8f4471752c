"""Linear decoder: a probe of a frozen backbone's maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vispeft.heads.base import Decoder, register_decoder
from vispeft.heads.layers import concat_resized

__all__ = ["LinearDecoder"]


@register_decoder
class LinearDecoder(Decoder):
    """BatchNorm and a 1x1 convolution on all maps, resized to the finest and concatenated (``BNHead`` in DINOv2)."""

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "arXiv 2304.07193"

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, dropout: float = 0.0) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            dropout: Probability of dropping a channel during training; 0 in DINOv2.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__(in_channels, num_classes, channels=sum(in_channels), dropout=dropout)
        self.bn = nn.BatchNorm2d(sum(in_channels))

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Concatenate the maps and normalise them.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i).
        """
        return self.bn(concat_resized(maps))
