"""Linear layers with low-rank terms, with backward passes that save few activations and skip frozen weights.

Two eager autograd functions cover the common cases. Under ``torch.compile`` on a GPU and under ``torch.export`` the
same formulas are written in plain operations, which the compiler can fuse and any runtime can execute; on a CPU a
compiled graph has one operator for them (`vispeft.hosts.opaque`). Where a graph of the gradient is asked for (second
derivatives), the backward pass differentiates the plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import is_not
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.core.generated import FrozenCasts
from vispeft.core.low_rank import NO_DROPOUT, Branch
from vispeft.core.origin import Note, note_of
from vispeft.core.units import DeltaUnit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import cast_to, compute_dtype, leaves_a_graph, note_behind, without_autocast
from vispeft.hosts.masks import masked
from vispeft.hosts.opaque import is_opaque, opaque_terms
from vispeft.hosts.products import SMALL, add_product, as_rows, outer, product, rows_as, times_narrow
from vispeft.hosts.terms import Kept, Place, gradients, is_folded, product_with_terms

__all__ = ["low_rank_linear", "low_rank_terms", "term_linear"]

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


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
    dtype, recorded = compute_dtype(x, weight), leaves_a_graph()
    layout, factors = [], []
    for branch in branches:
        layout.append(Place(branch.scale, branch.start, branch.stop, branch.dropout))
        factors += [branch.a, branch.b]
    if casts is not None and not recorded:
        weight, bias = casts.get(weight, bias, dtype)
    weight, bias = cast_to(weight, dtype), None if bias is None else cast_to(bias, dtype)
    # The fused backward pass computes no gradient of the weight; if one is needed, autograd computes it.
    if recorded or _trains(weight, bias):
        with without_autocast(x):
            return _low_rank_plain(cast_to(x, dtype), weight, bias, layout, [cast_to(t, dtype) for t in factors])
    note = note_of(x)
    x = cast_to(x, dtype) if note is None else x  # what is kept must belong to the graph, for second derivatives
    return cast(Tensor, _apply_terms(x, weight, bias, layout, note, *factors))


def term_linear(x: Tensor, layer: nn.Module, unit: DeltaUnit, casts: FrozenCasts, noted: bool = False) -> Tensor | None:
    """Compute `low_rank_linear` for one low-rank term, with as little of the host's time as possible.

    Args:
        x: (..., in).
        layer: The linear layer, whose weight and bias are frozen.
        unit: The term.
        casts: Where casts of frozen tensors are kept.
        noted: Note at the output how it is computed again.

    Returns:
        (..., out); None where only `low_rank_linear` can compute it.
    """
    weight: Tensor | None = layer._parameters.get("weight")
    bias: Tensor | None = layer._parameters.get("bias")
    if weight is None or unit._buffers["gain"] is not None or (unit.training and unit.dropout.share):
        return None
    if _trains(weight, bias) or leaves_a_graph():
        return None
    a, b = unit.factors()
    if b.shape[0] != weight.shape[0]:
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype is not torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
        if weight.dtype is not dtype:
            weight, bias = casts.get(weight, bias, dtype)
            weight, bias = cast_to(weight, dtype), None if bias is None else cast_to(bias, dtype)
    note = note_of(x)
    kept = cast_to(x, weight.dtype) if note is None else x  # must belong to the graph, for second derivatives
    out: Tensor = _apply_term(kept, _Term(weight, bias, unit.scale, note), a, b)
    if noted:
        note_behind(out, x, partial(_term_again, unit.scale), (weight, bias, a, b))
    return out


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _low_rank_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[Place], factors: Sequence[Tensor]
) -> Tensor:
    if is_opaque(x) and not _trains(weight, bias):
        out = opaque_terms(as_rows(x), weight, bias, layout, factors)
        return out.view(*x.shape[:-1], out.shape[1])
    return _with_terms(x, F.linear(x, weight, bias), layout, factors)


def _with_terms(x: Tensor, out: Tensor, layout: Sequence[Place], factors: Sequence[Tensor]) -> Tensor:
    """Add low-rank terms of `x` to an output, in operations that autograd knows."""
    width, recorded = out.shape[-1], leaves_a_graph()
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
    factors = [cast_to(t, out.dtype) for branch in branches for t in (branch.a, branch.b)]
    layout = tuple(Place(branch.scale, branch.start, branch.stop, branch.dropout) for branch in branches)
    with without_autocast(x):
        return _with_terms(cast_to(x, out.dtype), out, layout, factors)


class _LowRankLinear(torch.autograd.Function):
    """The frozen product and all low-rank terms in one autograd node.

    Neither direction allocates a second (rows, out) tensor. Saved for backward are the input, or what it is computed
    from (`Origin`), the narrow (rows, rank) projections and what dropout masks are drawn from (`mask_source`). See
    `is_folded` for the temporary copy of the weight.

    Input and factors are cast in here, and their gradients cast back, which saves five nodes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Sequence[Place],
        note: Note | None,
        *factors: Tensor,
    ) -> Tensor:
        dtype = weight.dtype
        rows = rows_as(x, dtype)
        used = [factor if factor.dtype == dtype else factor.to(dtype) for factor in factors]
        ctx.layout, ctx.kind, ctx.casts = layout, x.dtype, any(map(is_not, used, factors))
        out, (_, _, _, hidden, drawn) = product_with_terms(rows, weight, bias, layout, used)
        sources = [source for source in drawn if source is not None]
        # If no first factor trains in this step, the input need not be saved.
        reads = any(ctx.needs_input_grad[5::2])
        ctx.origin, ctx.inputs = None, 1
        read: tuple[Tensor | None, ...] = (None,)
        if reads:
            read = (x,) if note is None else note.tensors
            ctx.origin, ctx.inputs = None if note is None else note.origin, len(read)
        ctx.save_for_backward(weight, *factors, *hidden, *(used if ctx.casts else ()), *read, *sources)
        # No view of `out`, which timm could not modify in place, as some attention modules do with their projection's.
        return out if x.ndim == 2 else _UNSAFE_VIEW(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, needed, count = ctx.layout, ctx.needs_input_grad, len(ctx.layout)
        weight, *rest = ctx.saved_tensors
        factors, hidden, rest = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        used, rest = (rest[: 2 * count], rest[2 * count :]) if ctx.casts else (factors, rest)
        read, rest = rest[: ctx.inputs], rest[ctx.inputs :]
        x = read[0] if ctx.origin is None else ctx.origin.again(read)
        found = iter(rest)
        sources = [next(found) if place.dropout.share else None for place in layout]
        if torch.is_grad_enabled():
            first, *others = _with_graph(ctx, grad, x, weight, factors, sources)
            return (first, None, None, None, None, *others)
        rows = None if x is None else rows_as(x, weight.dtype)
        kept = Kept(weight, layout, used, hidden, sources)
        grad_x, slopes = gradients(as_rows(grad), rows, kept, (needed[0], *needed[5:]))
        if grad_x is not None:
            grad_x = grad_x if grad.ndim == 2 else grad_x.view(*grad.shape[:-1], grad_x.shape[1])
            grad_x = cast_to(grad_x, ctx.kind)
        if ctx.casts:
            pairs = zip(slopes, factors, strict=True)
            slopes = [None if slope is None else slope.to(factor.dtype) for slope, factor in pairs]
        return (grad_x, None, None, None, None, *slopes)


class _Term(NamedTuple):
    """A layer with one low-rank term, without the tensors that get a gradient."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    note: Note | None


class _TermLinear(torch.autograd.Function):
    """`_LowRankLinear` for one term on all rows without dropout: the common case, with fewer calls of Python.

    Operations are written out where a function would be called, and small matrices take the fewest operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: _Term, a: Tensor, b: Tensor) -> Tensor:
        weight, bias, scale, note = term
        dtype, shape, kinds = weight.dtype, x.shape, (x.dtype, a.dtype)
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        if kinds[0] is not dtype:
            rows = rows.to(dtype)
        factors = a, b
        if kinds[1] is not dtype:
            a, b = a.to(dtype), b.to(dtype)
        out, narrow = _with_term(rows, weight, bias, a, b, scale)
        # Not the note, whose tensors would outlive the backward pass.
        ctx.scale, ctx.origin, ctx.kinds = scale, None if note is None else note.origin, kinds
        read = (x,) if note is None else note.tensors
        ctx.save_for_backward(weight, *factors, a, b, narrow, *(read if ctx.needs_input_grad[2] else ()))
        return out if len(shape) == 2 else _UNSAFE_VIEW(out, (*shape[:-1], out.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: each time would unpack them again.
        weight, own_a, own_b, a, b, narrow, *read = ctx.saved_tensors
        kinds, scale, origin = ctx.kinds, ctx.scale, ctx.origin
        dtype, shape = weight.dtype, grad.shape
        x = None if not read else read[0] if origin is None else origin.again(read)
        if torch.is_grad_enabled():
            ctx.layout = [Place(scale, 0, weight.shape[0], NO_DROPOUT)]
            grad_x, *others = _with_graph(ctx, grad, x, weight, (own_a, own_b), [None])
            return grad_x, None, *others
        slopes = grad if len(shape) == 2 else grad.reshape(-1, shape[-1])
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad
        small = slopes.shape[0] * slopes.shape[1] < SMALL
        back = torch.mm(slopes, b) if small and scale == 1 else times_narrow(slopes, b, scale)
        grad_x = grad_a = grad_b = None
        if needs_a:
            grad_a = torch.mm(back.t(), rows_as(cast(Tensor, x), dtype))
        if needs_b:
            grad_b = outer(slopes, narrow, scale)
        if needs_x and small:
            grad_x = torch.mm(slopes, weight).add_(torch.mm(back, a))
        elif needs_x and is_folded(slopes.shape[0], weight):
            grad_x = product(slopes, torch.addmm(weight, b, a, alpha=scale), None)
        elif needs_x:
            grad_x = product(slopes, weight, None)
            add_product(grad_x, back, a, 1)
        if grad_x is not None and len(shape) != 2:
            grad_x = grad_x.view(*shape[:-1], grad_x.shape[1])
        if kinds[1] is not dtype:
            grad_a, grad_b = _cast_if(grad_a, kinds[1]), _cast_if(grad_b, kinds[1])
        return grad_x if kinds[0] is dtype else _cast_if(grad_x, kinds[0]), None, grad_a, grad_b


def _with_term(
    rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute a layer with one low-rank term, outside autograd; also return the narrow projection."""
    narrow = product(rows, a.t(), None)
    if rows.shape[0] * weight.shape[0] < SMALL:
        return F.linear(rows, weight, bias).add_(torch.mm(narrow, b.t()), alpha=scale), narrow
    if is_folded(rows.shape[0], weight):
        return product(rows, torch.addmm(weight, b, a, alpha=scale).t(), bias), narrow
    out = product(rows, weight.t(), bias)
    add_product(out, narrow, b.t(), scale)
    return out, narrow


def _term_again(scale: float, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    with without_autocast(x):
        rows, factors = rows_as(x, weight.dtype), (cast_to(a, weight.dtype), cast_to(b, weight.dtype))
        if torch.is_grad_enabled():  # for second derivatives, which oneDNN's product does not have
            out = torch.addmm(F.linear(rows, weight, bias), F.linear(rows, factors[0]), factors[1].t(), alpha=scale)
            return out.view(*x.shape[:-1], len(weight))
        return _with_term(rows, weight, bias, *factors, scale)[0].view(*x.shape[:-1], len(weight))


# `Function.apply` without its treatment of functorch's transforms, under which terms are computed otherwise.
_apply_term = super(torch.autograd.Function, _TermLinear).apply
_apply_terms = super(torch.autograd.Function, _LowRankLinear).apply


def _cast_if(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _with_graph(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    factors: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Compute the gradients of input and factors in plain operations, which record a graph of their own."""
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[-len(factors) :]]
    if x is None and any(needed[1:]):
        raise ConfigError(
            "A second derivative was asked for (create_graph=True) of low-rank terms whose first factor is frozen, and "
            "these keep no input for it. Train the first factor too: LoRA(freeze_a=False)."
        )
    # Without a trained factor the gradient of the input does not depend on the input.
    x = grad.new_zeros(*grad.shape[:-1], weight.shape[1]).requires_grad_() if x is None else x.view_as(x)
    # Views, so that the derivative stops here, also where a factor or the input depends on another one further back.
    factors = [factor.view_as(factor) for factor in factors]
    rows, used = rows_as(x, weight.dtype), [cast_to(factor, weight.dtype) for factor in factors]
    out = F.linear(rows, weight)
    for index, ((scale, start, stop, dropout), source) in enumerate(zip(ctx.layout, masks, strict=True)):
        entered = rows if source is None or dropout.place != "input" else _dropped(rows, source, dropout.share)
        hidden = F.linear(entered, used[2 * index])
        hidden = hidden if source is None or dropout.place != "hidden" else _dropped(hidden, source, dropout.share)
        term = F.linear(hidden, used[2 * index + 1]) * (scale / dropout.kept)
        out = out + F.pad(term, (start, out.shape[-1] - stop))
    sources = [tensor for tensor, wanted in zip([x, *factors], needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(out, sources, as_rows(grad), create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def _dropped(x: Tensor, source: Tensor, share: float) -> Tensor:
    """Apply a dropout mask in operations that autograd knows."""
    return x * masked(torch.ones_like(x, requires_grad=False), source, share)
