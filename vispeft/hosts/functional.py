"""The arithmetic of adapted linear layers, with backward passes that save few activations and skip frozen weights.

Two eager autograd functions cover the common cases. Under ``torch.compile`` and ``torch.export`` the same formulas are
written in plain operations, which the compiler can fuse and any runtime can execute. Where a graph of the gradient is
asked for (second derivatives), the backward pass differentiates the plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.low_rank import DRAWS, Branch, Dropout, dropped_draws
from vispeft.errors import ConfigError

__all__ = ["affine", "compute_dtype", "linear", "low_rank_linear", "low_rank_terms"]


class _Place(NamedTuple):
    """The settings of a branch, without its tensors."""

    scale: float
    start: int
    stop: int
    dropout: Dropout


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Choose the dtype a linear layer computes in.

    Args:
        x: The layer's input.
        weight: The layer's weight.

    Returns:
        Autocast's dtype if autocast is on, else the weight's: adapters follow the base, never the other way round.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


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


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """Compute ``x W^T + b`` plus low-rank terms: ``y[rows] += scale * (x A^T) B^T`` (LoRA, arXiv 2106.09685, eq. 3).

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None.
        branches: The terms to add; at least one.

    Returns:
        (..., out), in the dtype given by `compute_dtype`.
    """
    dtype = compute_dtype(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    factors = [t.to(dtype) for branch in branches for t in (branch.a, branch.b)]
    layout = tuple(_Place(branch.scale, branch.start, branch.stop, branch.dropout) for branch in branches)
    with torch.autocast(x.device.type, enabled=False):
        # The fused backward pass computes no gradient of the weight; if one is needed, autograd computes it.
        base_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if _leaves_a_graph() or base_trains:
            return _low_rank_plain(x, weight, bias, layout, factors)
        # Reshaped outside the function: a view returned from it could not be modified in place, as some timm attention
        # modules do with the output of their projection.
        out: Tensor = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, layout, *factors)
        return out.view(*x.shape[:-1], weight.shape[0])


def _leaves_a_graph() -> bool:
    """Return whether operations are recorded or transformed, so that plain ones are needed."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed


def _low_rank_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[_Place], factors: Sequence[Tensor]
) -> Tensor:
    return _with_terms(x, F.linear(x, weight, bias), layout, factors)


def _with_terms(x: Tensor, out: Tensor, layout: Sequence[_Place], factors: Sequence[Tensor]) -> Tensor:
    """Add low-rank terms of `x` to an output, in operations that autograd knows."""
    width, recorded = out.shape[-1], _leaves_a_graph()
    for index, (scale, start, stop, dropout) in enumerate(layout):
        hidden = F.linear(F.dropout(x, dropout.at("input")), factors[2 * index])
        hidden, b = F.dropout(hidden, dropout.at("hidden")), factors[2 * index + 1]
        if stop - start == width and not recorded:
            # One operation for product, multiplier and sum, which take more time than the product of few channels.
            rows = torch.addmm(out.reshape(-1, width), hidden.reshape(-1, hidden.shape[-1]), b.t(), alpha=scale)
            out = rows.view(out.shape)
            continue
        term = F.linear(hidden, b) * scale
        out = out + (term if stop - start == width else F.pad(term, (start, width - stop)))
    return out


def low_rank_terms(x: Tensor, out: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Add low-rank terms to an existing output of a layer: ``y[rows] += scale * (x A^T) B^T``.

    Args:
        x: The input of the layer, (..., in).
        out: Its output, (..., out); not modified.
        branches: The terms; if empty, the output is returned unchanged.

    Returns:
        (..., out), in the dtype of `out`.
    """
    factors = [t.to(out.dtype) for branch in branches for t in (branch.a, branch.b)]
    layout = tuple(_Place(branch.scale, branch.start, branch.stop, branch.dropout) for branch in branches)
    with torch.autocast(x.device.type, enabled=False):
        return _with_terms(x.to(out.dtype), out, layout, factors)


class _LowRankLinear(torch.autograd.Function):
    """The frozen product and all low-rank terms in one autograd node.

    Neither direction allocates a second (rows, out) tensor. Saved for backward are the input, the narrow (rows, rank)
    projections and the dropout masks (a byte per entry). With more rows than input channels it is cheaper to add the
    terms to a temporary copy of the weight than to every row. In reduced precision that copy would round them away, and
    with dropout each row has its own term, so in these cases they are added to the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: tuple[_Place, ...], *factors: Tensor
    ) -> Tensor:
        ctx.layout = layout
        drops = any(place.dropout.share for place in layout)
        ctx.folds = x.shape[0] > x.shape[1] and x.dtype in (torch.float32, torch.float64) and not drops
        used = _written_into(weight, layout, factors) if ctx.folds else weight
        out = _product(x, used, bias)
        hidden: list[Tensor] = []
        kept: list[Tensor | None] = []
        for index, (scale, start, stop, dropout) in enumerate(layout):
            inputs = _kept(x, dropout.at("input"))
            narrow = _only(x, inputs) @ factors[2 * index].t()
            between = _kept(narrow, dropout.at("hidden"))
            # Kept entries are scaled up here, where there are few channels, and not in the input.
            narrow = _only(narrow, between).div_(dropout.kept)
            hidden.append(narrow)
            kept += [inputs, between]
            if not ctx.folds:
                out[:, start:stop].addmm_(narrow, factors[2 * index + 1].t(), alpha=scale)
        # If no first factor trains in this step, the input need not be saved.
        reads_input = any(ctx.needs_input_grad[4::2])
        ctx.save_for_backward(x if reads_input else None, weight, *factors, *hidden, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.layout)
        factors, hidden, kept = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        if torch.is_grad_enabled():
            return tuple(_with_graph(ctx, grad, x, weight, factors, kept))
        grad_x = None
        if ctx.needs_input_grad[0]:
            used = _written_into(weight, ctx.layout, factors) if ctx.folds else weight
            grad_x = _product(grad, used.t(), None)
        grad_factors: list[Tensor | None] = []
        for index, (scale, start, stop, dropout) in enumerate(ctx.layout):
            a, b = factors[2 * index], factors[2 * index + 1]
            inputs, between = kept[2 * index], kept[2 * index + 1]
            part = grad[:, start:stop]
            needs_a, needs_b = ctx.needs_input_grad[4 + 2 * index], ctx.needs_input_grad[5 + 2 * index]
            # The operand orders matter: with 8 columns, BLAS is up to 7 times slower on the other transposition.
            narrow = _only(F.linear(part, b.t().contiguous() * (scale / dropout.kept)), between)
            grad_factors.append(narrow.t() @ _only(cast(Tensor, x), inputs) if needs_a else None)
            grad_factors.append((hidden[index].t() @ part).t().mul(scale) if needs_b else None)
            if grad_x is not None and inputs is not None:
                grad_x += _only(narrow @ a, inputs)
            elif grad_x is not None and not ctx.folds:
                grad_x.addmm_(narrow, a)
        return (grad_x, None, None, None, *grad_factors)


