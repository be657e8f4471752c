"""Stochastic depth: off in a frozen base, on while an adapter trains whose method sets a rate."""

from __future__ import annotations

import torch
from torch import Tensor

from vispeft.hosts.base import Host

__all__ = ["DropPathHost", "depth_rates"]


class DropPathHost(Host):
    """An adapted drop path: it uses the largest rate of the acting adapters in training mode, else timm's forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero the branch of randomly dropped images and scale up that of the others, (B, ...)."""
        units = [unit for unit in self.acting.depth if unit.training]
        if not units:
            # The rate of a frozen path would be a constant of a compiled block, which no other block has.
            return super().forward(x) if self.training else x  # timm's
        rate = units[0].rate
        for unit in units[1:]:
            rate = torch.maximum(rate, unit.rate)
        kept = (1 - rate.to(x.device)).view(-1, *[1] * (x.ndim - 1))  # one rate, or one for each image
        draws = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32, device=x.device)
        return x * ((draws < kept) / kept).to(x.dtype)


def depth_rates(depth: int, rate: float) -> list[float]:
    """Return the rate of each block, rising linearly with depth as in timm.

    Args:
        depth: Number of blocks.
        rate: Rate of the last block.
    """
    return [rate * index / max(1, depth - 1) for index in range(depth)]
