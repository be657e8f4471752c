"""Gathering of tensors from several processes, with gradients for those that have them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed

__all__ = ["gather", "gather_with_grad"]


def gather(values: Tensor) -> Tensor:
    """Concatenate a tensor of all processes, which may have different numbers of rows; without gradients.

    Args:
        values: (B, ...), with the same further dimensions in every process.

    Returns:
        (sum of B, ...), in the order of the processes; `values` itself in one process.
    """
    return torch.cat(_parts(values.detach())) if _several() else values


def gather_with_grad(values: Tensor) -> Tensor:
    """Do what `gather` does, and give each process the gradient of its own rows.

    The gradient of a row is the sum over all processes, as each of them computes the loss of the whole. Averaged over
    the processes, as data-parallel training does, the gradients of the weights are those of one process with all rows.

    Args:
        values: As for `gather`.
    """
    return cast(Tensor, _Gather.apply(values)) if _several() else values


def _several() -> bool:
    """Whether there is a group of processes."""
    return distributed.is_available() and distributed.is_initialized()


def _parts(values: Tensor) -> list[Tensor]:
    """Collect the tensor of each process, padded in between to the largest number of rows."""
    world = distributed.get_world_size()
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    distributed.all_gather(counts, count)
    most = max(int(number) for number in counts)
    padded = values.new_zeros(most, *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(found, padded)
    return [part[: int(number)] for part, number in zip(found, counts, strict=True)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = _parts(values)
        ctx.start = sum(len(part) for part in parts[: distributed.get_rank()])
        ctx.rows = len(values)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows]
