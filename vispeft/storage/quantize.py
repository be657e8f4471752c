"""Low-bit matrices: the quantiser of Bi-AdaptFormer and Bi-LoRA (Jie et al., ICCV 2023, arXiv 2307.16867).

In every forward pass a matrix is replaced by levels, coded in 1, 2, 4 or 8 bits, times its standard deviation plus its
mean. The levels minimise the mean absolute error for a normal variable. A file holds codes, mean and standard
deviation; a loaded matrix is used with exactly these values and never quantised a second time, which would shrink it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast, get_args

import numpy
import torch
from torch import Tensor, nn

from vispeft.core.fields import Bits
from vispeft.core.tracing import in_graph
from vispeft.errors import ConfigError, FileError
from vispeft.storage.codecs import Codec, pack_bits, register_codec, unpack_bits

__all__ = [
    "BITS",
    "FewBitsCodec",
    "LowBit",
    "Quantized",
    "codebook",
    "codec",
    "decode",
    "quantize",
    "start_above_zero",
]

BITS: tuple[int, ...] = get_args(Bits)
"""Supported bits per weight; 32 means no quantisation."""
EPSILON = 1e-5
"""Added to the standard deviation before a division, as in the public code."""
ROUNDS = 500
"""Rounds of the iteration that computes the levels; at 8 bits it has not converged by then, so the number is part of
the format."""
_STATISTICS = 8
"""Bytes of mean and standard deviation, stored after the codes."""


def codec(bits: int) -> str:
    """Return the codec name of a low-bit matrix; the number of rounds in it determines the levels."""
    return f"l1-normal-{ROUNDS}/{bits}"


@cache
def codebook(bits: int) -> tuple[Tensor, Tensor]:
    """Compute the levels for a standard normal variable: each level is its cell's median, each threshold a midpoint.

    Both are iterated together, `ROUNDS` times from all-zero levels, in double precision (public code of the paper,
    PETL-ViT ``binary_adapter``).

    Args:
        bits: 1, 2, 4 or 8.

    Returns:
        Levels (2**bits,) in increasing order and the thresholds between them (2**bits - 1,), float32.
    """
    levels = torch.zeros(2**bits, dtype=torch.float64)
    thresholds = levels[:-1]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(ROUNDS):
        thresholds = (levels[:-1] + levels[1:]) / 2
        below = torch.cat([ends[:1], torch.special.ndtr(thresholds), ends[1:]])
        levels = torch.special.ndtri((below[:-1] + below[1:]) / 2)
    return levels.float(), thresholds.float()


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix."""

    codes: Tensor
    """Indices into the levels, int64, in the matrix's shape."""
    mean: Tensor
    """Mean of the matrix, a scalar."""
    std: Tensor
    """Unbiased standard deviation of the matrix, a scalar."""

    def values(self, bits: int) -> Tensor:
        """Dequantise: level times standard deviation plus mean, in this order and without a fused multiply-add."""
        levels = codebook(bits)[0].to(self.mean)
        return levels[self.codes] * self.std + self.mean

    def packed(self, bits: int) -> Tensor:
        """Return the bytes to save: codes, then mean and standard deviation as float32, little-endian.

        Args:
            bits: Bits per code.

        Returns:
            uint8, (ceil(numel * bits / 8) + 8,).
        """
        numbers = numpy.array([float(self.mean), float(self.std)], dtype="<f4")
        tail = torch.from_numpy(numbers.view(numpy.uint8).copy())
        return torch.cat([pack_bits(self.codes, bits).cpu(), tail])


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Quantise a matrix.

    Args:
        weight: The matrix, of any shape with at least two entries.
        bits: 1, 2, 4 or 8.

    Returns:
        Codes, mean and standard deviation.
    """
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    mean, std = weight.mean(), weight.std()
    thresholds = codebook(bits)[1].to(weight)
    return Quantized(torch.bucketize((weight - mean) / (std + EPSILON), thresholds), mean, std)


def decode(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Dequantise the result of `Quantized.packed`.

    Args:
        packed: uint8, (bytes,).
        bits: Bits per code.
        shape: Shape of the matrix.

    Returns:
        The dequantised matrix, float32.

    Raises:
        FileError: If the number of bytes does not fit the shape, or mean or standard deviation is not finite.
    """
    codes = unpack_bits(packed[:-_STATISTICS], bits, shape)
    mean, std = (float(n) for n in packed[-_STATISTICS:].cpu().numpy().view("<f4"))
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise FileError(f"The mean {mean} or the standard deviation {std} of a quantised matrix is not finite.")
    return Quantized(codes, torch.tensor(mean), torch.tensor(std)).values(bits)


