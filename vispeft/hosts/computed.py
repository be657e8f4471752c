"""Linear layers whose weight is computed from the frozen one, and computed again in the backward pass.

Methods that change a weight as a whole (DoRA, masks, sparse changes, singular values) need a matrix as large as the
layer's in every pass. Kept until the backward pass, these would be a second backbone. Here the forward pass makes the
matrix, uses it and drops it; the backward pass makes it again, for the gradient of the input and for that of the units.
Under ``torch.compile`` and ``torch.export`` the same formulas are written in plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.core.origin import Note, note_of
from vispeft.core.units import Unit, WeightUnit
from vispeft.hosts.functional import cast_to, compute_dtype, leaves_a_graph, without_autocast
from vispeft.hosts.products import as_rows, product, rows_as

__all__ = ["computed_linear"]

Fold = Callable[[Sequence[Any], Tensor], Tensor]
"""Computes the changed weight (out, in) from units and the frozen one."""


class _Layer(NamedTuple):
    """What a computed layer needs besides the tensors that get a gradient."""

    fold: Fold
    units: tuple[WeightUnit, ...]
    bias: Tensor | None
    dtype: torch.dtype
    note: Note | None


def computed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, fold: Fold, units: tuple[WeightUnit, ...], again: bool
) -> Tensor:
    """Compute ``x W'^T + b``, with W' made from the frozen W by units.

    Args:
        x: (..., in).
        weight: (out, in), frozen; if it trains, autograd keeps W'.
        bias: (out,) or None.
        fold: Computes W' from units and W, outside of autocast, without randomness.
        units: The units, whose tensors get gradients.
        again: Compute W' again in the backward pass, and keep no copy of it.

    Returns:
        (..., out), in the dtype given by `compute_dtype`.
    """
    dtype = compute_dtype(x, weight)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    with without_autocast(x):
        if not again or trains or leaves_a_graph() or not torch.is_grad_enabled():
            made = cast_to(fold(units, weight), dtype)
            return F.linear(cast_to(x, dtype), made, None if bias is None else cast_to(bias, dtype))
        note = note_of(x)
        x = cast_to(x, dtype) if note is None else x  # what is kept must belong to the graph, for second derivatives
        sources = [tensor for unit in units for tensor in _tensors(unit)]
        return cast(Tensor, _ComputedLinear.apply(x, weight, _Layer(fold, units, bias, dtype, note), *sources))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Iterate over the tensors that a unit computes with and that may train, those of its lender included."""
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    for child in _below(module).values():
        yield from _tensors(child)


