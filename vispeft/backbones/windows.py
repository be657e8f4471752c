"""Partition of a map into windows, the mask of shifted windows, and reassembly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["Windows", "cut_windows", "join_windows", "shift_mask"]

APART = -100.0
"""Added to the score of two tokens in one window that are not neighbours in the unshifted map; timm's value."""


class Windows(NamedTuple):
    """A map partitioned into windows."""

    tokens: Tensor
    """(B * windows, area, C); the windows of an image are consecutive."""
    mask: Tensor | None
    """(windows, area, area), added to scores; None without a shift."""
    size: tuple[int, int]
    """Height and width of the map."""
    window: tuple[int, int]
    """Height and width of a window."""
    shift: tuple[int, int]
    """Rows and columns by which the map was shifted."""


def cut_windows(block: Any, x: Tensor) -> Windows:
    """Shift, pad and partition a map as a Swin block does.

    Args:
        block: timm's block of either generation, or one for maps of any size.
        x: (B, H, W, C).
    """
    size, window = (x.shape[1], x.shape[2]), tuple(block.window_size)
    any_size = hasattr(block, "shift_for")
    shift = block.shift_for(*size) if any_size else tuple(block.shift_size)
    if any(shift):
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    down, right = (-side % by for side, by in zip(size, window, strict=True))
    x = F.pad(x, (0, 0, 0, right, 0, down))
    fixed = not any_size and not getattr(block, "dynamic_mask", False)
    mask = block.attn_mask if fixed else shift_mask(x, window, shift)
    tokens = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", h=window[0], w=window[1])
    return Windows(tokens, mask, size, window, shift)


def join_windows(windows: Windows, tokens: Tensor) -> Tensor:
    """Reassemble a map from windows: the inverse of `cut_windows`.

    Args:
        windows: The result of `cut_windows`.
        tokens: New contents of the windows, (B * windows, area, C).

    Returns:
        (B, H, W, C).
    """
    (height, width), (h, w), shift = windows.size, windows.window, windows.shift
    x = rearrange(tokens, "(b i j) (h w) c -> b (i h) (j w) c", i=-(-height // h), j=-(-width // w), h=h, w=w)
    x = x[:, :height, :width].contiguous()
    return torch.roll(x, shifts=shift, dims=(1, 2)) if any(shift) else x


def shift_mask(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
    """Compute the attention mask between tokens in one window of a shifted map that are not neighbours in the map.

    Args:
        x: The padded map (B, H, W, C), for its size, dtype and device.
        window: Height and width of a window.
        shift: Rows and columns by which it was shifted.

    Returns:
        (windows, area, area) of 0 and `APART`; None without a shift.
    """
    if not any(shift):
        return None
    labels = []
    for length, side, by in zip(x.shape[1:3], window, shift, strict=True):
        place = torch.arange(length, device=x.device)
        parts = (place >= length - side).long() + (place >= length - by).long()
        labels.append(parts if by else torch.zeros_like(place))
    regions = 3 * labels[0][:, None] + labels[1]
    regions = rearrange(regions, "(i h) (j w) -> (i j) (h w)", h=window[0], w=window[1])
    same = regions[:, None] == regions[:, :, None]
    return torch.where(same, 0.0, APART).to(x.dtype)
