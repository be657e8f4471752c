"""Codecs: conversions between the values of a tensor and the bytes in a file.

A method chooses a codec for each tensor (`Unit.codecs`), and ``adapter.json`` names it with the tensor's shape and
dtype. Names are part of the file format and never change their meaning. Codecs of this package:

* ``raw``: the tensor unencoded;
* ``l1-normal-500/<bits>``: a matrix of 1, 2, 4 or 8 bits per weight (`vispeft.storage.quantize`);
* ``mask``: one bit per entry (`Mask`);
* ``positions``: increasing whole numbers, as gaps (`Positions`);
* ``rice``: the same in whole bits, 1.02 bytes per number at a density of 1 % (`Rice`);
* ``floats``: floating-point numbers, whose exponents take fewer bits (`Floats`);
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
from vispeft.storage.whole_bits import BLOCK, pack_numbers, rice_blocks, rice_bytes, unpack_numbers

__all__ = [
    "RAW",
    "Codec",
    "Floats",
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
        return _fitting(_from_gaps(stored, prod(shape)), dtype).reshape(shape)


class Rice(Codec):
    """Strictly increasing whole numbers from 0, as gaps in whole bits (Rice, 1979).

    Bytes: the gaps (see `Positions`) as coded by `rice_bytes`. Of random numbers this comes within 0.05 bits of the
    entropy: 8.1 bits per number at a density of 1 %, 7.1 at 2 %, 4.7 at 10 %.
    """

    name = "rice"

    def encode(self, values: Tensor) -> Tensor:
        """Encode the numbers, int32 or int64 (count,)."""
        flat = values.detach().cpu().reshape(-1).to(torch.int64)
        gaps = flat.diff(prepend=flat.new_tensor([-1])).sub(1)
        if values.is_floating_point() or bool((gaps < 0).any()):
            raise ConfigError("Positions are whole numbers from 0 in rising order, each at most once. Sort them first.")
        return torch.from_numpy(numpy.concatenate(rice_bytes(gaps.numpy())))

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Sum up the gaps."""
        count, content = prod(shape), stored.cpu().numpy()
        if count > 8 * len(content):  # each takes a bit at least
            raise FileError(f"{len(content)} bytes are no {count} positions in whole bits: they are cut off.")
        found, last = numpy.empty(count, numpy.int64), -1
        for start, gaps in rice_blocks(content, count, "positions"):
            some = found[start : start + len(gaps)]
            numpy.cumsum(gaps + 1, out=some)
            some += last
            last = int(some[-1])
        return _fitting(torch.from_numpy(found), dtype).reshape(shape)


