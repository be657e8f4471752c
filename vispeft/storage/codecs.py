"""Codecs: conversions between the values of a tensor and the bytes in a file.

A method chooses a codec for each tensor (`Unit.codecs`), and ``adapter.json`` names it with the tensor's shape and
dtype. Names are part of the file format and never change their meaning. Codecs of this package:

* ``raw``: the tensor unencoded;
* ``l1-normal-500/<bits>``: a matrix of 1, 2, 4 or 8 bits per weight (`vispeft.storage.quantize`);
* ``mask``: one bit per entry (`Mask`);
* ``positions``: increasing whole numbers, as gaps (`Positions`);
* ``rice``: the same in whole bits, less than a byte per number from a density of 1.1 % on (`Rice`);
* ``sparse``: the nonzero entries, as positions and values (`Sparse`).

Another package adds its own by `register_codec`. Multi-byte numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor

from vispeft.errors import ConfigError, FileError, UnknownNameError

__all__ = [
    "RAW",
    "Codec",
    "Mask",
    "Positions",
    "Rice",
    "Sparse",
    "decode_tensors",
    "find_codec",
    "known_codecs",
    "pack_bits",
    "register_codec",
    "unpack_bits",
]

RAW = "raw"
"""Codec of tensors saved unencoded."""


class Codec:
    """Encoder and decoder of tensors. Subclass it and pass an instance to `register_codec`."""

    name: str
    """Name in files."""

    def encode(self, values: Tensor) -> Tensor:
        """Encode a tensor.

        Args:
            values: The tensor, of any shape and on any device.

        Returns:
            Its bytes, uint8 (bytes,), on the CPU.

        Raises:
            ConfigError: If the codec cannot hold these values.
        """
        raise NotImplementedError

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Decode the result of `encode`.

        Args:
            stored: The bytes, uint8 (bytes,).
            shape: Shape of the tensor.
            dtype: Dtype of the tensor.

        Returns:
            The tensor, on the CPU.

        Raises:
            FileError: If the bytes do not fit the shape.
        """
        raise NotImplementedError

    def size(self, values: Tensor) -> int:
        """Return the size of a tensor in a file, in bytes.

        Args:
            values: The tensor.
        """
        return self.encode(values).nbytes


