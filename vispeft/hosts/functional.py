"""The arithmetic of adapted linear layers, with backward passes that save few activations and skip frozen weights.

Two eager autograd functions cover the common cases. Under ``torch.compile`` and ``torch.export`` the same formulas are
written in plain operations, which the compiler can fuse and any runtime can execute. Where a graph of the gradient is
asked for (second derivatives), the backward pass differentiates the plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_not
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.generated import FrozenCasts
from vispeft.core.low_rank import DRAWS, Branch, Dropout, dropped_draws
from vispeft.core.recovery import recoverable
from vispeft.errors import ConfigError

__all__ = [
    "affine",
    "compute_dtype",
    "frozen_casts",
    "frozen_linear",
    "linear",
    "low_rank_linear",
    "low_rank_terms",
    "may_recover",
]


class _Place(NamedTuple):
    """The settings of a branch, without its tensors."""

    scale: float
    start: int
    stop: int
    dropout: Dropout


_Masks = tuple[Tensor | None, Tensor | None]
"""Dropout masks of a term, at its input and between its factors."""


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


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch], casts: FrozenCasts | None = None
) -> Tensor:
    """Compute ``x W^T + b`` plus low-rank terms: ``y[rows] += scale * (x A^T) B^T`` (LoRA, arXiv 2106.09685, eq. 3).

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None.
        branches: The terms to add; at least one.
        casts: Where casts of frozen tensors are kept; None to cast at every call.

    Returns:
        (..., out), in the dtype given by `compute_dtype`.
    """
    dtype, recorded = compute_dtype(x, weight), _leaves_a_graph()
    layout, factors, plain = [], [], True
    for branch in branches:
        layout.append(_Place(branch.scale, branch.start, branch.stop, branch.dropout))
        factors += [branch.a, branch.b]
        plain = plain and branch.stop - branch.start == weight.shape[0] and not branch.dropout.share
    if casts is not None and not recorded:
        weight, bias = casts.get(weight, bias, dtype)
    x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    # The fused backward pass computes no gradient of the weight; if one is needed, autograd computes it.
    if recorded or weight.requires_grad or (bias is not None and bias.requires_grad):
        with _without_autocast(x):
            return _low_rank_plain(x, weight, bias, layout, [_cast(t, dtype) for t in factors])
    if not plain or _is_folded(x, layout):
        return cast(Tensor, _LowRankLinear.apply(x, weight, bias, layout, *factors))
    return _low_rank_in_place(x, weight, bias, layout, factors)


def _is_folded(x: Tensor, layout: Sequence[_Place]) -> bool:
    """Return whether terms are added to a copy of the weight: with more rows than input channels that is cheaper.

    In reduced precision the copy would round them away, and with dropout each row has its own term.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.numel() <= x.shape[-1] ** 2:
        return False
    return not any(place.dropout.share for place in layout)


def _low_rank_in_place(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[_Place], factors: Sequence[Tensor]
) -> Tensor:
    """Add terms to the output of the frozen product, in place.

    Autograd's own nodes take less of the host's time than one in Python, and keep as little.
    """
    rows, dtype = _as_rows(x), weight.dtype
    out = F.linear(rows, weight, bias)
    used = [factor if factor.dtype == dtype else factor.to(dtype) for factor in factors]
    for place, a, b in zip(layout, used[::2], used[1::2], strict=True):
        out.addmm_(F.linear(rows, a), b.t(), alpha=place.scale)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, casts: FrozenCasts) -> Tensor:
    """Compute ``x W^T + b`` as `F.linear` does, bit for bit; under autocast with the casts that are kept.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        casts: Where casts of frozen tensors are kept.

    Returns:
        (..., out), in the dtype given by `compute_dtype`.
    """
    weight, bias = frozen_casts(x, weight, bias, casts)
    return F.linear(x, weight, bias)


