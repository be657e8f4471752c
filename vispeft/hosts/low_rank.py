"""Linear layers with low-rank terms, with backward passes that save few activations and skip frozen weights.

Two eager autograd functions cover the common cases. Under ``torch.compile`` and ``torch.export`` the same formulas are
written in plain operations, which the compiler can fuse and any runtime can execute. Where a graph of the gradient is
asked for (second derivatives), the backward pass differentiates the plain operations.
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
from vispeft.core.low_rank import NO_DROPOUT, Branch, Dropout
from vispeft.core.origin import Note, note_of
from vispeft.core.units import DeltaUnit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import cast_to, compute_dtype, leaves_a_graph, note_behind, without_autocast
from vispeft.hosts.masks import mask_blocks, mask_source, masked
from vispeft.hosts.products import SMALL, add_product, as_rows, outer, product, rows_as, times_narrow

__all__ = ["low_rank_linear", "low_rank_terms", "term_linear"]


class _Place(NamedTuple):
    """The settings of a branch, without its tensors."""

    scale: float
    start: int
    stop: int
    dropout: Dropout


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
        layout.append(_Place(branch.scale, branch.start, branch.stop, branch.dropout))
        factors += [branch.a, branch.b]
    if casts is not None and not recorded:
        weight, bias = casts.get(weight, bias, dtype)
    weight, bias = cast_to(weight, dtype), None if bias is None else cast_to(bias, dtype)
    # The fused backward pass computes no gradient of the weight; if one is needed, autograd computes it.
    if recorded or weight.requires_grad or (bias is not None and bias.requires_grad):
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
    if weight.requires_grad or (bias is not None and bias.requires_grad) or leaves_a_graph():
        return None
    a, b = unit.factors()
    if b.shape[0] != weight.shape[0]:
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
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


def _is_folded(rows: int, weight: Tensor) -> bool:
    """Return whether terms are added to a copy of the weight: with more rows than input channels that is cheaper.

    In reduced precision the copy would round them away.
    """
    return rows > weight.shape[1] and weight.dtype in (torch.float32, torch.float64)


def _low_rank_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[_Place], factors: Sequence[Tensor]
) -> Tensor:
    return _with_terms(x, F.linear(x, weight, bias), layout, factors)


def _with_terms(x: Tensor, out: Tensor, layout: Sequence[_Place], factors: Sequence[Tensor]) -> Tensor:
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
    layout = tuple(_Place(branch.scale, branch.start, branch.stop, branch.dropout) for branch in branches)
    with without_autocast(x):
        return _with_terms(cast_to(x, out.dtype), out, layout, factors)


class _LowRankLinear(torch.autograd.Function):
    """The frozen product and all low-rank terms in one autograd node.

    Neither direction allocates a second (rows, out) tensor. Saved for backward are the input, or what it is computed
    from (`Origin`), the narrow (rows, rank) projections and what dropout masks are drawn from (`mask_source`). See
    `_is_folded` for the temporary copy of the weight.

    Input and factors are cast in here, and their gradients cast back, which saves five nodes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Sequence[_Place],
        note: Note | None,
        *factors: Tensor,
    ) -> Tensor:
        dtype = weight.dtype
        rows = rows_as(x, dtype)
        used = [factor if factor.dtype == dtype else factor.to(dtype) for factor in factors]
        ctx.layout, ctx.kind, ctx.casts = layout, x.dtype, any(map(is_not, used, factors))
        # With dropout each row has its own term.
        ctx.folds = _is_folded(rows.shape[0], weight) and not any(place.dropout.share for place in layout)
        out = product(rows, (_written_into(weight, layout, used) if ctx.folds else weight).t(), bias)
        hidden: list[Tensor] = []
        sources: list[Tensor] = []
        for place, a, b in zip(layout, used[::2], used[1::2], strict=True):
            if place.dropout.share:
                narrow, source = _dropped_narrow(rows, a, place.dropout)
                sources.append(source)
            else:
                narrow = product(rows, a.t(), None)
            hidden.append(narrow)
            if not ctx.folds:
                add_product(_part(out, place), narrow, b.t(), place.scale)
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
        slopes, rows = as_rows(grad), None if x is None else rows_as(x, weight.dtype)
        grad_x = None
        if needed[0]:
            grad_x = product(slopes, _written_into(weight, layout, used) if ctx.folds else weight, None)
        gradients: list[Tensor | None] = []
        for index, (place, source) in enumerate(zip(layout, sources, strict=True)):
            a, b = used[2 * index], used[2 * index + 1]
            part = _part(slopes, place)
            narrow = times_narrow(part, b, place.scale / place.dropout.kept)
            wanted = rows if needed[5 + 2 * index] else None
            if source is not None and place.dropout.place == "input":
                gradients.append(_dropped_gradients(narrow, a, source, place.dropout.share, wanted, grad_x))
            else:
                narrow = narrow if source is None else masked(narrow, source, place.dropout.share)
                gradients.append(None if wanted is None else torch.mm(narrow.t(), wanted))
                if grad_x is not None and not ctx.folds:
                    add_product(grad_x, narrow, a, 1)
            gradients.append(outer(part, hidden[index], place.scale) if needed[6 + 2 * index] else None)
        if grad_x is not None:
            grad_x = grad_x if grad.ndim == 2 else grad_x.view(*grad.shape[:-1], grad_x.shape[1])
            grad_x = cast_to(grad_x, ctx.kind)
        if ctx.casts:
            pairs = zip(gradients, factors, strict=True)
            gradients = [None if slope is None else slope.to(factor.dtype) for slope, factor in pairs]
        return (grad_x, None, None, None, None, *gradients)


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
            ctx.layout = [_Place(scale, 0, weight.shape[0], NO_DROPOUT)]
            grad_x, *gradients = _with_graph(ctx, grad, x, weight, (own_a, own_b), [None])
            return grad_x, None, *gradients
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
        elif needs_x and _is_folded(slopes.shape[0], weight):
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
    if _is_folded(rows.shape[0], weight):
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


