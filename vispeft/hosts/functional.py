"""Linear layers of units and of the frozen base, and what a later layer may keep in place of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.generated import FrozenCasts
from vispeft.core.origin import SharedOrigin, note_of, note_origin
from vispeft.core.tracing import in_graph

__all__ = [
    "cast_to",
    "compute_dtype",
    "computes_again",
    "frozen_casts",
    "frozen_linear",
    "leaves_a_graph",
    "linear",
    "note_behind",
    "without_autocast",
]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Choose the dtype a linear layer computes in.

    Args:
        x: The layer's input.
        weight: The layer's weight.

    Returns:
        Autocast's dtype if autocast is on, which leaves float64 alone, else the weight's: adapters follow the base,
        never the other way round.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and weight.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a unit's linear layer in the dtype of its input; units are float32 even on a half-precision base.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, casts: FrozenCasts, noted: bool = False) -> Tensor:
    """Compute ``x W^T + b`` as `F.linear` does, bit for bit; under autocast with the casts that are kept.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        casts: Where casts of frozen tensors are kept.
        noted: Note at the output how it is computed again.

    Returns:
        (..., out), in the dtype given by `compute_dtype`.
    """
    weight, bias = frozen_casts(x, weight, bias, casts)
    out = F.linear(x, weight, bias)
    if noted and out.dtype == weight.dtype and not weight.requires_grad and computes_again(x):
        note_behind(out, x, _linear_again, (weight, bias))
    return out


def frozen_casts(x: Tensor, weight: Tensor, bias: Tensor | None, casts: FrozenCasts) -> tuple[Tensor, Tensor | None]:
    """Return the tensors of a layer, under autocast as it would cast them; see `FrozenCasts.get`.

    Args:
        x: The layer's input, which tells the device.
        weight: (out, in).
        bias: (out,) or None.
        casts: Where casts of frozen tensors are kept.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and not leaves_a_graph():
        return casts.get(weight, bias, torch.get_autocast_dtype(kind))
    return weight, bias


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor that has another type."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: the operands have their types."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def leaves_a_graph() -> bool:
    """Return whether operations are recorded or transformed, so that plain ones are needed."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return in_graph() or torch._C._is_tracing() or transformed


def computes_again(x: Tensor) -> bool:
    """Return whether a cheap output of `x` is to be computed again in the backward pass: if `x` is kept for that.

    Args:
        x: The input.
    """
    return x.requires_grad and torch.is_grad_enabled() and not leaves_a_graph()


def note_behind(out: Tensor, x: Tensor, make: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    """Note how an output is computed again, from an input or from what that is computed from.

    Args:
        out: The output.
        x: The input.
        make: Computes the output from the input and further tensors.
        tensors: The further tensors, as they were used.
    """
    note, own = note_of(x), len(tensors)
    if note is None:
        note_origin(out, SharedOrigin(make, 1 + own), (x, *tensors))
    else:
        note_origin(out, SharedOrigin(make, own, note.origin), (*note.tensors, *tensors))


def _linear_again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(x):
        return F.linear(cast_to(x, weight.dtype), weight, bias)