class FewBitsCodec(Codec):
    """A matrix of a few bits per weight: codes, mean and standard deviation."""

    def __init__(self, bits: int) -> None:
        """Create the codec for a number of bits.

        Args:
            bits: 1, 2, 4 or 8.
        """
        self.bits, self.name = bits, codec(bits)

    def encode(self, values: Tensor) -> Tensor:
        """Quantise a matrix; uint8 (ceil(numel * bits / 8) + 8,).

        Raises:
            ConfigError: If it has fewer than two entries, which have no standard deviation.
        """
        if values.numel() < 2:
            raise ConfigError(
                f"A tensor of shape {tuple(values.shape)} was to be stored with {self.bits} bits, which needs at least "
                "two entries. Store it as raw."
            )
        return quantize(values, self.bits).packed(self.bits)

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Dequantise to float32, whatever the matrix's dtype was."""
        return decode(stored.cpu(), self.bits, shape)

    def size(self, values: Tensor) -> int:
        """Return the size of codes and statistics in bytes."""
        return -(-values.numel() * self.bits // 8) + _STATISTICS


for _bits in BITS:
    if _bits < 32:
        register_codec(FewBitsCodec(_bits))


@torch.library.custom_op("vispeft::quantized", mutates_args=())
def _quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise and dequantise a matrix, as one opaque node for compilers.

    The values are exactly those of a saved and loaded matrix; a sum such as ``codes + normalised - normalised`` would
    not be. When it traced through the bucketing, `torch.compile` took hours to choose the tensors to save for backward.

    Returns:
        The dequantised matrix, its codes as uint8, its mean and its standard deviation.
    """
    found = quantize(weight, bits)
    return found.values(bits).to(weight.dtype), found.codes.to(torch.uint8), found.mean, found.std


@_quantized.register_fake
def _(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the shapes of `_quantized`."""
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    statistic = weight.new_empty((), dtype=exact)
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format),
        statistic,
        torch.empty_like(statistic),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Save the tensors that the backward pass needs."""
    weight, ctx.bits = inputs
    _, codes, mean, std = output
    ctx.save_for_backward(weight, codes, mean, std)


@torch.library.custom_op("vispeft::quantized_gradient", mutates_args=())
def _gradient(grad: Tensor, weight: Tensor, codes: Tensor, mean: Tensor, std: Tensor, bits: int) -> Tensor:
    """Compute the gradient of `_quantized`, as one opaque node."""
    return _slope(grad, weight, codes, mean, std, bits)


def _slope(grad: Tensor, weight: Tensor, codes: Tensor, mean: Tensor, std: Tensor, bits: int) -> Tensor:
    """Compute the gradient of `_quantized`: straight-through for the codes, exact for mean and standard deviation."""
    levels = codebook(bits)[0].to(mean)[codes.long()]
    exact, centred = grad.to(mean.dtype), weight.to(mean.dtype) - mean
    share = std / (std + EPSILON)
    slope = (exact * levels).sum() - share * (exact * centred / (std + EPSILON)).sum()
    spread = centred / ((weight.numel() - 1) * std.clamp_min(torch.finfo(std.dtype).tiny))
    return (share * exact + (1 - share) * exact.mean() + spread * slope).to(weight.dtype)


@_gradient.register_fake
def _(grad: Tensor, weight: Tensor, codes: Tensor, mean: Tensor, std: Tensor, bits: int) -> Tensor:
    """Return the shape of `_gradient`."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
    """Propagate the gradient of the values; codes and statistics have none."""
    weight, codes, mean, std = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _gradient(grad, weight, codes, mean, std, ctx.bits), None
    exact = weight.to(mean.dtype)  # a second derivative is asked for: of the statistics too
    return _slope(grad, weight, codes, exact.mean(), exact.std(), ctx.bits), None