def _part(out: Tensor, place: _Place) -> Tensor:
    """Return the columns of a matrix that a term is added to."""
    return out if place.stop - place.start == out.shape[1] else out[:, place.start : place.stop]


def _dropped_narrow(rows: Tensor, a: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """Apply a first factor with its dropout; also return what its mask is drawn from."""
    # Kept entries are scaled up here, where there are few channels, and not in the input.
    if dropout.place == "input":
        source = mask_source(rows, rows.shape[1], dropout.share)
        blocks = mask_blocks(source, rows, rows.shape[1], dropout.share)
        parts = [product(rows[part] * mask, a.t(), None) for part, mask in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).div_(dropout.kept), source
    narrow = product(rows, a.t(), None)
    source = mask_source(narrow, narrow.shape[1], dropout.share)
    return masked(narrow, source, dropout.share).div_(dropout.kept), source


def _dropped_gradients(
    narrow: Tensor, a: Tensor, source: Tensor, share: float, rows: Tensor | None, grad_x: Tensor | None
) -> Tensor | None:
    """Compute the gradient of a first factor behind dropout of the input, and add that of the input in place.

    Args:
        narrow: Gradient of the narrow projection, (rows, rank).
        a: The first factor, (rank, in).
        source: What the mask is drawn from.
        share: Share of entries that were dropped.
        rows: The input, (rows, in); None if the factor needs no gradient.
        grad_x: Gradient of the input without this term; None if it is not needed.
    """
    grad_a: Tensor | None = None
    if rows is None and grad_x is None:
        return grad_a
    for part, mask in mask_blocks(source, narrow, a.shape[1], share):
        if grad_x is not None:
            grad_x[part].addcmul_(narrow[part] @ a, mask)
        if rows is not None:
            own = narrow[part].t() @ mask.mul_(rows[part])
            grad_a = own if grad_a is None else grad_a.add_(own)
    return grad_a


def _dropped(x: Tensor, source: Tensor, share: float) -> Tensor:
    """Apply a dropout mask in operations that autograd knows."""
    return x * masked(torch.ones_like(x, requires_grad=False), source, share)


def _written_into(weight: Tensor, layout: Sequence[_Place], factors: Sequence[Tensor]) -> Tensor:
    """Compute ``W + scale * B A`` on each term's rows as a new tensor."""
    scale, start, stop, _ = layout[0]
    if len(layout) == 1 and stop - start == weight.shape[0]:
        return torch.addmm(weight, factors[1], factors[0], alpha=scale)
    written = weight.clone()
    for index, (scale, start, stop, _) in enumerate(layout):
        written[start:stop].addmm_(factors[2 * index + 1], factors[2 * index], alpha=scale)
    return written
