"""Dropout masks that the backward pass draws again from a seed, in place of keeping a byte per entry."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random import SFC64, SeedSequence
from torch import Generator, Tensor, nn

from vispeft.core.low_rank import dropped_draws

__all__ = ["mask_blocks", "mask_source", "masked"]

BLOCK = 3 * 2**18
"""Entries of a mask that a CPU draws at once: those of 3 MB in float32, which stay in its cache."""

BYTE = 2**8
"""Values of a byte."""


def mask_source(rows: Tensor, columns: int, share: float) -> Tensor:
    """Draw what a dropout mask is made from: a seed on the host, at which nothing waits for the device.

    It is drawn by PyTorch's default generator of the device, which moves on, so that a seed, a resumed run and
    activation checkpointing repeat the mask. On CUDA it is computed from the seed and the offset of that generator,
    which PyTorch holds on the host: `torch.cuda.manual_seed` decides what is dropped. On other devices, in graphs that
    CUDA captures and for special tensors it is the mask itself.

    Args:
        rows: A matrix of as many rows as the mask, and of its device.
        columns: Columns of the mask.
        share: Share of entries to drop, above 0.

    Returns:
        The source, for `mask_blocks`: int64 (), or booleans (rows, columns).
    """
    if type(rows) is Tensor or type(rows) is nn.Parameter:
        if rows.device.type == "cpu":
            return torch.empty((), dtype=torch.int64).random_()
        if rows.is_cuda and not torch.cuda.is_current_stream_capturing():
            return _seed_of(torch.cuda.default_generators[rows.device.index])
    return _mask(_words(rows, columns, None), rows, columns, share).bool()


def _seed_of(generator: Generator) -> Tensor:
    """Compute a seed from the state of a generator of CUDA, and move it on by the smallest step."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    found = SeedSequence([generator.initial_seed() % 2**64, offset]).generate_state(1, np.uint64)
    return torch.from_numpy(found.view(np.int64)).reshape(())


def mask_blocks(source: Tensor, rows: Tensor, columns: int, share: float) -> Iterator[tuple[slice, Tensor]]:
    """Draw a dropout mask in blocks of rows, the same one at each call.

    Each entry uses 8 random bits of its own and 8 of its row. On a CPU they come from SFC64 (C. Doty-Humphrey,
    PractRand; of NumPy), in half the time of PyTorch's generator; `torch.bernoulli` takes a fifth of a training step of
    a ViT-S with dropout before every linear layer.

    Args:
        source: The result of `mask_source`.
        rows: A matrix of as many rows as the mask, and of its device and dtype.
        columns: Columns of the mask.
        share: Share of entries to drop, as then.

    Yields:
        The rows of a block, and ones and zeros (those rows, columns) in the dtype of `rows`: a CPU multiplies tensors
        of two types 30 times slower. In reduced precision there is one block, so that sums over rows are rounded once.
    """
    everything = slice(0, rows.shape[0])
    if source.dtype == torch.bool:
        yield everything, source.to(rows.dtype)
    elif rows.is_cuda:
        generator = Generator(rows.device).manual_seed(int(source))
        yield everything, _mask(_words(rows, columns, generator), rows, columns, share)
    else:
        bits = SFC64(int(source))
        size = max(8, BLOCK // columns // 8 * 8)  # whole words, so that the size decides nothing
        if rows.dtype not in (torch.float32, torch.float64):
            size = max(size, rows.shape[0])
        for start in range(0, max(1, rows.shape[0]), size):
            part = slice(start, start + size)
            words = bits.random_raw(_count(rows[part], columns)).view(np.int64)
            yield part, _mask(torch.from_numpy(words), rows[part], columns, share)


def masked(rows: Tensor, source: Tensor, share: float) -> Tensor:
    """Apply a dropout mask to a matrix, in place, without scaling up what is kept.

    Args:
        rows: The matrix.
        source: The result of `mask_source`.
        share: Share of entries to drop, as then.
    """
    for part, mask in mask_blocks(source, rows, rows.shape[1], share):
        rows[part].mul_(mask)
    return rows


def _count(rows: Tensor, columns: int) -> int:
    """Count the words of 64 bits that a mask needs, a byte per entry and row.

    At least one, since PyTorch views no array of none from NumPy.
    """
    return max(1, -(-rows.shape[0] * (columns + 1) // 8))


def _words(rows: Tensor, columns: int, generator: Generator | None) -> Tensor:
    words = torch.empty(_count(rows, columns), dtype=torch.int64, device=rows.device)
    return words.random_(-(2**63), None, generator=generator)


def _mask(words: Tensor, rows: Tensor, columns: int, share: float) -> Tensor:
    """Turn random words into a mask, in place.

    An entry whose byte is one certain number is dropped where the byte of its row decides so, so that all shares of two
    bytes are exact. Half as many random bits are drawn as with 16 for each entry.
    """
    shape = rows.shape[0], columns + 1
    draws = words.view(torch.int8)[: math.prod(shape)].view(shape)
    whole, rest = divmod(dropped_draws(share), BYTE)
    entries, also = draws[:, 1:], (draws[:, :1] < rest - BYTE // 2).to(torch.int8)
    # In signed bytes there is no limit above the largest one, nor below the smallest.
    least = whole - BYTE // 2
    kept = entries.ge_(also.add_(least)) if whole < BYTE - 1 else entries.gt_(also.add_(least - 1))
    return kept.to(rows.dtype)
