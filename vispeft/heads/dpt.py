"""DPT's decoder for a plain ViT: maps of one size are resampled to four scales and fused from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.errors import ConfigError
from vispeft.heads.base import Decoder, register_decoder, sizes_of
from vispeft.heads.layers import ConvBlock, conv2d

__all__ = ["DPTDecoder"]


@register_decoder
class DPTDecoder(Decoder):
    """Reassemble four maps at 4, 2, 1 and 1/2 times their size and fuse them as RefineNet does (arXiv 1611.06612).

    Scores have twice the size of the finest of these: eight times the input maps, or half the image for 16-pixel
    patches. The class token is not read (the paper's *ignore*). If halving an odd size rounds, a fused map is resized
    to the next finer one, so any patch grid works.
    """

    name: ClassVar[str] = "dpt"
    paper: ClassVar[str] = "arXiv 2103.13413"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        reassembled: Sequence[int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: Channels of the four maps, from early to late blocks.
            num_classes: Number of scores per pixel.
            channels: Channels of the fused maps; 256 in the paper.
            reassembled: Channels of the maps at the four scales. None gives 1/8, 1/4, 1/2 and 1 of the width of the
                maps: 96, 192, 384, 768 for ViT-B, as published; for ViT-L the authors use 256, 512, 1024, 1024.
            dropout: Probability of dropping a channel during training.

        Raises:
            ConfigError: If a number is out of range, or there are not four maps.
        """
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        if reassembled is None:
            reassembled = [max(1, width // part) for width, part in zip(self.in_channels, (8, 4, 2, 1), strict=False)]
        if not len(self.in_channels) == len(reassembled) == 4 or min(reassembled) < 1:
            raise ConfigError(
                f"Decoder 'dpt' was asked for on {len(self.in_channels)} maps with reassembled={tuple(reassembled)}; "
                "it reads exactly 4: tap four blocks, such as the last of each quarter."
            )
        quadruple, double, _, half = reassembled
        self.projects = nn.ModuleList(
            conv2d(width, to, bias=True) for width, to in zip(self.in_channels, reassembled, strict=True)
        )
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(quadruple, quadruple, kernel_size=4, stride=4),
                nn.ConvTranspose2d(double, double, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(half, half, kernel_size=3, stride=2, padding=1),
            ]
        )
        self.convs = nn.ModuleList(conv2d(width, channels, 3) for width in reassembled)
        self.fusion_blocks = nn.ModuleList(FusionBlock(channels, skip=level > 0) for level in range(4))
        self.project = ConvBlock(channels, channels, 3)

    def check(self, maps: Sequence[Tensor]) -> None:
        """Refuse maps that do not match this decoder.

        Args:
            maps: Maps (B, in_channels[i], h, w).

        Raises:
            ConfigError: If number or channels of the maps do not match, or their sizes differ.
        """
        super().check(maps)
        if any(level.shape[-2:] != maps[0].shape[-2:] for level in maps):
            raise ConfigError(
                "Decoder 'dpt' makes its own scales out of maps of one size, as a plain ViT gives them, and got maps "
                f"of {sizes_of(maps)}. For a pyramid take 'segformer' or 'uper'."
            )

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Reassemble the maps at four scales and fuse them, coarsest first: (B, channels, 8h, 8w).

        Args:
            maps: Maps (B, in_channels[i], h, w).
        """
        layers = zip(self.projects, self.resize_layers, self.convs, maps, strict=True)
        coarsest, *finer = reversed([conv(rescale(project(x))) for project, rescale, conv, x in layers])
        sizes = [tuple(level.shape[-2:]) for level in finer]
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
        first, *blocks = self.fusion_blocks
        fused = first(coarsest, None, sizes[0])
        for block, level, size in zip(blocks, finer, sizes[1:], strict=True):
            fused = block(fused, level, size)
        return self.project(fused)


class FusionBlock(nn.Module):
    """Add a finer map to a fused one, refine the sum, resize it to the next size and project it."""

    def __init__(self, channels: int, skip: bool) -> None:
        """Create the layers.

        Args:
            channels: Channels of all maps.
            skip: Whether there is a finer map to add; the first block has none.
        """
        super().__init__()
        self.project = conv2d(channels, channels, bias=True)
        self.res_conv_unit1 = ResidualUnit(channels) if skip else None
        self.res_conv_unit2 = ResidualUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        """Fuse two maps of one size into one of the next size (B, channels, *size).

        Args:
            x: Map fused so far (B, channels, h, w).
            finer: Map to add, of the same shape; None in the first block.
            size: Height and width of the result.
        """
        if self.res_conv_unit1 is not None and finer is not None:
            x = x + self.res_conv_unit1(finer)
        x = self.res_conv_unit2(x)
        # The authors' code aligns corners here, unlike in every other resize.
        return self.project(F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True))


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with ReLU before and BatchNorm after each, added to their input."""

    def __init__(self, channels: int) -> None:
        """Create the layers.

        Args:
            channels: Channels of the map.
        """
        super().__init__()
        self.conv1, self.bn1 = conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv2d(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, channels, h, w).

        Args:
            x: Map of the same shape.
        """
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))
