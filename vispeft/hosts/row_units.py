"""Units of several adapters that act in one pass, each on the images that chose its adapter.

The frozen layers run once on the whole batch. Where adapters have units of their own, one unit stands for all of
these. Low-rank terms of all adapters are one batched product: each image has the factors of its adapter. Other units
take the rows of their images. The first axis of a layer's input is the batch, or the windows of all images one image
after the other, so the rows of an image are always consecutive.

It needs units that act on images independently and leave the tensors of the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispeft.core.low_rank import Branch
from vispeft.core.route import Acting, Routing
from vispeft.core.rows import Rows
from vispeft.core.tracing import in_graph
from vispeft.core.units import (
    AffineUnit,
    DeltaUnit,
    DepthUnit,
    InputUnit,
    ParallelUnit,
    SequentialUnit,
    Unit,
)
from vispeft.errors import ConfigError
from vispeft.hosts.base import Host, host_kind
from vispeft.hosts.block import BlockHost
from vispeft.hosts.functional import cast_to, without_autocast
from vispeft.hosts.layers import LinearHost, affine_by, gained, terms_of
from vispeft.hosts.low_rank import low_rank_terms

__all__ = ["by_rows", "unroutable"]

_IN_LINEAR = ("input", "delta", "sequential", "affine")
"""The kinds of units that change inputs and outputs of a linear layer, row by row."""
_ANYWHERE = ("shared", "depth")
"""Units that hold tensors, and rates of stochastic depth."""


def unroutable(acting: Acting, host: Host | None) -> str | None:
    """Return the kind of a unit that needs a batch, or a part of one, for itself; None if there is none.

    Args:
        acting: The units of one adapter at one host.
        host: The host; None for one that the adapter shares with others, such as that of the model.
    """
    if acting.carries or acting.starting:
        return "stream"
    linear, block = host is not None and host_kind(host) is LinearHost, isinstance(host, BlockHost)
    for unit in acting.units():
        if any(getattr(part, "running", ()) for part in unit.modules()):
            return unit.kind  # statistics of a batch, which must be of its own images
        if unit.kind in _ANYWHERE or (linear and unit.kind in _IN_LINEAR):
            continue
        if block and unit.kind == "parallel" and not getattr(unit, "skips", False):
            continue  # but for decisions about the tokens of its block, which are for all terms there
        return unit.kind
    places = [_place(unit) for unit in acting.parallel]
    return None if len(set(places)) == len(places) else "parallel"


def by_rows(actings: Sequence[Acting], routing: Routing) -> Acting:
    """Combine the units that act at one host for each adapter.

    Args:
        actings: The units of each adapter, in the order of `Rows.members`; none of them `unroutable`.
        routing: The route of the model, which knows the adapter of each image.

    Returns:
        The units that act on the whole batch.
    """
    together: dict[str, Any] = {}
    if any(acting.input for acting in actings):
        together["input"] = (_RowInput([acting.input for acting in actings], routing),)
    following: list[tuple[Any, ...]] = [(*acting.sequential, *acting.affine) for acting in actings]
    terms = [acting.delta for acting in actings]
    if any((*following, *terms)):
        together["sequential"] = (_RowOutput(terms, following, routing),)
    places = dict.fromkeys(_place(unit) for acting in actings for unit in acting.parallel)
    if places:
        # Terms that read the sum behind the others come last in each adapter, as in the block.
        lists = [{_place(unit): unit for unit in acting.parallel} for acting in actings]
        together["parallel"] = tuple(_RowParallel([own.get(place) for own in lists], routing) for place in places)
    if any(acting.depth for acting in actings):
        together["depth"] = (_RowDepth([acting.depth for acting in actings], routing),)
    shared = dict.fromkeys(unit for acting in actings for unit in acting.shared)
    return Acting(**together, shared=tuple(shared), grid=any(acting.grid for acting in actings), routed=True)


def _place(unit: ParallelUnit) -> tuple[Any, ...]:
    """Return what terms have in common for which one unit may stand."""
    return unit.place, unit.reads, unit.drops


def _rows(routing: Routing) -> Rows:
    rows = routing.present().rows
    assert rows is not None, "made for a route of rows"
    return rows


def _index(routing: Routing) -> Tensor:
    """Return `Rows.index`, also inside a compiled graph."""
    if in_graph():
        assert routing.traced_index is not None, "made for a route of rows"
        return routing.traced_index
    return _rows(routing).index


def _split(images: int, x: Tensor) -> Tensor:
    """Give the first axis of a tensor, which holds consecutive rows of each image, an axis of images in front."""
    if x.shape[0] % images:
        raise ConfigError(
            f"A layer got {x.shape[0]} rows for a batch of {images} images, so that they cannot be told apart by "
            "image. Run the adapters of these images one after the other."
        )
    return x.unflatten(0, (images, -1))


def _each(routing: Routing, units: Sequence[Any], compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Let the units of each adapter compute on the rows of its images.

    Args:
        routing: The route of the model.
        units: The units of each adapter.
        compute: Takes these and the rows, and gives a tensor of as many rows.
        *tensors: (rows, ...) each.
    """
    if in_graph():
        # Every unit on every row: one graph for all orders of the adapters.
        index = _index(routing)
        images = index.shape[0]
        every = torch.stack([_split(images, compute(own, *tensors)) for own in units])
        return every[index, torch.arange(images, device=index.device)].flatten(0, 1)
    rows = _rows(routing)
    split = [_split(len(rows.names), tensor) for tensor in tensors]
    found = []
    for images_of_one, own in zip(rows.images, units, strict=True):
        out = compute(own, *(tensor[images_of_one].flatten(0, 1) for tensor in split))
        found.append(out.unflatten(0, (len(images_of_one), -1)))
    return torch.cat(found)[rows.order].flatten(0, 1)