def _with_graph(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, factors: Sequence[Tensor], kept: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Compute the gradients of a `_LowRankLinear` in plain operations, which record a graph of their own."""
    if x is None and any(ctx.needs_input_grad[4:]):
        raise ConfigError(
            "A second derivative was asked for (create_graph=True) of low-rank terms whose first factor is frozen, and "
            "these keep no input for it. Train the first factor too: LoRA(freeze_a=False)."
        )
    # Without a trained factor the gradient of the input does not depend on the input.
    x = grad.new_zeros(grad.shape[0], weight.shape[1]).requires_grad_() if x is None else x.view_as(x)
    # Views, so that the derivative stops here, also where a factor or the input depends on another one further back.
    factors = [factor.view_as(factor) for factor in factors]
    out = F.linear(x, weight)
    for index, (scale, start, stop, dropout) in enumerate(ctx.layout):
        hidden = F.linear(_only(x, kept[2 * index]), factors[2 * index])
        term = F.linear(_only(hidden, kept[2 * index + 1]), factors[2 * index + 1]) * (scale / dropout.kept)
        out = out + F.pad(term, (start, out.shape[-1] - stop))
    inputs = {0: x, **{4 + index: factor for index, factor in enumerate(factors)}}
    wanted = [index for index in inputs if ctx.needs_input_grad[index]]
    found = torch.autograd.grad(out, [inputs[index] for index in wanted], grad, create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(index) for index in range(len(ctx.needs_input_grad))]


def _kept(x: Tensor, share: float) -> Tensor | None:
    """Draw the dropout mask, ones and zeros of a byte each; None if everything is kept.

    Each entry uses 16 random bits. `torch.bernoulli` draws sequentially on a CPU, which takes a fifth of a training
    step of a ViT-S with dropout before every linear layer.
    """
    if not share:
        return None
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (draws >= dropped_draws(share) - DRAWS // 2).view(torch.uint8)


def _only(x: Tensor, kept: Tensor | None) -> Tensor:
    """Apply a dropout mask."""
    return x if kept is None else x * kept


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x W^T + b`` of two matrices outside autograd.

    In float32 on a CPU this calls oneDNN, as PyTorch does for compiled linear layers: at the sizes of a ViT-S it is
    faster than `torch.addmm`.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN is not None and x.shape[0] > 0:
        return cast(Tensor, _ONEDNN(x, weight, bias, "none", [], ""))
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _written_into(weight: Tensor, layout: Sequence[_Place], factors: Sequence[Tensor]) -> Tensor:
    """Compute ``W + scale * B A`` on each term's rows as a new tensor."""
    scale, start, stop, _ = layout[0]
    if len(layout) == 1 and stop - start == weight.shape[0]:
        return torch.addmm(weight, factors[1], factors[0], alpha=scale)
    written = weight.clone()
    for index, (scale, start, stop, _) in enumerate(layout):
        written[start:stop].addmm_(factors[2 * index + 1], factors[2 * index], alpha=scale)
    return written


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift the channels: ``scale * y + shift`` (SSF, arXiv 2210.08823, eq. 3).

    Args:
        y: (..., channels).
        scale: (channels,).
        shift: (channels,).

    Returns:
        The shape and dtype of `y`.
    """
    if y.dtype == scale.dtype:
        if _can_recover(y, scale, shift):
            return cast(Tensor, _Affine.apply(y, scale, shift))
        # addcmul saves y and scale only; a product and a sum would also allocate a temporary of y's size.
        return torch.addcmul(shift, y, scale)
    # A scale near one would be rounded coarsely; its difference from one is not.
    return torch.addcmul(y + shift.to(y.dtype), y, (scale - 1).to(y.dtype))


RECOVERY = 64
"""Largest factor by which recovering an affine map's input from its output may amplify rounding errors."""


def _can_recover(y: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Return whether an affine map's input can be recovered from its output: in float32, with no scale near zero.

    With ``out`` rounded to ``eps |out|``, ``(out - shift) / scale`` is off by ``eps (|y| + |shift| / |scale|)``.
    """
    if y.dtype != torch.float32 or not (torch.is_grad_enabled() and scale.requires_grad):
        return False
    if _leaves_a_graph() or torch.is_autocast_enabled(y.device.type):
        return False
    with torch.no_grad():
        return bool((scale.abs() * RECOVERY >= shift.abs() + 1).all())


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
