"""HRNet-style decoder, as MTLoRA uses it: narrow each map, concatenate at the finest size, mix by 1x1 convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.errors import ConfigError
from vispeft.heads.base import Decoder, register_decoder
from vispeft.heads.layers import concat_resized

__all__ = ["HRNetDecoder"]


@register_decoder
class HRNetDecoder(Decoder):
    """A 1x1 convolution without bias per map; the results are resized to the finest, concatenated, widened and scored.

    The last layers are those of HRNet's V2 head (arXiv 1908.07919, figure 4b): 1x1 convolution with bias, BatchNorm
    with momentum 0.1, ReLU, 1x1 convolution. The widths are MTLoRA's (arXiv 2403.20320, public code at commit
    333a375, ``DECODER_CHANNELS``), which widens the concatenated maps four times. All layers but the last start as
    PyTorch starts them.
    """

    name: ClassVar[str] = "hrnet"
    paper: ClassVar[str] = "arXiv 1908.07919"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (18, 36, 72, 144),
        widen: int = 4,
        dropout: float = 0.0,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            channels: Channels each map is narrowed to, one number per map.
            widen: Channels behind the concatenation, over those of the concatenated maps; 4 in MTLoRA.
            dropout: Probability of dropping a channel during training; 0 in MTLoRA.

        Raises:
            ConfigError: If a number is out of range, or there is not one number of channels per map.
        """
        if len(channels) != len(in_channels) or min(channels, default=0) < 1:
            raise ConfigError(
                f"Decoder 'hrnet' was asked for with channels={list(channels)}, and there are {len(in_channels)} maps; "
                "give one number from 1 on for each, in decoder_args.channels."
            )
        if widen < 1:
            raise ConfigError(f"Decoder 'hrnet' was asked for with widen={widen}; give at least 1.")
        narrowed = sum(channels)
        super().__init__(in_channels, num_classes, channels=widen * narrowed, dropout=dropout)
        pairs = zip(self.in_channels, channels, strict=True)
        self.reducers = nn.ModuleList(nn.Conv2d(width, narrow, 1, bias=False) for width, narrow in pairs)
        self.conv = nn.Conv2d(narrowed, widen * narrowed, 1)
        self.bn = nn.BatchNorm2d(widen * narrowed)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Narrow, resize, concatenate and widen the maps.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i).
        """
        narrowed = [reduce(level) for reduce, level in zip(self.reducers, maps, strict=True)]
        return F.relu(self.bn(self.conv(concat_resized(narrowed))), inplace=True)
