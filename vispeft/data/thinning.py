"""Thinning: binary shapes become lines of one pixel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["thin"]

NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Rows and columns of x1 to x8: east first, then against the clock."""


def thin(shapes: Tensor) -> Tensor:
    """Thin shapes until nothing changes any more; connected parts stay connected.

    Algorithm of Guo and Hall (Communications of the ACM 32, 1989), in the form of Lam, Lee and Suen (PAMI 14, 1992),
    which MATLAB's ``bwmorph(..., 'thin')`` and scikit-image's ``morphology.thin`` compute too. Pixels beyond the border
    count as empty.

    Args:
        shapes: Booleans (B, h, w).

    Returns:
        Booleans (B, h, w), a subset of the shapes.
    """
    padded = F.pad(shapes.to(torch.uint8), (1, 1, 1, 1))
    pixels = padded.flatten()
    steps = torch.tensor([row * padded.shape[-1] + column for row, column in NEIGHBOURS], device=shapes.device)
    bits = torch.arange(8, device=shapes.device)
    tables = [table.to(shapes.device) for table in _deletable()]
    exposed = F.max_pool2d((padded == 0).float(), 3, stride=1, padding=1).bool() & padded.bool()
    # Both tables look at a pixel on the rim, and again after a change around it: the cost is that of what is deleted.
    before = around = exposed.flatten().nonzero().squeeze(1)
    while len(before) or len(around):
        places = torch.cat([before, around]).unique()
        codes = (pixels[places[:, None] + steps].long() << bits).sum(1)
        deleted = places[tables[0][codes]]
        pixels[deleted] = 0
        touched = (deleted[:, None] + steps).flatten()
        before, around = around, touched[pixels[touched].bool()]
        before = before[pixels[before].bool()]
        tables.reverse()
    return pixels.reshape(padded.shape)[:, 1:-1, 1:-1].bool()


@lru_cache(maxsize=1)
def _deletable() -> tuple[Tensor, Tensor]:
    """Tell for each of the 256 surroundings whether the first and the second half of a pass delete the pixel."""
    bits = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool()
    x = dict(enumerate([*bits.unbind(1), bits[:, 0]], start=1))  # x1 to x8 of the paper, and x1 again
    crossings = sum((~x[i] & (x[i + 1] | x[i + 2])).int() for i in (1, 3, 5, 7))
    pairs = [sum((x[i] | x[i + 1]).int() for i in range(first, first + 7, 2)) for first in (1, 2)]
    fewest = torch.minimum(*pairs)
    both = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    return both & ~((x[2] | x[3] | ~x[8]) & x[1]), both & ~((x[6] | x[7] | ~x[4]) & x[5])
