"""Attention of a few rows to tokens, by the projection of the tokens and without their keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Reading", "read_rows"]


class Reading(NamedTuple):
    """The tokens that rows attend to, and the frozen projection to keys and values."""

    tokens: Tensor
    """(windows, N, D); the windows of an image are consecutive."""
    keys: Tensor
    """Matrix of each head, (heads, width of a head, D)."""
    values: Tensor
    """The same for values."""
    bias: Tensor | None
    """Bias of the values, (heads, 1, width of a head)."""
    scale: float
    """Multiplier of the scores."""


def read_rows(asked: Tensor, reading: Reading) -> Tensor:
    """Compute the attention of rows to tokens, averaged over the windows of each image.

    ``(W_k n + b_k) . q = n . (W_k^T q)`` up to a constant over all tokens, to which softmax is invariant; and since
    attention weights sum to one, mixing ``W_v n + b_v`` equals ``W_v`` of the mixed ``n``, plus ``b_v``. The mean over
    windows is taken of the mixed ``n``.

    Args:
        asked: Queries (B, heads, Q, width of a head).
        reading: What they read.

    Returns:
        Values with concatenated heads, (B, Q, heads * width of a head).
    """
    images, heads, count, width = asked.shape
    x = reading.tokens
    keys = _by_image(torch.bmm(_by_head(asked * reading.scale), reading.keys), images)
    attention = torch.bmm(_spread(keys, x), x.transpose(1, 2)).softmax(dim=-1)
    mixed = _gathered(torch.bmm(attention, x), images)
    mixed = mixed if mixed.shape[0] == x.shape[0] else mixed / (x.shape[0] // images)
    rows, values = _by_head(mixed.view(images, heads, count, x.shape[2])), reading.values.transpose(1, 2)
    out = torch.bmm(rows, values) if reading.bias is None else torch.baddbmm(reading.bias, rows, values)
    out = out.view(heads, images, count, width).permute(1, 2, 0, 3)
    return out.reshape(images, count, heads * width)


def _by_head(rows: Tensor) -> Tensor:
    """Turn (B, heads, Q, channels) into (heads, B * Q, channels)."""
    images, heads, count, channels = rows.shape
    return rows.transpose(0, 1).reshape(heads, images * count, channels)


def _by_image(rows: Tensor, images: int) -> Tensor:
    """Turn (heads, B * Q, channels) into (B, heads * Q, channels)."""
    heads, both, channels = rows.shape
    count = both // max(1, images)
    return rows.view(heads, images, count, channels).transpose(0, 1).reshape(images, heads * count, channels)


def _spread(rows: Tensor, windows: Tensor) -> Tensor:
    """Repeat the rows of each image, (B, R, D), for each of its windows, (windows, R, D)."""
    images, count, channels = rows.shape
    if windows.shape[0] == images:
        return rows
    each = windows.shape[0] // images
    return rows.unsqueeze(1).expand(images, each, count, channels).reshape(windows.shape[0], count, channels)


def _gathered(rows: Tensor, images: int) -> Tensor:
    """Sum (windows, R, D) over the windows of each image, (B, R, D)."""
    if rows.shape[0] == images:
        return rows
    return rows.view(images, rows.shape[0] // images, *rows.shape[1:]).sum(1)