def frozen_casts(x: Tensor, weight: Tensor, bias: Tensor | None, casts: FrozenCasts) -> tuple[Tensor, Tensor | None]:
    """Return the tensors of a layer, under autocast as it would cast them; see `FrozenCasts.get`.

    Args:
        x: The layer's input, which tells the device.
        weight: (out, in).
        bias: (out,) or None.
        casts: Where casts of frozen tensors are kept.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and not _leaves_a_graph():
        return casts.get(weight, bias, torch.get_autocast_dtype(kind))
    return weight, bias


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor that has another type."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: the operands have their types."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _leaves_a_graph() -> bool:
    """Return whether operations are recorded or transformed, so that plain ones are needed."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or torch._C._is_tracing() or transformed


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
    factors = [_cast(t, out.dtype) for branch in branches for t in (branch.a, branch.b)]
    layout = tuple(_Place(branch.scale, branch.start, branch.stop, branch.dropout) for branch in branches)
    with _without_autocast(x):
        return _with_terms(_cast(x, out.dtype), out, layout, factors)


class _LowRankLinear(torch.autograd.Function):
    """The frozen product and all low-rank terms in one autograd node, with dropout, on slices, or folded.

    Neither direction allocates a second (rows, out) tensor. Saved for backward are the input, the narrow (rows, rank)
    projections and the dropout masks (a byte per entry). See `_is_folded` for the temporary copy of the weight.

    The factors are cast in here, and their gradients cast back, which saves four nodes a term.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[_Place], *factors: Tensor
    ) -> Tensor:
        rows, dtype = _as_rows(x), weight.dtype
        used = [factor if factor.dtype == dtype else factor.to(dtype) for factor in factors]
        ctx.layout, ctx.casts = layout, any(map(is_not, used, factors))
        ctx.folds = _is_folded(rows, layout)
        out = _product(rows, (_written_into(weight, layout, used) if ctx.folds else weight).t(), bias)
        hidden: list[Tensor] = []
        kept: list[Tensor | None] = []
        for place, a, b in zip(layout, used[::2], used[1::2], strict=True):
            if place.dropout.share:
                narrow, masks = _dropped_narrow(rows, a, place.dropout)
                kept += masks
            else:
                narrow = rows @ a.t()
            hidden.append(narrow)
            if not ctx.folds:
                _part(out, place).addmm_(narrow, b.t(), alpha=place.scale)
        # If no first factor trains in this step, the input need not be saved.
        read = x if any(ctx.needs_input_grad[4::2]) else None
        ctx.save_for_backward(read, weight, *factors, *hidden, *(used if ctx.casts else ()), *kept)
        # No view of `out`, which timm could not modify in place, as some attention modules do with their projection's.
        return out if x.ndim == 2 else _UNSAFE_VIEW(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        layout, needed, count = ctx.layout, ctx.needs_input_grad, len(ctx.layout)
        factors, hidden, rest = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        used, kept = (rest[: 2 * count], rest[2 * count :]) if ctx.casts else (factors, rest)
        masks = _masks(layout, kept)
        if torch.is_grad_enabled():
            return tuple(_with_graph(ctx, grad, x, weight, factors, masks))
        slopes, rows = _as_rows(grad), None if x is None else _as_rows(x)
        grad_x = None
        if needed[0]:
            grad_x = _product(slopes, _written_into(weight, layout, used) if ctx.folds else weight, None)
        gradients: list[Tensor | None] = []
        for index, (place, (inputs, between)) in enumerate(zip(layout, masks, strict=True)):
            a, b = used[2 * index], used[2 * index + 1]
            part = _part(slopes, place)
            narrow = _only(_times_narrow(part, b, place.scale / place.dropout.kept), between)
            gradients.append(narrow.t() @ _only(rows, inputs) if needed[4 + 2 * index] else None)
            gradients.append(_outer(part, hidden[index], place.scale) if needed[5 + 2 * index] else None)
            if grad_x is not None and inputs is not None:
                grad_x += _only(narrow @ a, inputs)
            elif grad_x is not None and not ctx.folds:
                grad_x.addmm_(narrow, a)
        if grad_x is not None and grad.ndim != 2:
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[1])
        if ctx.casts:
            pairs = zip(gradients, factors, strict=True)
            gradients = [None if slope is None else slope.to(factor.dtype) for slope, factor in pairs]
        return (grad_x, None, None, None, *gradients)


def _with_graph(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, factors: Sequence[Tensor], masks: Sequence[_Masks]
) -> list[Tensor | None]:
    """Compute the gradients of a `_LowRankLinear` in plain operations, which record a graph of their own."""
    if x is None and any(ctx.needs_input_grad[4:]):
        raise ConfigError(
            "A second derivative was asked for (create_graph=True) of low-rank terms whose first factor is frozen, and "
            "these keep no input for it. Train the first factor too: LoRA(freeze_a=False)."
        )
    # Without a trained factor the gradient of the input does not depend on the input.
    x = grad.new_zeros(*grad.shape[:-1], weight.shape[1]).requires_grad_() if x is None else x.view_as(x)
    # Views, so that the derivative stops here, also where a factor or the input depends on another one further back.
    factors = [factor.view_as(factor) for factor in factors]
    rows, used = _as_rows(x), [_cast(factor, weight.dtype) for factor in factors]
    out = F.linear(rows, weight)
    for index, ((scale, start, stop, dropout), (inputs, between)) in enumerate(zip(ctx.layout, masks, strict=True)):
        hidden = F.linear(_only(rows, inputs), used[2 * index])
        term = F.linear(_only(hidden, between), used[2 * index + 1]) * (scale / dropout.kept)
        out = out + F.pad(term, (start, out.shape[-1] - stop))
    sources = {0: x, **{4 + index: factor for index, factor in enumerate(factors)}}
    wanted = [index for index in sources if ctx.needs_input_grad[index]]
    found = torch.autograd.grad(out, [sources[index] for index in wanted], _as_rows(grad), create_graph=True)
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(index) for index in range(len(ctx.needs_input_grad))]


def _as_rows(x: Tensor) -> Tensor:
    """Return (..., channels) as a matrix."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _part(out: Tensor, place: _Place) -> Tensor:
    """Return the columns of a matrix that a term is added to."""
    return out if place.stop - place.start == out.shape[1] else out[:, place.start : place.stop]