class _RowInput(InputUnit):
    """Changes of a layer's input, those of each image's adapter."""

    def __init__(self, units: Sequence[tuple[InputUnit, ...]], routing: Routing) -> None:
        super().__init__()
        self.units, self.routing = tuple(units), routing  # in a tuple, since they belong to their hosts

    def transform_input(self, x: Tensor) -> Tensor:
        def change(units: tuple[InputUnit, ...], x: Tensor) -> Tensor:
            for unit in units:
                x = gained(unit, x, unit.transform_input(x))
            return x

        return _each(self.routing, self.units, change, x)


class _RowOutput(SequentialUnit):
    """Changes of a layer's output, those of each image's adapter: terms, sequential units, scales and shifts."""

    def __init__(
        self,
        terms: Sequence[tuple[DeltaUnit, ...]],
        following: Sequence[tuple[SequentialUnit | AffineUnit, ...]],
        routing: Routing,
    ) -> None:
        super().__init__()
        self.terms, self.following, self.routing = tuple(terms), tuple(following), routing

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if any(self.terms):
            y = _with_terms(self.routing, [terms_of(units) for units in self.terms], x, y)
        return _each(self.routing, self.following, _changed, x, y) if any(self.following) else y


def _changed(units: Sequence[SequentialUnit | AffineUnit], x: Tensor, y: Tensor) -> Tensor:
    for unit in units:
        y = affine_by(unit, y) if isinstance(unit, AffineUnit) else gained(unit, y, unit.after(x, y))
    return y


