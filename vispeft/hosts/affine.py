"""Scale and shift of channels, with a backward pass that keeps the output in place of the input."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.core.generated import FrozenCasts
from vispeft.core.recovery import recoverable
from vispeft.core.units import AffineUnit
from vispeft.hosts.functional import leaves_a_graph
from vispeft.hosts.products import SMALL

__all__ = ["affine", "affine_linear", "affine_norm", "may_recover", "scaled_linear"]


def affine(y: Tensor, scale: Tensor, shift: Tensor, recovers: bool | None = None) -> Tensor:
    """Scale and shift the channels: ``scale * y + shift`` (SSF, arXiv 2210.08823, eq. 3).

    Args:
        y: (..., channels).
        scale: (channels,).
        shift: (channels,).
        recovers: Whether the input can be recovered from the output (`recoverable`); None to look, which waits for the
            device. Without effect unless `may_recover` holds.

    Returns:
        The shape and dtype of `y`.
    """
    if y.dtype == scale.dtype:
        if may_recover(y, scale):
            recovers = bool(recoverable(scale.detach(), shift.detach()).all()) if recovers is None else recovers
            if recovers:
                return cast(Tensor, _apply_affine(y, scale, shift))
        # addcmul saves y and scale only; a product and a sum would also allocate a temporary of y's size.
        return torch.addcmul(shift, y, scale)
    # A graph that serves all sizes must not ask for one.
    if scale.dtype == torch.float32 and y.device.type == "cpu" and not leaves_a_graph() and y.numel() < SMALL:
        # Here each operation costs more than its numbers, and two are less than the four below.
        return torch.addcmul(shift, y.float(), scale).to(y.dtype)
    # A scale near one would be rounded coarsely; its difference from one is not.
    return torch.addcmul(y + shift.to(y.dtype), y, (scale - 1).to(y.dtype))


def may_recover(y: Tensor, scale: Tensor) -> bool:
    """Return whether an affine map may keep its output in place of its input: in float32 and in a step that trains it.

    Args:
        y: The input.
        scale: The scale.
    """
    if y.dtype != torch.float32 or scale.dtype != torch.float32:
        return False
    if not (torch.is_grad_enabled() and scale.requires_grad):
        return False
    return not (leaves_a_graph() or torch.is_autocast_enabled(y.device.type))


def affine_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift the output of a frozen linear layer, which is computed again in the backward pass.

    For layers as narrow at the output as at the input, and whose output nothing else keeps: there a product costs least
    for what it saves. In float32 and in a step that trains, see `may_recover`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        scale: (out,).
        shift: (out,).

    Returns:
        (..., out).
    """
    out: Tensor = _apply_affine_linear(x, weight, bias, scale, shift)
    return out


def scaled_linear(x: Tensor, layer: nn.Module, unit: AffineUnit, casts: FrozenCasts) -> Tensor | None:
    """Scale and shift the output of a frozen layer under autocast, with as little of the host's time as possible.

    Args:
        x: (..., in).
        layer: The linear layer.
        unit: The scale and shift.
        casts: Where casts of frozen tensors are kept.

    Returns:
        (..., out); None where the general path has to compute it.
    """
    kind = x.device.type
    weight: Tensor | None = layer._parameters.get("weight")
    if weight is None or unit._buffers["gain"] is not None or not torch.is_autocast_enabled(kind) or leaves_a_graph():
        return None
    dtype = torch.get_autocast_dtype(kind)
    weight, bias = casts.get(weight, layer._parameters.get("bias"), dtype)
    return affine(F.linear(x, weight, bias), unit.scale, unit.shift) if weight.dtype is dtype else None


def affine_norm(x: Tensor, layer: nn.LayerNorm, unit: AffineUnit) -> Tensor | None:
    """Scale and shift the output of a layer norm, with as little of the host's time as possible.

    Args:
        x: (..., channels).
        layer: The norm.
        unit: The scale and shift.

    Returns:
        The shape of `x`; None where the general path has to compute it.
    """
    weight, bias, scale = layer._parameters.get("weight"), layer._parameters.get("bias"), unit.scale
    if weight is None or bias is None or unit._buffers["gain"] is not None or scale.dtype is not weight.dtype:
        return None
    return F.layer_norm(x, layer.normalized_shape, scale * weight, scale * bias + unit.shift, layer.eps)


class _AffineLinear(torch.autograd.Function):
    """`affine_linear`, keeping the layer's input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        return torch.addcmul(shift, F.linear(x, weight, bias), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Plain operations on the inputs alone, so that autograd can differentiate them again.
        x, weight, bias, scale = ctx.saved_tensors
        rows = tuple(range(grad.ndim - 1))
        grad_x = F.linear(grad * scale, weight.t()) if ctx.needs_input_grad[0] else None
        product = grad * F.linear(x, weight, bias)
        return grad_x, None, None, product.sum(rows) if rows else product, grad.sum(rows) if rows else grad


class _Affine(torch.autograd.Function):
    """Scale and shift, saving the output instead of the input: the next layer usually saves the output anyway."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out = torch.addcmul(shift, y, scale)
        ctx.save_for_backward(out, scale, shift)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # Plain operations on inputs and output alone, so that autograd can differentiate them again.
        out, scale, shift = ctx.saved_tensors
        rows = tuple(range(grad.ndim - 1))
        total = grad.sum(rows) if rows else grad
        product = (grad * out).sum(rows) if rows else grad * out
        # The sum over rows of grad * (out - shift) / scale, without allocating the difference.
        grad_scale = (product - shift * total) / scale if ctx.needs_input_grad[1] else None
        return grad * scale if ctx.needs_input_grad[0] else None, grad_scale, total


# `Function.apply` without its treatment of functorch's transforms, under which neither is used.
_apply_affine = super(torch.autograd.Function, _Affine).apply
_apply_affine_linear = super(torch.autograd.Function, _AffineLinear).apply