class Raw(Codec):
    """A tensor, unencoded."""

    name = RAW

    def encode(self, values: Tensor) -> Tensor:
        """Return the tensor itself; safetensors stores shape and dtype."""
        return values

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor itself."""
        return stored

    def size(self, values: Tensor) -> int:
        """Return the size of the tensor in bytes."""
        return values.nbytes


class Mask(Codec):
    """One bit per entry, row by row, the first entry in the highest bit of the first byte, as `numpy.packbits` does.

    This is the layout of published masks (R-AMT). The last byte is padded with zeros.
    """

    name = "mask"

    def encode(self, values: Tensor) -> Tensor:
        """Pack boolean or 0/1 entries into ceil(entries / 8) bytes."""
        flags = values.detach().cpu().reshape(-1)
        if not bool(((flags == 0) | (flags == 1)).all()):
            raise ConfigError("A mask holds true and false, or 1 and 0; other values were given. Threshold them first.")
        return torch.from_numpy(numpy.packbits(flags.bool().numpy()))

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Unpack the entries, as 1 and 0 if the dtype is not bool."""
        _check_size(self.name, stored, -(-prod(shape) // 8), shape)
        flags = numpy.unpackbits(stored.cpu().numpy(), count=prod(shape))
        return torch.from_numpy(flags).to(dtype).reshape(shape)

    def size(self, values: Tensor) -> int:
        """Return the size of the mask in bytes."""
        return -(-values.numel() // 8)


class Positions(Codec):
    """Strictly increasing whole numbers from 0, as gaps.

    A number is stored as its difference from the previous one, minus one (the first: unchanged). Gaps are coded in
    units of 1, 2 or 4 bytes, whichever takes the fewest bytes: a unit of all ones means "add this value and continue",
    any other unit ends the gap. The first byte is the unit's size in bytes. A random 1 % of the weights takes 1.1 bytes
    per position.
    """

    name = "positions"

    def encode(self, values: Tensor) -> Tensor:
        """Encode the numbers, int32 or int64 (count,)."""
        flat = values.detach().cpu().reshape(-1).to(torch.int64)
        rising = bool((flat.diff(prepend=flat.new_tensor([-1])) > 0).all())
        if values.is_floating_point() or not rising:
            raise ConfigError("Positions are whole numbers from 0 in rising order, each at most once. Sort them first.")
        return _gaps(flat)

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Sum up the gaps."""
        found = _from_gaps(stored)
        if found.numel() != prod(shape):
            raise FileError(f"{prod(shape)} positions were expected; the file has {found.numel()}.")
        return found.to(dtype).reshape(shape)


class Rice(Codec):
    """Strictly increasing whole numbers from 0, as gaps in whole bits (Rice, 1979).

    A gap (see `Positions`) is split into its b lowest bits and the rest. Bytes: b, then the lowest bits of all gaps,
    then the rests, each as that many ones and a zero; bits fill bytes from the highest bit on, each of the two lists
    padded with zeros. b is the number that takes the fewest bits. Of random numbers this comes within 0.05 bits of the
    entropy: 8.1 bits per number at a density of 1 %, 7.1 at 2 %, 4.7 at 10 %.
    """

    name = "rice"

    def encode(self, values: Tensor) -> Tensor:
        """Encode the numbers, int32 or int64 (count,)."""
        flat = values.detach().cpu().reshape(-1).to(torch.int64)
        gaps = flat.diff(prepend=flat.new_tensor([-1])).sub(1)
        if values.is_floating_point() or bool((gaps < 0).any()):
            raise ConfigError("Positions are whole numbers from 0 in rising order, each at most once. Sort them first.")
        low = min(range(32), key=lambda bits: len(gaps) * bits + int((gaps >> bits).sum()))
        lowest = (gaps[:, None].numpy() >> numpy.arange(low)[::-1]) & 1
        rests = (gaps >> low).numpy()
        unary = numpy.ones(int(rests.sum()) + len(rests), numpy.uint8)
        unary[numpy.cumsum(rests + 1) - 1] = 0
        parts = [numpy.array([low], numpy.uint8), numpy.packbits(lowest.astype(numpy.uint8)), numpy.packbits(unary)]
        return torch.from_numpy(numpy.concatenate(parts))

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Sum up the gaps."""
        count, content = prod(shape), stored.cpu().numpy()
        low = int(content[0]) if len(content) else 32
        split = 1 + -(-count * low // 8)
        if low > 31 or split > len(content):
            raise FileError(f"{len(content)} bytes are no {count} positions in whole bits: they are cut off.")
        ends = _zeros(content[split:], count)
        # What follows the last end is padding, of less than a byte.
        last = int(ends[count - 1]) + 1 if 0 < count <= len(ends) else 0
        if len(ends) < count or len(content) - split != -(-last // 8):
            raise FileError(f"{len(content)} bytes are no {count} positions in whole bits: their ends do not fit.")
        rests = numpy.diff(ends[:count], prepend=-1) - 1
        gaps = (rests << low) + _numbers(content[1:split], low, count)
        return torch.from_numpy(numpy.cumsum(gaps + 1) - 1).to(dtype).reshape(shape)


_BLOCK = 1 << 14
"""Bytes that are unpacked at once: their bits take eight times, and places of bits 64 times the memory."""
_ONES = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1).sum(1, dtype=numpy.uint8)
"""The number of ones of each byte."""


def _zeros(content: Any, count: int) -> Any:
    """Find the zeros among the bits of bytes, int64 (zeros,); empty if not `count` and fewer than 8 more are there."""
    blocks = [content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)]
    zeros = 8 * len(content) - sum(int(_ONES[block].sum(dtype=numpy.int64)) for block in blocks)
    if not count <= zeros < count + 8:
        return numpy.empty(0, numpy.int64)
    found = [numpy.flatnonzero(numpy.unpackbits(block) == 0) + 8 * _BLOCK * i for i, block in enumerate(blocks)]
    return numpy.concatenate([numpy.empty(0, numpy.int64), *found])


def _numbers(content: Any, bits: int, count: int) -> Any:
    """Unpack `count` numbers of some bits each, the highest bit first, int64 (count,)."""
    numbers, powers = numpy.zeros(count, numpy.int64), 1 << numpy.arange(bits, dtype=numpy.int64)[::-1]
    for start in range(0, count if bits else 0, _BLOCK):  # eight numbers end with a byte, and so does a block of them
        size = min(_BLOCK, count - start)
        some = numpy.unpackbits(content[start * bits // 8 : (start + _BLOCK) * bits // 8], count=size * bits)
        numbers[start : start + size] = some.reshape(size, bits) @ powers
    return numbers


class Sparse(Codec):
    """The nonzero entries of a tensor: their number, their values, and their positions in row-major order.

    Bytes: the number of entries as uint64, their values in the tensor's dtype, then the positions as coded by
    `Positions`. Values are restored bit for bit; a negative zero counts as nonzero.
    """

    name = "sparse"

    def encode(self, values: Tensor) -> Tensor:
        """Encode a tensor whose entries are mostly zero."""
        flat = values.detach().cpu().contiguous().reshape(-1)
        found = flat.view(torch.uint8).view(flat.numel(), flat.element_size()).ne(0).any(dim=1).nonzero().reshape(-1)
        count = torch.from_numpy(numpy.array([len(found)], dtype="<u8").view(numpy.uint8))
        return torch.cat([count, flat[found].view(torch.uint8), _gaps(found)])

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Restore the entries among zeros."""
        flat = torch.zeros(prod(shape), dtype=dtype)
        head, rest = stored[:8].cpu(), stored[8:].cpu()
        count = int(head.numpy().view("<u8")[0]) if len(head) == 8 else -1
        width = count * flat.element_size()
        positions = _from_gaps(rest[width:]) if 0 <= width <= len(rest) else None
        if positions is None or len(positions) != count or (count and int(positions[-1]) >= flat.numel()):
            raise FileError(f"{len(stored)} bytes are no sparse tensor of shape {shape}: its positions do not fit.")
        flat[positions] = rest[:width].clone().view(dtype)
        return flat.reshape(shape)


_WIDTHS = (1, 2, 4)
"""Possible sizes of a unit of a gap, in bytes."""


def _gaps(positions: Tensor) -> Tensor:
    """Encode increasing positions, int64 (count,), as described in `Positions`."""
    gaps = positions.diff(prepend=positions.new_tensor([-1])).sub(1).numpy()
    full, width = min(((2 ** (8 * w) - 1, w) for w in _WIDTHS), key=lambda u: int((gaps // u[0] + 1).sum()) * u[1])
    ends = numpy.cumsum(gaps // full + 1) - 1
    units = numpy.full(int(ends[-1]) + 1 if len(ends) else 0, full, f"<u{width}")
    units[ends] = gaps % full
    return torch.from_numpy(numpy.concatenate([numpy.array([width], numpy.uint8), units.view(numpy.uint8)]))


def _from_gaps(stored: Tensor) -> Tensor:
    """Decode the result of `_gaps` to int64 (count,)."""
    content = stored.cpu().numpy()
    width = int(content[0]) if len(content) else 0
    if width not in _WIDTHS or (len(content) - 1) % width:
        raise FileError(f"{len(content)} bytes are no coded positions in whole units of 1, 2 or 4 bytes.")
    units = content[1:].copy().view(f"<u{width}")
    ends = units != numpy.iinfo(units.dtype).max
    if len(ends) and not ends[-1]:
        raise FileError("Coded positions are cut off: the last gap has no end.")
    steps = units.astype(numpy.int64) + ends  # a gap is the difference minus one
    return torch.from_numpy(numpy.cumsum(steps)[ends] - 1)


def _check_size(name: str, stored: Tensor, needed: int, shape: tuple[int, ...]) -> None:
    if stored.numel() != needed:
        raise FileError(f"A {name} of shape {shape} takes {needed} bytes; the file has {stored.numel()}.")


# ------------------------------------------------------------------ the registry

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Mask(), Positions(), Rice(), Sparse())}


def register_codec(codec: Codec) -> None:
    """Add a codec, under its `name`.

    Args:
        codec: The codec. Register it where its method is defined, so that loading a file finds both.

    Raises:
        ConfigError: If a codec of another class has the name already.
    """
    known = _CODECS.get(codec.name)
    places = [f"{type(entry).__module__}.{type(entry).__qualname__}" for entry in (known, codec)]
    if known is not None and places[0] != places[1]:
        raise ConfigError(f"Two codecs want the name {codec.name!r}: {' and '.join(places)}.")
    _CODECS[codec.name] = codec


def known_codecs() -> list[str]:
    """List the names of all codecs."""
    return sorted(_CODECS)


def find_codec(name: str) -> Codec:
    """Look up a codec.

    Args:
        name: Its name in files.

    Raises:
        UnknownNameError: If there is none.
    """
    if name not in _CODECS:
        raise UnknownNameError("codec", name, _CODECS, "Codecs of other packages: see register_codec.")
    return _CODECS[name]


def decode_tensors(tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Decode the tensors of a file.

    Args:
        tensors: Tensors as the file has them, by name.
        entries: Codec, dtype and shape of each, as listed in ``adapter.json``; tensors without an entry are raw.

    Returns:
        Their values, by the same names.

    Raises:
        FileError: If the bytes of a tensor do not fit its entry.
    """
    return {key: _decoded(tensor, entries.get(key, {"codec": RAW})) for key, tensor in tensors.items()}


def _decoded(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    codec = find_codec(entry["codec"])
    if codec.name == RAW:
        return tensor
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise FileError(f"A tensor of type {entry['dtype']!r} was found; PyTorch has no such type.")
    return codec.decode(tensor, tuple(entry["shape"]), dtype)


# ------------------------------------------------------------------ packing small numbers


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack small numbers into bytes, the first one in the lowest bits.

    The order is that of the published 1-bit adapter files (PETL-ViT, ``binary_adapter``): row-major, least significant
    bits first. The last byte is padded with zeros, whereas those files drop an incomplete one.

    Args:
        codes: Any shape; integers from 0 to ``2**bits - 1``.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8, (ceil(numel * bits / 8),).

    Raises:
        ConfigError: If `bits` is not one of these or a code does not fit.
    """
    _check_bits(bits)
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ConfigError(f"Codes from {int(flat.min())} to {int(flat.max())} do not fit into {bits} bits.")
    per_byte = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte))
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (flat.view(-1, per_byte) << shifts).sum(dim=1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8, (bytes,).
        bits: 1, 2, 4 or 8.
        shape: Shape of the codes.

    Returns:
        int64 codes of that shape.

    Raises:
        FileError: If the number of bytes does not fit the shape.
    """
    _check_bits(bits)
    count = prod(shape)
    if packed.numel() != -(-count * bits // 8):
        raise FileError(
            f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes; the file has {packed.numel()}."
        )
    shifts = torch.arange(0, 8, bits, device=packed.device)
    codes = (packed.to(torch.int64).unsqueeze(1) >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:count].reshape(shape)


def _check_bits(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ConfigError(f"Codes of {bits} bits were asked for; 1, 2, 4 and 8 can be packed.")
