"""Lists of whole numbers in whole bits, encoded and decoded in blocks, so that memory follows the size of the file.

Two forms: numbers of some bits each, and Rice's code (1979), in which small numbers take few bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from vispeft.errors import FileError

__all__ = ["BLOCK", "pack_numbers", "rice_blocks", "rice_bytes", "unpack_numbers"]

BLOCK = 1 << 14
"""Numbers, or bytes, that are handled at once: their bits take eight times, and places of bits 64 times the memory."""
_ONES = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1).sum(1, dtype=numpy.uint8)
"""The number of ones of each byte."""


def pack_numbers(numbers: Any, bits: int) -> Any:
    """Pack the lowest bits of numbers, the highest of these first.

    Args:
        numbers: Not negative, int64 (count,).
        bits: Bits of each, 0 to 63.

    Returns:
        uint8 (ceil(count * bits / 8),), padded with zeros.
    """
    blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers) if bits else 0, BLOCK)]
    shifts = numpy.arange(bits)[::-1]
    packed = [numpy.packbits(((block[:, None] >> shifts) & 1).astype(numpy.uint8)) for block in blocks]
    return numpy.concatenate([numpy.empty(0, numpy.uint8), *packed])  # a full block ends with a byte


def unpack_numbers(content: Any, bits: int, start: int, stop: int) -> Any:
    """Unpack some of the numbers of `pack_numbers`.

    Args:
        content: The bytes of all, uint8.
        bits: Bits of each.
        start: First number, a multiple of 8.
        stop: End of the numbers, exclusive.

    Returns:
        int64 (stop - start,).
    """
    numbers = numpy.zeros(stop - start, numpy.int64)
    if bits:
        powers = 1 << numpy.arange(bits, dtype=numpy.int64)[::-1]
        some = numpy.unpackbits(content[start * bits // 8 : -(-stop * bits // 8)], count=(stop - start) * bits)
        numbers += some.reshape(-1, bits) @ powers
    return numbers


def rice_bytes(numbers: Any) -> list[Any]:
    """Encode numbers of which most are small.

    A number is split into its b lowest bits and the rest. Bytes: b, then the lowest bits of all numbers, then the
    rests, each as that many ones and a zero; bits fill bytes from the highest bit on, each of the two lists padded with
    zeros. b is the number that takes the fewest bits.

    Args:
        numbers: Not negative, below 2^62, int64 (count,).

    Returns:
        Parts, each uint8, to be joined.
    """
    low = min(range(32), key=lambda bits: len(numbers) * bits + int((numbers >> bits).sum()))
    rests = numbers >> low
    unary = numpy.ones(int(rests.sum()) + len(rests), numpy.uint8)
    unary[numpy.cumsum(rests + 1) - 1] = 0
    return [numpy.array([low], numpy.uint8), pack_numbers(numbers, low), numpy.packbits(unary)]


def rice_blocks(content: Any, count: int, what: str) -> Iterator[tuple[int, Any]]:
    """Decode the result of `rice_bytes`, block by block.

    Args:
        content: The bytes, uint8.
        count: Number of numbers.
        what: What they are, for messages.

    Yields:
        Index of the first number of a block, and the block, int64.

    Raises:
        FileError: If the bytes are not those of so many numbers.
    """
    low = int(content[0]) if len(content) else 32
    split = 1 + -(-count * low // 8)
    if low > 31 or split > len(content):
        raise FileError(f"{len(content)} bytes are no {count} {what} in whole bits: they are cut off.")
    ends = _zeros(content[split:], count)
    # What follows the last end is padding, of less than a byte.
    last = int(ends[count - 1]) + 1 if 0 < count <= len(ends) else 0
    if len(ends) < count or len(content) - split != -(-last // 8):
        raise FileError(f"{len(content)} bytes are no {count} {what} in whole bits: their ends do not fit.")
    for start in range(0, count, BLOCK):
        some = ends[start : min(start + BLOCK, count)].astype(numpy.int64)
        rests = numpy.diff(some, prepend=int(ends[start - 1]) if start else -1) - 1
        yield start, (rests << low) + unpack_numbers(content[1:split], low, start, start + len(some))


def _zeros(content: Any, count: int) -> Any:
    """Find the zeros among the bits of bytes, (zeros,); empty if not `count` and fewer than 8 more are there."""
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    zeros = 8 * len(content) - sum(int(_ONES[block].sum(dtype=numpy.int64)) for block in blocks)
    kind = numpy.int32 if 8 * len(content) < 2**31 else numpy.int64
    if not count <= zeros < count + 8:
        return numpy.empty(0, kind)
    found = numpy.empty(zeros, kind)
    filled = 0
    for index, block in enumerate(blocks):
        places = numpy.flatnonzero(numpy.unpackbits(block) == 0)
        found[filled : filled + len(places)] = places + 8 * BLOCK * index
        filled += len(places)
    return found
