"""Layers shared by several decoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvBlock", "concat_resized", "conv2d", "resize"]


def conv2d(in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = False) -> nn.Conv2d:
    """Create a convolution that keeps the size of the map, initialised as mmcv's ``ConvModule``.

    That is Kaiming-normal in fan-out mode (arXiv 1502.01852), with zero bias.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Odd side of the kernel.
        bias: Whether it has a bias, which a following BatchNorm would cancel.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm and ReLU, with the tensor names of mmcv's ``ConvModule``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        """Create the layers.

        Args:
            in_channels: Input channels.
            out_channels: Output channels.
            kernel_size: Odd side of the kernel; the map keeps its size.
        """
        super().__init__()
        self.conv = conv2d(in_channels, out_channels, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute a map (B, out_channels, h, w).

        Args:
            x: Map (B, in_channels, h, w).
        """
        return F.relu(self.bn(self.conv(x)), inplace=True)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, h, w) bilinearly with ``align_corners=False``.

    Args:
        x: The map.
        size: Target height and width.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def concat_resized(maps: Sequence[Tensor]) -> Tensor:
    """Resize maps to the first one's size and concatenate their channels: (B, sum of C_i, h_0, w_0).

    Args:
        maps: Maps (B, C_i, h_i, w_i).
    """
    size = maps[0].shape[-2:]
    return torch.cat([resize(level, size) for level in maps], dim=1)