_quantized.register_autograd(_backward, setup_context=_keep)


class _Transformed(torch.autograd.Function):
    """`_quantized` for the transforms of `torch.func`, which do not take operators of one's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = quantize(weight, bits)
        return found.values(bits).to(weight.dtype), found.codes.to(torch.uint8), found.mean, found.std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, bits = inputs
        _keep(ctx, (weight, bits), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Tensor, None]:
        return _backward(ctx, grad, *others)


def _dequantized(weight: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise a matrix."""
    if torch._C._are_functorch_transforms_active():
        return cast(Tensor, _Transformed.apply(weight, bits)[0])
    return _quantized(weight, bits)[0]


def start_above_zero(weight: Tensor, bits: int, generator: torch.Generator) -> None:
    """Initialise the last matrix of a branch: at zero, or near zero if it is quantised.

    The standard deviation of a zero matrix is zero, so that rounding noise would determine its first codes. The small
    values are those of the public code: normal with standard deviation 0.001, truncated at twice that.

    Args:
        weight: The matrix, changed in place.
        bits: Bits per weight.
        generator: Source of randomness.
    """
    if bits == 32:
        weight.zero_()
    else:
        nn.init.trunc_normal_(weight, 0.0, 0.001, -0.002, 0.002, generator=generator)


class LowBit(nn.Module):
    """A module some of whose matrices are used and saved with a few bits per weight.

    List it before the kind in a unit's bases: ``class LowRank(LowBit, DeltaUnit)``.
    """

    bits: int = 32
    """Bits per weight of the matrices; 32 means no quantisation."""
    matrices: tuple[str, ...] = ()
    """Names of the tensors that are quantised."""

    def matrix(self, name: str) -> Tensor:
        """Return the matrix as used in the forward pass: unchanged, or quantised and dequantised.

        Args:
            name: One of `matrices`.
        """
        weight: Tensor = getattr(self, name)
        if self.bits == 32:
            return weight
        read = self._buffers.get(f"{name}_read")
        if read is None:
            return _dequantized(weight, self.bits)
        if in_graph():
            return torch.where((weight == read).all(), weight, _quantized(weight, self.bits)[0])
        # A matrix that still equals its loaded values is dequantised already; after a training step it is not.
        return weight if torch.equal(weight, read) else _dequantized(weight, self.bits)

    def codecs(self) -> dict[str, str]:
        """Return the codec of each quantised tensor, by name; see `Unit.codecs`."""
        return {} if self.bits == 32 else dict.fromkeys(self.matrices, codec(self.bits))

    def encoded(self, name: str) -> Tensor | None:
        """Return the bytes a matrix was loaded from, while it still equals their decoded values; see `Unit.encoded`."""
        read = self._buffers.get(f"{name}_read")
        if read is None or not torch.equal(getattr(self, name), read):
            return None
        return cast(Tensor, self._buffers[f"{name}_bytes"]).cpu()

    def keep_encoded(self, name: str, stored: Tensor) -> None:
        """Keep the bytes of a matrix that was just loaded and holds their decoded values; see `Unit.keep_encoded`.

        Until trained, the matrix is used as decoded and saved byte for byte.
        """
        weight: Tensor = getattr(self, name)
        self.register_buffer(f"{name}_read", weight.detach().clone(), persistent=False)
        self.register_buffer(f"{name}_bytes", stored.clone().to(weight.device), persistent=False)