def _dropped_narrow(rows: Tensor, a: Tensor, dropout: Dropout) -> tuple[Tensor, _Masks]:
    """Apply a first factor with its dropout; also return the masks at the input and behind it."""
    inputs = _kept(rows, dropout.at("input"))
    narrow = _only(rows, inputs) @ a.t()
    between = _kept(narrow, dropout.at("hidden"))
    # Kept entries are scaled up here, where there are few channels, and not in the input.
    return _only(narrow, between).div_(dropout.kept), (inputs, between)


def _masks(layout: Sequence[_Place], kept: Sequence[Tensor | None]) -> list[_Masks]:
    """Give each term its dropout masks, of those that were kept of the terms with dropout."""
    if not kept:
        return [(None, None)] * len(layout)
    masks = iter(kept)
    return [(next(masks), next(masks)) if place.dropout.share else (None, None) for place in layout]


def _is_tall(rows: Tensor) -> bool:
    """Return whether operand orders matter: with 8 columns, a CPU's BLAS is up to 7 times slower on the other one."""
    return rows.device.type == "cpu" and rows.shape[0] >= TALL


def _times_narrow(rows: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``scale * rows B``, (rows, rank)."""
    b = b if scale == 1 else b * scale
    return F.linear(rows, b.t().contiguous()) if _is_tall(rows) else rows @ b


def _outer(part: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Compute ``scale * part^T hidden``, (out, rank)."""
    product = (hidden.t() @ part).t() if _is_tall(part) else part.t() @ hidden
    return product if scale == 1 else product.mul_(scale)


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


def _only(x: Any, kept: Tensor | None) -> Tensor:
    """Apply a dropout mask."""
    out: Tensor = x if kept is None else x * kept
    return out


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x M + b`` of two matrices outside autograd.

    In float32 on a CPU this calls oneDNN, as PyTorch does for compiled linear layers: at the sizes of a ViT-S it is
    faster than `torch.addmm`. Small products take less time than its call.
    """
    large = x.shape[0] * matrix.numel() >= ONEDNN_WORK
    if large and _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu":
        return cast(Tensor, _ONEDNN(x, matrix.t(), bias, "none", [], ""))
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


ONEDNN_WORK = 2**22
"""Products of numbers from which oneDNN's call, 15 microseconds longer, pays."""
TALL = 64
"""Rows from which the order of operands matters."""
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
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
                return cast(Tensor, _Affine.apply(y, scale, shift))
        # addcmul saves y and scale only; a product and a sum would also allocate a temporary of y's size.
        return torch.addcmul(shift, y, scale)
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
    return not (_leaves_a_graph() or torch.is_autocast_enabled(y.device.type))


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
