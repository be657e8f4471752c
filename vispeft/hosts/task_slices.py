"""Units of several tasks that act in one pass, each on its part of the batch.

A batch that holds the same images once per task, one task after the other, passes through the backbone once. Units of
all tasks stay as they are. Where tasks have units of their own, one unit stands for all of these: it cuts its input
along the first axis, and each task's unit acts on its part. This needs units that act on images independently and that
leave the tensors of the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from vispeft.core.route import Acting
from vispeft.core.units import AffineUnit, DeltaUnit, InputUnit, ParallelUnit, SequentialUnit, Unit
from vispeft.errors import ConfigError
from vispeft.hosts.base import Host, host_kind
from vispeft.hosts.layers import LinearHost, affine_by, gained, terms_of
from vispeft.hosts.low_rank import low_rank_terms

__all__ = ["sliced", "unsliceable"]

_FLAGS = ("lone", "scaling", "carries", "grid", "starting", "routed")
_KINDS = tuple(name for name in Acting._fields if name not in _FLAGS)
_IN_LINEAR = ("input", "delta", "sequential", "affine")
"""The kinds of units that change inputs and outputs of a linear layer, row by row."""


def unsliceable(actings: Sequence[Acting], host: Host | None) -> Unit | None:
    """Find a unit that cannot act on a part of a batch.

    Args:
        actings: The units that act at one host, for each task.
        host: The host; None for one without units of a task.

    Returns:
        The first such unit; None if there is none.
    """
    linear = host is not None and host_kind(host) is LinearHost
    for kind, lists in _differing(actings):
        known = kind in ("shared", "parallel") or (linear and kind in _IN_LINEAR)
        if not known or len({len(units) for units in lists}) > 1:
            found: Unit = next(chain.from_iterable(lists))
            return found
    return None


def sliced(actings: Sequence[Acting]) -> Acting:
    """Combine the units that act at one host for each task.

    Args:
        actings: The units, for each task in the order of the parts of the batch; none of them `unsliceable`.

    Returns:
        The units that act on the whole batch.
    """
    first = actings[0]
    changed: dict[str, tuple[Any, ...]] = {}
    for kind, lists in _differing(actings):
        if kind == "shared":  # they hold tensors and do not act
            changed[kind] = tuple(dict.fromkeys(chain.from_iterable(lists)))
        else:
            changed[kind] = tuple(_together(kind, units) for units in zip(*lists, strict=True))
    # A layer computes terms, sequential units, scales and shifts in this order; one kind has a form for parts.
    alike = not changed
    delta, affine = changed.pop("delta", ()), changed.pop("affine", ())
    following = (*delta, *changed.pop("sequential", first.sequential), *affine)
    return first._replace(
        **cast("dict[str, Any]", changed),
        lone=first.lone if alike else None,
        scaling=first.scaling if alike else None,
        sequential=following,
        delta=() if delta else first.delta,
        affine=() if affine else first.affine,
        carries=any(acting.carries for acting in actings),
        grid=any(acting.grid for acting in actings),
    )


def _differing(actings: Sequence[Acting]) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Iterate over the kinds of which tasks have units of their own, with the units of each task."""
    for kind in _KINDS:
        lists = [getattr(acting, kind) for acting in actings]
        if any(units != lists[0] for units in lists):
            yield kind, lists


def _together(kind: str, units: Sequence[Any]) -> Unit:
    """Make the unit that stands for those of all tasks."""
    if kind == "parallel":
        return units[0] if all(unit is units[0] for unit in units) else _SlicedParallel(units)
    return _SlicedInput(units) if kind == "input" else _SlicedOutput(units)


def _by_part(units: Sequence[Any], compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Let each unit compute on its part of tensors (parts x images, ...)."""
    count = len(units)
    if tensors[0].shape[0] % count:
        raise ConfigError(
            f"Units of {count} tasks were to act on their parts of a batch of {tensors[0].shape[0]}. Repeat the images "
            "once for each task, one task after the other."
        )
    parts = zip(*(tensor.chunk(count) for tensor in tensors), strict=True)
    return torch.cat([compute(unit, *part) for unit, part in zip(units, parts, strict=True)])


class _SlicedInput(InputUnit):
    """Changes of a layer's input, one for each part of the batch."""

    def __init__(self, units: Sequence[InputUnit]) -> None:
        super().__init__()
        self.units = tuple(units)  # in a tuple, since they belong to their hosts

    def transform_input(self, x: Tensor) -> Tensor:
        return _by_part(self.units, lambda unit, part: gained(unit, part, unit.transform_input(part)), x)


class _SlicedOutput(SequentialUnit):
    """Changes of a layer's output, one for each part of the batch: terms, sequential units, scales and shifts."""

    def __init__(self, units: Sequence[DeltaUnit | SequentialUnit | AffineUnit]) -> None:
        super().__init__()
        self.units = tuple(units)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return _by_part(self.units, _changed_output, x, y)


class _SlicedParallel(ParallelUnit):
    """Terms beside a branch of a block, one for each part of the batch."""

    def __init__(self, units: Sequence[ParallelUnit]) -> None:
        super().__init__()
        self.units, first = tuple(units), units[0]
        self.place, self.reads, self.drops, self.needs_grid = first.place, first.reads, first.drops, first.needs_grid
        self.skips = first.skips

    def passes(self, x: Tensor, prefix: int) -> Tensor:
        return _by_part(self.units, lambda unit, part: unit.passes(part, prefix), x)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        def term(unit: ParallelUnit, part: Tensor) -> Tensor:
            out = unit.branch(part, grid, prefix)
            return out if unit.gain is None else unit.gain.mul(out)

        return _by_part(self.units, term, x)


def _changed_output(unit: DeltaUnit | SequentialUnit | AffineUnit, x: Tensor, y: Tensor) -> Tensor:
    """Compute the output of a layer that a unit changes."""
    if isinstance(unit, DeltaUnit):
        return low_rank_terms(x, y, terms_of((unit,)))
    return affine_by(unit, y) if isinstance(unit, AffineUnit) else gained(unit, y, unit.after(x, y))