def _with_terms(routing: Routing, terms: Sequence[Sequence[Branch]], x: Tensor, y: Tensor) -> Tensor:
    """Add the low-rank terms of each image's adapter, ``y += scale * (x A^T) B^T``, to the output of a layer.

    Args:
        routing: The route of the model.
        terms: The terms of each adapter.
        x: The input of the layer, (rows, ..., in).
        y: Its output, (rows, ..., out), which nothing else holds.

    Returns:
        (rows, ..., out).
    """
    if any(term.dropout.share for own in terms for term in own):
        return _each(routing, terms, lambda own, x, y: low_rank_terms(x, y, own), x, y)
    with without_autocast(x):
        index = _index(routing)
        images = index.shape[0]
        first, second = (factor[index] for factor in _stacked(terms, x.shape[-1], y))
        each = _split(images, cast_to(x, y.dtype)).reshape(images, -1, x.shape[-1])
        out = _split(images, y).reshape(images, -1, y.shape[-1])
        # A CPU's BLAS is slower on the other order of a few channels.
        narrow = torch.bmm(first, each.transpose(1, 2)).transpose(1, 2)
        recorded = torch.is_grad_enabled() or in_graph()
        out = torch.baddbmm(out, narrow, second) if recorded else out.baddbmm_(narrow, second)
        return out.view(y.shape)


def _stacked(terms: Sequence[Sequence[Branch]], width: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Stack the terms of each adapter to factors (adapters, rank, in) and (adapters, rank, out), zeros behind them."""
    ranks = [sum(term.a.shape[0] for term in own) for own in terms]
    first, second = [], []
    for own, rank in zip(terms, ranks, strict=True):
        if not own:
            first.append(y.new_zeros(max(ranks), width))
            second.append(y.new_zeros(max(ranks), y.shape[-1]))
            continue
        a = [cast_to(term.a, y.dtype) for term in own]
        b = [_placed(term, y) for term in own]
        first.append(_padded(a[0] if len(a) == 1 else torch.cat(a), (0, 0, 0, max(ranks) - rank)))
        second.append(_padded(b[0] if len(b) == 1 else torch.cat(b), (0, 0, 0, max(ranks) - rank)))
    return torch.stack(first), torch.stack(second)


def _placed(term: Branch, y: Tensor) -> Tensor:
    """Return a second factor with its multiplier, on all output rows of the layer: (rank, out)."""
    b = cast_to(term.b, y.dtype).t()
    b = b if term.scale == 1 else b * term.scale
    return _padded(b, (term.start, y.shape[-1] - term.stop))


def _padded(factor: Tensor, zeros: tuple[int, ...]) -> Tensor:
    return F.pad(factor, zeros) if any(zeros) else factor


class _RowParallel(ParallelUnit):
    """Terms beside a branch of a block, that of each image's adapter; zero for an adapter without one."""

    def __init__(self, units: Sequence[ParallelUnit | None], routing: Routing) -> None:
        super().__init__()
        self.units, self.routing = tuple(units), routing
        first = next(unit for unit in units if unit is not None)
        self.place, self.reads, self.drops = first.place, first.reads, first.drops
        self.needs_grid = any(unit is not None and unit.needs_grid for unit in units)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        def term(unit: ParallelUnit | None, x: Tensor) -> Tensor:
            if unit is None:
                return torch.zeros_like(x)
            out = unit.branch(x, grid, prefix)
            return (out if unit.gain is None else unit.gain.mul(out)).to(x.dtype)

        return _each(self.routing, self.units, term, x)


class _RowDepth(DepthUnit):
    """Rates of stochastic depth, that of each image's adapter."""

    def __init__(self, units: Sequence[tuple[DepthUnit, ...]], routing: Routing) -> None:
        Unit.__init__(self)
        self.units, self.routing = tuple(units), routing

    @property
    def training(self) -> bool:
        """Whether an adapter drops branches at present."""
        return any(unit.training for units in self.__dict__.get("units", ()) for unit in units)

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignore the mode, which is that of the units."""

    @property
    def rate(self) -> Tensor:  # type: ignore[override]
        """The rate of each image, (B,)."""
        rows = _rows(self.routing)
        rates = [max((float(unit.rate) for unit in units if unit.training), default=0.0) for units in self.units]
        return torch.tensor(rates, device=rows.index.device)[rows.index]