class Floats(Codec):
    """Floating-point numbers bit for bit, with exponents in as few bits as their frequencies allow.

    Values of one kind, such as the changes of a layer's weights, have few different exponents: of normal ones an
    exponent takes 2.5 bits in place of 8. Bytes: the number of different exponents as uint16, these exponents by
    falling frequency (a byte each, two for float64), signs and mantissas of all values (sign first, highest bit first,
    padded with zeros), then the places of their exponents in that list as coded by `rice_bytes`.
    """

    name = "floats"

    def encode(self, values: Tensor) -> Tensor:
        """Encode values of any floating-point type."""
        if values.dtype not in _LAYOUTS:
            raise ConfigError(f"Values of type {values.dtype} were given; the codec is for {', '.join(_FLOATS)}.")
        kind, exponent, mantissa = _LAYOUTS[values.dtype]
        bits = values.detach().cpu().contiguous().reshape(-1).view(kind).numpy().astype(numpy.int64)
        exponents = (bits >> mantissa) & (2**exponent - 1)
        counts = numpy.bincount(exponents)
        table = numpy.argsort(-counts, kind="stable")[: numpy.count_nonzero(counts)]
        places = numpy.zeros(2**exponent, numpy.int64)
        places[table] = numpy.arange(len(table))
        rest = (bits & (2**mantissa - 1)) | ((bits >> (exponent + mantissa) & 1) << mantissa)
        head = numpy.array([len(table)], "<u2").view(numpy.uint8), table.astype(_width(exponent)).view(numpy.uint8)
        return torch.from_numpy(
            numpy.concatenate([*head, pack_numbers(rest, 1 + mantissa), *rice_bytes(places[exponents])])
        )

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Put signs, exponents and mantissas together."""
        if dtype not in _LAYOUTS:
            raise FileError(
                f"Values of type {dtype} were found in the codec {self.name}, which has {', '.join(_FLOATS)}."
            )
        (kind, exponent, mantissa), count, content = _LAYOUTS[dtype], prod(shape), stored.cpu().numpy()
        width = numpy.dtype(_width(exponent))
        first = 2 + width.itemsize * (int(content[:2].copy().view("<u2")[0]) if len(content) > 1 else 0)
        split = first + -(-count * (1 + mantissa) // 8)
        table = content[2:first].copy().view(width).astype(numpy.int64) if split <= len(content) else None
        if table is None or (table >= 2**exponent).any():
            raise FileError(f"{len(content)} bytes are no {count} values of type {dtype}: they are cut off.")
        found = torch.empty(count, dtype=kind)
        for start, places in rice_blocks(content[split:], count, "exponents"):
            if (places >= len(table)).any():
                raise FileError(f"An exponent is number {int(places.max())} of a list of {len(table)}.")
            rest = unpack_numbers(content[first:split], 1 + mantissa, start, start + len(places))
            bits = (rest & (2**mantissa - 1)) | (table[places] << mantissa)
            bits |= -(rest >> mantissa) << (exponent + mantissa)  # the sign, extended to all higher bits
            found[start : start + len(places)] = torch.from_numpy(bits)
        return found.view(dtype).reshape(shape)


_LAYOUTS = {
    torch.float16: (torch.int16, 5, 10),
    torch.bfloat16: (torch.int16, 8, 7),
    torch.float32: (torch.int32, 8, 23),
    torch.float64: (torch.int64, 11, 52),
}
"""Whole numbers of the same size, and bits of exponent and mantissa, by dtype (IEEE 754)."""
_FLOATS = tuple(str(dtype) for dtype in _LAYOUTS)


def _width(exponent: int) -> str:
    """Return numpy's dtype of an exponent in a list."""
    return "<u1" if exponent <= 8 else "<u2"


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
        size, item = prod(shape), torch.empty(0, dtype=dtype).element_size()
        head, rest = stored[:8].cpu(), stored[8:].cpu()
        count = int(head.numpy().view("<u8")[0]) if len(head) == 8 else -1
        width = count * item
        positions = _from_gaps(rest[width:], count) if 0 <= width <= len(rest) else None
        if positions is None or (count and int(positions[-1]) >= size):
            raise FileError(f"{len(stored)} bytes are no sparse tensor of shape {shape}: its positions do not fit.")
        flat = torch.zeros(size, dtype=dtype)
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


def _from_gaps(stored: Tensor, count: int) -> Tensor:
    """Decode the result of `_gaps` to int64 (count,); the units are summed up block by block."""
    content = stored.cpu().numpy()
    width = int(content[0]) if len(content) else 0
    if width not in _WIDTHS or (len(content) - 1) % width:
        raise FileError(f"{len(content)} bytes are no coded positions in whole units of 1, 2 or 4 bytes.")
    units = content[1:].copy().view(f"<u{width}")
    ends = units != numpy.iinfo(units.dtype).max
    if len(ends) and not ends[-1]:
        raise FileError("Coded positions are cut off: the last gap has no end.")
    if (found := int(numpy.count_nonzero(ends))) != count:
        raise FileError(f"{count} positions were expected; the file has {found}.")
    positions, filled, last = numpy.empty(count, numpy.int64), 0, -1
    for start in range(0, len(units), BLOCK):
        some = ends[start : start + BLOCK]
        sums = last + numpy.cumsum(units[start : start + BLOCK].astype(numpy.int64) + some)
        last = int(sums[-1])  # a gap is the difference minus one
        reached = sums[some]
        positions[filled : filled + len(reached)] = reached
        filled += len(reached)
    return torch.from_numpy(positions)


def _fitting(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rising positions in the dtype of a tensor; one that it cannot hold would become another."""
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise FileError(f"Positions are whole numbers; the file has them as {dtype}.")
    if len(positions) and not 0 <= int(positions[-1]) <= torch.iinfo(dtype).max:
        raise FileError(f"A position is {int(positions[-1])}, which {dtype} cannot hold.")
    return positions.to(dtype)


def _check_size(name: str, stored: Tensor, needed: int, shape: tuple[int, ...]) -> None:
    if stored.numel() != needed:
        raise FileError(f"A {name} of shape {shape} takes {needed} bytes; the file has {stored.numel()}.")


# ------------------------------------------------------------------ the registry

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Mask(), Positions(), Rice(), Floats(), Sparse())}


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
