"""Thinning: binary shapes become lines of one pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["thin"]

NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Rows and columns of x1 to x8: east first, then against the clock."""
PER_NUMBER = 31
"""Shapes in the bits of one int32."""


def thin(shapes: Tensor) -> Tensor:
    """Thin shapes until nothing changes any more; connected parts stay connected.

    Algorithm of Guo and Hall (Communications of the ACM 32, 1989), in the form of Lam, Lee and Suen (PAMI 14, 1992),
    which MATLAB's ``bwmorph(..., 'thin')`` and scikit-image's ``morphology.thin`` compute too. Pixels beyond the border
    count as empty. Up to `PER_NUMBER` shapes are thinned at the cost of one, as the bits of one number per pixel.

    Args:
        shapes: Booleans (B, h, w).

    Returns:
        Booleans (B, h, w), a subset of the shapes.
    """
    return torch.cat([_thin(some) for some in shapes.split(PER_NUMBER)]) if shapes.numel() else shapes.clone()


def _thin(shapes: Tensor) -> Tensor:
    """Thin at most `PER_NUMBER` shapes."""
    packed = F.pad(reduce(or_, (shape.int() << bit for bit, shape in enumerate(shapes))), (1, 1, 1, 1))
    inside = packed[1:-1, 1:-1]
    changed = True
    while changed:
        changed = False
        for half in (0, 1):
            deleted = inside & _deletable(packed, half)
            inside ^= deleted
            changed |= bool(deleted.any())
    return torch.stack([(inside >> bit) & 1 for bit in range(len(shapes))]).bool()


def _deletable(packed: Tensor, half: int) -> Tensor:
    """Find the pixels that half of a pass deletes, by the conditions of Guo and Hall, algorithm A1.

    Args:
        packed: Shapes as bits (h + 2, w + 2), with an empty rim.
        half: 0 or 1; the second half has the conditions of the first, turned by half a circle.

    Returns:
        Bits (h, w); those of empty pixels have no meaning.
    """
    height, width = (size - 2 for size in packed.shape)
    x1, x2, x3, x4, x5, x6, x7, x8 = (
        packed[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        for row, column in (NEIGHBOURS[4 * half :] + NEIGHBOURS[: 4 * half])
    )
    first = (x1 | x2, x3 | x4, x5 | x6, x7 | x8)
    second = (x2 | x3, x4 | x5, x6 | x7, x8 | x1)
    a, b, c, d = (~x & pair for x, pair in zip((x1, x3, x5, x7), second, strict=True))
    one_crossing = ((a ^ b) & ~(c | d)) | ((c ^ d) & ~(a | b))
    (two_first, four_first), (two_second, four_second) = _at_least_two(first), _at_least_two(second)
    two_or_three = two_first & two_second & ~(four_first & four_second)
    kept = x1 & (x2 | x3 | ~x8)
    return one_crossing & two_or_three & ~kept


def _at_least_two(pairs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Find where at least two of four bits are set, and where all are."""
    a, b, c, d = pairs
    both, others = a & b, c & d
    return both | others | ((a | b) & (c | d)), both & others