def _below(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a unit computes with, by name; its lender under an empty one."""
    lender = module.lender if isinstance(module, Unit) else None
    children = {name: child for name, child in module._modules.items() if child is not None}
    return children if lender is None else {**children, "": lender}


def _gains(module: nn.Module) -> Iterator[Tensor | None]:
    """Iterate over the gains of a unit and of the modules that it computes with."""
    if isinstance(module, Unit):
        yield module.gain
    for child in _below(module).values():
        yield from _gains(child)


def _twin(module: Any, tensors: Iterator[Tensor], gains: Iterator[Tensor | None]) -> Any:
    """Copy a unit, with other tensors in place of its parameters and its gain, and everything else shared.

    A derivative then ends at these tensors. At the unit's own it would call the hooks that a user registered on them,
    and tensors put in their place for a forward pass, as by `functional_call`, are gone in its backward pass.

    Args:
        module: The unit, or a module of it.
        tensors: The tensors, in the order of `_tensors`.
        gains: The gains of the forward pass, in the order of `_gains`; a schedule may have set others since.
    """
    # The gains given here include a weight, which a weighted class would multiply again.
    twin = object.__new__(getattr(type(module), "unweighted", type(module)))
    own = {name: None if tensor is None else next(tensors) for name, tensor in module._parameters.items()}
    buffers = {**module._buffers, "gain": next(gains)} if isinstance(module, Unit) else module._buffers
    below = {name: _twin(child, tensors, gains) for name, child in _below(module).items()}
    lender = {"_lender": (below.pop(""),)} if "" in below else {}
    changed = {"_parameters": own, "_buffers": buffers, "_modules": {**module._modules, **below}, **lender}
    twin.__dict__.update({**module.__dict__, **changed})
    return twin


class _ComputedLinear(torch.autograd.Function):
    """A layer that keeps its input, or what that is computed from, and of its weight only what it is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: _Layer, *sources: Tensor) -> Tensor:
        fold, units, bias, dtype, note = layer
        made = cast_to(fold(units, weight), dtype)
        out = product(rows_as(x, dtype), made.t(), None if bias is None else cast_to(bias, dtype))
        ctx.fold, ctx.units, ctx.dtype, ctx.kind = fold, units, dtype, x.dtype
        trained = any(ctx.needs_input_grad[3:])
        ctx.origin = None if note is None or not trained else note.origin
        read: tuple[Tensor | None, ...] = (x if trained else None,) if ctx.origin is None else cast(Note, note).tensors
        gains = [gain for unit in units for gain in _gains(unit)]
        ctx.count, ctx.gains = len(read), len(gains)
        ctx.save_for_backward(weight, *read, *gains, *sources)
        return out if x.ndim == 2 else torch.ops.aten._unsafe_view.default(out, [*x.shape[:-1], out.shape[1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *rest = ctx.saved_tensors
        read, gains, sources = rest[: ctx.count], iter(rest[ctx.count :][: ctx.gains]), rest[ctx.count + ctx.gains :]
        x = read[0] if ctx.origin is None else ctx.origin.again(read)
        needed, graph = ctx.needs_input_grad[3:], torch.is_grad_enabled()
        with without_autocast(grad):
            # For a graph of the gradient the tensors stay connected, through views.
            used = [
                s.view_as(s) if graph else s.detach().requires_grad_(n) for s, n in zip(sources, needed, strict=True)
            ]
            tensors = iter(used)
            units = [_twin(unit, tensors, gains) for unit in ctx.units]
            wanted = [tensor for tensor, needs in zip(used, needed, strict=True) if needs]
            with torch.set_grad_enabled(bool(wanted)):
                made = ctx.fold(units, weight)
            first, found = (_with_graph if graph else _once)(ctx, grad, x, made, wanted)
        slopes = iter(found)
        return (
            first if ctx.needs_input_grad[0] else None,
            None,
            None,
            *(next(slopes) if needs else None for needs in needed),
        )


_Found = tuple[Tensor | None, Sequence[Tensor | None]]
"""The gradients of the input and of the units' tensors."""


def _once(ctx: Any, grad: Tensor, x: Tensor | None, made: Tensor, wanted: list[Tensor]) -> _Found:
    """Compute the gradients."""
    rows, first = as_rows(grad), None
    if ctx.needs_input_grad[0]:
        first = cast_to(product(rows, cast_to(made.detach(), ctx.dtype), None), ctx.kind)
        first = first.view(*grad.shape[:-1], made.shape[1])
    if not wanted:
        return first, ()
    slope = cast_to(rows.t() @ rows_as(cast(Tensor, x), ctx.dtype), made.dtype)
    return first, torch.autograd.grad(made, wanted, slope, allow_unused=True)


def _with_graph(ctx: Any, grad: Tensor, x: Tensor | None, made: Tensor, wanted: list[Tensor]) -> _Found:
    """Compute the gradients in plain operations, which record a graph of their own."""
    # Without trained tensors the gradient of the input does not depend on the input. The view ends the derivative.
    x = grad.new_zeros(*grad.shape[:-1], made.shape[1]) if x is None else x.view_as(x)
    x = x if x.requires_grad else x.detach().requires_grad_()
    out = F.linear(rows_as(x, ctx.dtype), cast_to(made, ctx.dtype))
    first, *found = torch.autograd.grad(out, [x, *wanted], as_rows(grad), create_graph=True, allow_unused=True)
    return first, found
