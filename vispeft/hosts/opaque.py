"""Low-rank terms in a compiled graph on a CPU: operators that the compiler does not look into.

They compute what the eager node computes. Traced operation by operation, a compiled step takes longer than the step as
it is: inductor calls another library for the products, copies the output for each term, and multiplies narrow matrices
in the order of operands that autograd has. See `docs/design.md`.

The operators are defined by their schemas, since each call of `torch.library.custom_op` takes 20 to 40 microseconds
longer. The one of a layer returns one tensor and states its floating-point operations: by these the compiler chooses
what it computes again in a backward pass, and of the parts of a list it takes each to be free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vispeft.core.low_rank import Dropout
from vispeft.core.tracing import in_graph
from vispeft.errors import ConfigError
from vispeft.hosts.terms import Kept, Place, gradients, narrowed, product_with_hidden

__all__ = ["is_opaque", "opaque_terms"]


def is_opaque(x: Tensor) -> bool:
    """Return whether a graph that is being compiled gets the operators.

    An exported graph holds only operations of PyTorch, and the transforms of `torch.func` know only those.

    Args:
        x: The input of the layer.
    """
    return in_graph() and x.device.type == "cpu" and not _needs_plain()


def _needs_plain() -> bool:
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


# What `torch.compiler.assume_constant_result` sets, whose module takes seconds to import: asked while a graph is made,
# with the transforms that stand in it. Inside of a graph torch 2.11 answers that it is being exported.
_needs_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]


_LAYER = "Tensor weight, Tensor[] factors, Tensor[] hidden, Tensor[] seeds"
_PLACES = "float[] scales, int[] starts, int[] stops, float[] shares, str[] places"
torch.library.define(
    "vispeft::low_rank_hidden", "(Tensor rows, Tensor a, Tensor? seed, float share, str place) -> Tensor"
)
torch.library.define("vispeft::low_rank_product", f"(Tensor rows, Tensor? bias, {_LAYER}, {_PLACES}) -> Tensor")
torch.library.define(
    "vispeft::low_rank_gradients", f"(Tensor grad, Tensor? rows, {_LAYER}, {_PLACES}, bool[] needed) -> Tensor[]"
)
_HIDDEN, _PRODUCT, _GRADIENTS = (
    getattr(torch.ops.vispeft, f"low_rank_{name}").default for name in ("hidden", "product", "gradients")
)


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
    hidden, seeds = [], []
    for place, a in zip(layout, factors[::2], strict=True):
        seed = _seed(rows) if place.dropout.share else None
        hidden.append(_HIDDEN(rows.detach(), a.detach(), seed, place.dropout.share, place.dropout.place))
        seeds += [] if seed is None else [seed]
    columns = [[place.scale, place.start, place.stop, place.dropout.share, place.dropout.place] for place in layout]
    out: Tensor = _PRODUCT(rows, bias, weight, list(factors), hidden, seeds, *map(list, zip(*columns, strict=True)))
    return out


def _seed(rows: Tensor) -> Tensor:
    """Draw what a mask is made from by an operation that compilers know to be random, and never draw again.

    Args:
        rows: Any tensor on the device.

    Returns:
        A number in [0, 1), float64 ().
    """
    return torch.rand_like(rows.new_empty((), dtype=torch.float64))


def _source(seed: Tensor) -> Tensor:
    """Return a drawn number as the source of a mask; its bits are as many as a float64 has."""
    return (seed * 2**53).long()


def _layout(*columns: Sequence[Any]) -> list[Place]:
    scales, starts, stops, shares, places = columns
    dropouts = map(Dropout, shares, places)
    return [Place(*one) for one in zip(scales, starts, stops, dropouts, strict=True)]


@torch.library.impl("vispeft::low_rank_hidden", "cpu")
def _hidden(rows: Tensor, a: Tensor, seed: Tensor | None, share: float, place: Literal["input", "hidden"]) -> Tensor:
    """Compute the narrow projection of a term, (rows, rank); its gradient is that of the layer."""
    return narrowed(rows, a, Dropout(share, place), None if seed is None else _source(seed))[0]


@torch.library.register_fake("vispeft::low_rank_hidden")
def _(rows: Tensor, a: Tensor, *others: Any) -> Tensor:
    """Return the shape of `_hidden`."""
    return rows.new_empty(rows.shape[0], a.shape[0])


@torch.library.impl("vispeft::low_rank_product", "cpu")
def _product(
    rows: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    factors: list[Tensor],
    hidden: list[Tensor],
    seeds: list[Tensor],
    *places: Any,
) -> Tensor:
    """Compute a layer with its terms, (rows, out)."""
    return product_with_hidden(rows, bias, Kept(weight, _layout(*places), factors, hidden, seeds))


@torch.library.register_fake("vispeft::low_rank_product")
def _(rows: Tensor, bias: Tensor | None, weight: Tensor, *others: Any) -> Tensor:
    """Return the shape of `_product`."""
    return rows.new_empty(rows.shape[0], weight.shape[0])


@torch.library.impl("vispeft::low_rank_gradients", "cpu")
def _gradients(
    grad: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    factors: list[Tensor],
    hidden: list[Tensor],
    seeds: list[Tensor],
    *others: Any,
) -> list[Tensor]:
    """Compute the gradients of `_product`.

    Returns:
        Those of the input and of each factor that are needed, in this order.
    """
    places, needed = others[:-1], others[-1]
    layout, drawn = _layout(*places), iter(seeds)
    sources = [_source(next(drawn)) if place.dropout.share else None for place in layout]
    kept = Kept(weight, layout, factors, hidden, sources)
    grad_x, slopes = gradients(grad, rows, kept, needed)
    # An operator's results are laid out as its fake ones.
    return [found.contiguous() for found in (grad_x, *slopes) if found is not None]


@torch.library.register_fake("vispeft::low_rank_gradients")
def _(
    grad: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    factors: list[Tensor],
    *others: Any,
) -> list[Tensor]:
    """Return the shapes of `_gradients`."""
    shapes = [(grad.shape[0], weight.shape[1]), *(factor.shape for factor in factors)]
    return [grad.new_empty(shape) for shape, wanted in zip(shapes, others[-1], strict=True) if wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the tensors that the backward pass needs."""
    rows, _, weight, factors, hidden, seeds, *ctx.places = inputs
    trained = [factor.requires_grad for factor in factors]
    ctx.needed, ctx.reads = [rows.requires_grad, *trained], any(trained[::2])
    # If no first factor trains in this step, the input need not be saved.
    ctx.save_for_backward(weight, *factors, *hidden, *([rows] if ctx.reads else []), *seeds)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Propagate the gradient of the output; the narrow projections have none of their own."""
    weight, *rest = ctx.saved_tensors
    terms = len(ctx.places[0])
    factors, hidden, rest = rest[: 2 * terms], rest[2 * terms : 3 * terms], rest[3 * terms :]
    rows = rest.pop(0) if ctx.reads else None
    made = iter(_GRADIENTS(grad, rows, weight, factors, hidden, rest, *ctx.places, ctx.needed))
    grad_x, *slopes = [next(made) if wanted else None for wanted in ctx.needed]
    return grad_x, None, None, slopes, [None] * terms, [None] * len(rest), *[None] * len(ctx.places)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise ConfigError(
        "A second derivative was asked for (create_graph=True) of low-rank terms in a compiled graph, which has none. "
        "Run the model as it is: bank.compile('off')."
    )


torch.library.register_autograd("vispeft::low_rank_product", _backward, setup_context=_keep)
torch.library.register_autograd("vispeft::low_rank_gradients", _no_backward)


@register_flop_formula(torch.ops.vispeft.low_rank_hidden)
def _hidden_operations(rows: Sequence[int], a: Sequence[int], *others: Any, **_: Any) -> int:
    """Count the floating-point operations of `_hidden` from the shapes of its inputs."""
    return 2 * rows[0] * rows[1] * a[0]


@register_flop_formula(torch.ops.vispeft.low_rank_product)
def _product_operations(
    rows: Sequence[int], bias: Any, weight: Sequence[int], factors: Sequence[Sequence[int]], *others: Any, **_: Any
) -> int:
    """Count the floating-point operations of `_product`: its terms are added, however that is done."""
    return 2 * rows[0] * (weight[0] * weight[1] + sum(math.prod(b) for b in factors[1::2]))


@register_flop_formula(torch.ops.vispeft.low_rank_gradients)
def _gradient_operations(
    grad: Sequence[int], rows: Any, weight: Sequence[int], factors: Sequence[Sequence[int]], *others: Any, **_: Any
) -> int:
    """Count the floating-point operations of `_gradients`; each factor takes part in two products."""
    needs_x = others[-1][0]
    return 2 * grad[0] * (needs_x * weight[0] * weight[1] + 2 * sum(map(math.prod, factors)))
