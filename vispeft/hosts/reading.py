"""Packing of stream rows among the tokens, for the classifier.

`forward_features` returns the backbone's tokens, with the rows that the classifier reads packed among them;
`forward_head` unpacks these rows. Code that calls the two in turn thus works, and modules keep no state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.streams import Stream

__all__ = ["joined", "packed_rows", "taken_apart"]


def packed_rows(shapes: Sequence[tuple[int, int]], width: int) -> int:
    """Count the rows of one width needed to pack tensors of several widths.

    Args:
        shapes: Rows and width of each tensor.
        width: Width of the packed rows.
    """
    return -(-sum(rows * own for rows, own in shapes) // width)


def joined(tokens: Tensor, kept: Sequence[Tensor], first: int) -> Tensor:
    """Insert stream rows among the tokens, packed into rows of the tokens' width.

    Args:
        tokens: (B, N, D).
        kept: (B, R, width) of each block.
        first: Number of tokens before the packed rows.

    Returns:
        (B, N + rows, D).
    """
    flat, width = torch.cat([rows.flatten(1) for rows in kept], dim=1), tokens.shape[-1]
    rows = -(-flat.shape[1] // width)
    packed = F.pad(flat, (0, rows * width - flat.shape[1])).unflatten(1, (rows, width))
    return torch.cat([tokens[:, :first], packed, tokens[:, first:]], dim=1)


def taken_apart(tokens: Tensor, stream: Stream, first: int) -> tuple[Tensor, list[Tensor]]:
    """Undo `joined`.

    Args:
        tokens: (B, N + rows, D).
        stream: The stream whose rows are among them.
        first: Number of tokens before the packed rows.

    Returns:
        The tokens (B, N, D), and the rows of each block.
    """
    count = packed_rows(stream.shapes, tokens.shape[-1])
    flat = tokens[:, first : first + count].flatten(1)
    sizes = [rows * width for rows, width in stream.shapes]
    parts = flat[:, : sum(sizes)].split(sizes, dim=1)
    kept = [part.unflatten(1, shape) for part, shape in zip(parts, stream.shapes, strict=True)]
    return torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1), kept
