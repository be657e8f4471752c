"""Queries that read the blocks of a model, and how what they read gets to the classifier.

`forward_features` gives the backbone's own tokens, with what the queries read packed into rows among them;
`forward_head` takes these rows apart again. So everything that calls the two one after the other works, and nothing is
kept in modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.units import QueryUnit

__all__ = ["joined", "packed", "taken_apart"]


def packed(reads: Sequence[Tensor], unit: QueryUnit, width: int) -> Tensor:
    """Pack what queries read, which may be of several widths, into rows of one width.

    Args:
        reads: (B, Q, width of the block) of each block that is read.
        unit: The queries.
        width: Width of the rows.

    Returns:
        (B, rows, width).
    """
    flat = torch.cat([read.flatten(1) for read in reads], dim=1)
    rows = unit.rows(width)
    return F.pad(flat, (0, rows * width - flat.shape[1])).unflatten(1, (rows, width))


def joined(tokens: Tensor, reads: Sequence[Tensor], unit: QueryUnit | None, first: int) -> Tensor:
    """Put what queries read among the tokens; only the reads of a whole model reach a classifier.

    Args:
        tokens: (B, N, D).
        reads: What they read.
        unit: The queries; None for none.
        first: Number of tokens in front.

    Returns:
        (B, N + rows, D).
    """
    if unit is None or len(reads) < len(unit.blocks):
        return tokens
    rows = packed(reads, unit, tokens.shape[-1])
    return torch.cat([tokens[:, :first], rows, tokens[:, first:]], dim=1)


def taken_apart(tokens: Tensor, unit: QueryUnit, first: int) -> tuple[Tensor, list[Tensor]]:
    """Undo `joined`.

    Args:
        tokens: (B, N + rows, D).
        unit: The queries.
        first: Number of tokens in front.

    Returns:
        The tokens (B, N, D), and what the queries read of each block.
    """
    count = unit.rows(tokens.shape[-1])
    flat = tokens[:, first : first + count].flatten(1)
    sizes = [unit.length * width for width in unit.widths]
    parts = flat[:, : sum(sizes)].split(sizes, dim=1)
    reads = [part.unflatten(1, (unit.length, width)) for part, width in zip(parts, unit.widths, strict=True)]
    return torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1), reads
