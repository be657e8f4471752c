"""Low-rank terms in a compiled graph on a CPU: one operator that the compiler does not look into.

It computes what the eager node computes. Traced operation by operation, a compiled step takes longer than the step as
it is: inductor calls another library for the products, copies the output for each term, and multiplies narrow matrices
in the order of operands that autograd has. See `docs/design.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vispeft.core.low_rank import NO_DROPOUT
from vispeft.core.tracing import in_graph
from vispeft.hosts.terms import Kept, Place, gradients, product_with_terms

__all__ = ["is_opaque", "opaque_terms"]


def is_opaque(x: Tensor, layout: Sequence[Place]) -> bool:
    """Return whether a graph that is being compiled gets the operator.

    Masks have to be drawn by operations that the compiler knows, so that activation checkpointing repeats them. An
    exported graph holds only operations of PyTorch, and the transforms of `torch.func` know only those.

    Args:
        x: The input of the layer.
        layout: The terms.
    """
    if not in_graph() or x.device.type != "cpu" or any(place.dropout.share for place in layout):
        return False
    return not _needs_plain()


def _needs_plain() -> bool:
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


# What `torch.compiler.assume_constant_result` sets, whose module takes seconds to import: asked while a graph is made,
# with the transforms that stand in it. Inside of a graph torch 2.11 answers that it is being exported.
_needs_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque_terms(
    rows: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[Place], factors: Sequence[Tensor]
) -> Tensor:
    """Compute ``x W^T + b`` plus low-rank terms, as `product_with_terms`; weight and bias are frozen.

    Args:
        rows: (rows, in), in the dtype of the weight, as all tensors.
        weight: (out, in).
        bias: (out,) or None.
        layout: The terms.
        factors: Both factors of each term.

    Returns:
        (rows, out).
    """
    scales, starts, stops = ([getattr(place, name) for place in layout] for name in ("scale", "start", "stop"))
    found: Sequence[Tensor] = _terms(rows, weight, bias, list(factors), scales, starts, stops)
    return found[0]


def _layout(scales: list[float], starts: list[int], stops: list[int]) -> list[Place]:
    return [Place(*one, NO_DROPOUT) for one in zip(scales, starts, stops, strict=True)]


@torch.library.custom_op("vispeft::low_rank_terms", mutates_args=())
def _terms(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: list[Tensor],
    scales: list[float],
    starts: list[int],
    stops: list[int],
) -> list[Tensor]:
    """Compute a layer with its terms.

    Returns:
        The output, (rows, out), and the narrow projection of each term, (rows, rank).
    """
    out, kept = product_with_terms(rows, weight, bias, _layout(scales, starts, stops), factors)
    return [out, *kept.hidden]


@_terms.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Tensor], *places: Any) -> list[Tensor]:
    """Return the shapes of `_terms`."""
    return [rows.new_empty(rows.shape[0], width) for width in (weight.shape[0], *(a.shape[0] for a in factors[::2]))]


@torch.library.custom_op("vispeft::low_rank_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    factors: list[Tensor],
    hidden: list[Tensor],
    scales: list[float],
    starts: list[int],
    stops: list[int],
    needed: list[bool],
) -> list[Tensor]:
    """Compute the gradients of `_terms`.

    Returns:
        Those of the input and of each factor that are needed, in this order.
    """
    layout = _layout(scales, starts, stops)
    kept = Kept(weight, layout, factors, hidden, [None] * len(layout))
    grad_x, others = gradients(grad, rows, kept, needed)
    # An operator's results are laid out as its fake ones.
    return [found.contiguous() for found in (grad_x, *others) if found is not None]


@_gradients.register_fake
def _(
    grad: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    factors: list[Tensor],
    hidden: list[Tensor],
    scales: list[float],
    starts: list[int],
    stops: list[int],
    needed: list[bool],
) -> list[Tensor]:
    """Return the shapes of `_gradients`."""
    shapes = [(grad.shape[0], weight.shape[1]), *(factor.shape for factor in factors)]
    return [grad.new_empty(shape) for shape, wanted in zip(shapes, needed, strict=True) if wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save the tensors that the backward pass needs."""
    rows, weight, _, factors, *ctx.places = inputs
    trained = [factor.requires_grad for factor in factors]
    ctx.needed, ctx.reads = [rows.requires_grad, *trained], any(trained[::2])
    # If no first factor trains in this step, the input need not be saved.
    ctx.save_for_backward(weight, *factors, *output[1:], *([rows] if ctx.reads else []))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Propagate the gradient of the output; the narrow projections have none."""
    weight, *rest = ctx.saved_tensors
    terms = len(ctx.places[0])
    factors, hidden, read = rest[: 2 * terms], rest[2 * terms : 3 * terms], rest[3 * terms :]
    made = iter(_gradients(grads[0], read[0] if read else None, weight, factors, hidden, *ctx.places, ctx.needed))
    grad_x, *slopes = [next(made) if wanted else None for wanted in ctx.needed]
    return grad_x, None, None, slopes, None, None, None


_terms.register_autograd(_backward, setup_context=_keep)
