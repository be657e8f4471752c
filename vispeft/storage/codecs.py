"""How tensors stand in a file: as they are, or as packed codes of a few bits.

A codec is named per tensor in ``adapter.json``. The names are part of the file format and never change their meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vispeft.errors import ConfigError, FileError

__all__ = ["RAW", "pack_bits", "unpack_bits"]

RAW = "raw"
"""The tensor stands in the file as it is."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack small numbers into bytes, the first one in the lowest bits.

    The order is that of the published 1-bit adapter files (PETL-ViT, ``binary_adapter``): row-major, least significant
    bits first. The last byte is padded with zeros, where those files drop an incomplete one.

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
    count = int(torch.tensor(shape).prod()) if shape else 1
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
