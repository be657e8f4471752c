"""Products of a frozen linear layer with low-rank terms and their gradients, outside autograd.

`vispeft.hosts.low_rank` makes eager autograd nodes of them, and `vispeft.hosts.opaque` an operator for compiled graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vispeft.core.low_rank import Dropout
from vispeft.hosts.masks import mask_blocks, mask_source, masked
from vispeft.hosts.products import add_product, outer, product, times_narrow

__all__ = ["Kept", "Place", "gradients", "is_folded", "narrowed", "product_with_hidden", "product_with_terms"]


class Place(NamedTuple):
    """The settings of a branch, without its tensors."""

    scale: float
    start: int
    stop: int
    dropout: Dropout


class Kept(NamedTuple):
    """What a backward pass reads, apart from the input."""

    weight: Tensor
    """(out, in)."""
    layout: Sequence[Place]
    """The terms."""
    factors: Sequence[Tensor]
    """Both factors of each term, (rank, in) and (its rows, rank)."""
    hidden: Sequence[Tensor]
    """The narrow projection of each term, (rows, rank)."""
    sources: Sequence[Tensor | None]
    """What the mask of each term is drawn from; None without dropout."""


def is_folded(rows: int, weight: Tensor) -> bool:
    """Return whether terms are added to a copy of the weight: with more rows than input channels that is cheaper.

    In reduced precision the copy would round them away.

    Args:
        rows: Rows of the input.
        weight: (out, in).
    """
    return rows > weight.shape[1] and weight.dtype in (torch.float32, torch.float64)


def product_with_terms(
    rows: Tensor, weight: Tensor, bias: Tensor | None, layout: Sequence[Place], factors: Sequence[Tensor]
) -> tuple[Tensor, Kept]:
    """Compute ``x W^T + b`` plus low-rank terms. No second tensor of (rows, out) is allocated.

    Args:
        rows: (rows, in), in the dtype of the weight, as all tensors.
        weight: (out, in).
        bias: (out,) or None.
        layout: The terms.
        factors: Both factors of each term.

    Returns:
        (rows, out), and what the backward pass reads.
    """
    drawn = [narrowed(rows, a, place.dropout) for place, a in zip(layout, factors[::2], strict=True)]
    kept = Kept(weight, layout, factors, [narrow for narrow, _ in drawn], [source for _, source in drawn])
    return product_with_hidden(rows, bias, kept), kept


def product_with_hidden(rows: Tensor, bias: Tensor | None, kept: Kept) -> Tensor:
    """Compute `product_with_terms` with the narrow projections at hand.

    Args:
        rows: (rows, in), in the dtype of the weight.
        bias: (out,) or None.
        kept: The layer, its terms and their narrow projections.

    Returns:
        (rows, out).
    """
    weight, layout, factors, hidden, _ = kept
    if _folds(rows.shape[0], weight, layout):
        return product(rows, _written_into(weight, layout, factors).t(), bias)
    out = product(rows, weight.t(), bias)
    for place, narrow, b in zip(layout, hidden, factors[1::2], strict=True):
        add_product(_part(out, place), narrow, b.t(), place.scale)
    return out


def gradients(
    grad: Tensor, rows: Tensor | None, kept: Kept, needed: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute the gradients of the input and of the factors.

    Args:
        grad: Gradient of the output, (rows, out), in the dtype of the weight.
        rows: The input, (rows, in); None if no first factor needs a gradient.
        kept: What `product_with_terms` returned.
        needed: Whether a gradient is needed: of the input, and of each factor.

    Returns:
        (rows, in), and one gradient per factor; None where none is needed.
    """
    weight, layout, factors, hidden, sources = kept
    needs_x, folds = needed[0], _folds(grad.shape[0], weight, layout)
    grad_x = product(grad, _written_into(weight, layout, factors) if folds else weight, None) if needs_x else None
    slopes: list[Tensor | None] = []
    for index, (place, source) in enumerate(zip(layout, sources, strict=True)):
        a, b = factors[2 * index], factors[2 * index + 1]
        part = _part(grad, place)
        narrow = times_narrow(part, b, place.scale / place.dropout.kept)
        wanted = rows if needed[1 + 2 * index] else None
        if source is not None and place.dropout.place == "input":
            slopes.append(_dropped_gradients(narrow, a, source, place.dropout.share, wanted, grad_x))
        else:
            narrow = narrow if source is None else masked(narrow, source, place.dropout.share)
            slopes.append(None if wanted is None else torch.mm(narrow.t(), wanted))
            if grad_x is not None and not folds:
                add_product(grad_x, narrow, a, 1)
        slopes.append(outer(part, hidden[index], place.scale) if needed[2 + 2 * index] else None)
    return grad_x, slopes


def _folds(rows: int, weight: Tensor, layout: Sequence[Place]) -> bool:
    """Return whether all terms are added to a copy of the weight; with dropout each row has its own term."""
    return is_folded(rows, weight) and not any(place.dropout.share for place in layout)


def _part(out: Tensor, place: Place) -> Tensor:
    """Return the columns of a matrix that a term is added to."""
    return out if place.stop - place.start == out.shape[1] else out[:, place.start : place.stop]


def narrowed(rows: Tensor, a: Tensor, dropout: Dropout, source: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Apply a first factor with its dropout.

    Args:
        rows: (rows, in).
        a: (rank, in).
        dropout: Dropout of the input or of the projection.
        source: What its mask is drawn from; None to draw that too.

    Returns:
        (rows, rank), and what the mask is drawn from, None without dropout.
    """
    if not dropout.share:
        return product(rows, a.t(), None), None
    # Kept entries are scaled up here, where there are few channels, and not in the input.
    if dropout.place == "input":
        source = mask_source(rows, rows.shape[1], dropout.share) if source is None else source
        blocks = mask_blocks(source, rows, rows.shape[1], dropout.share)
        parts = [product(mask.mul_(rows[part]), a.t(), None) for part, mask in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).div_(dropout.kept), source
    narrow = product(rows, a.t(), None)
    source = mask_source(narrow, narrow.shape[1], dropout.share) if source is None else source
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


def _written_into(weight: Tensor, layout: Sequence[Place], factors: Sequence[Tensor]) -> Tensor:
    """Compute ``W + scale * B A`` on each term's rows as a new tensor."""
    scale, start, stop, _ = layout[0]
    if len(layout) == 1 and stop - start == weight.shape[0]:
        return torch.addmm(weight, factors[1], factors[0], alpha=scale)
    written = weight.clone()
    for index, (scale, start, stop, _) in enumerate(layout):
        written[start:stop].addmm_(factors[2 * index + 1], factors[2 * index], alpha=scale)
    return written
