"""Units whose contribution is multiplied by a weight, for adapters that act together in a weighted stack."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from vispeft.core.units import Unit
from vispeft.errors import ConfigError

__all__ = ["weighted"]

WEIGHTED = frozenset({"selection", "weight", "input", "delta", "sequential", "affine", "parallel"})
"""The kinds whose contribution is a difference, which a gain multiplies."""
SILENT = frozenset({"shared", "depth"})
"""The kinds that contribute nothing themselves."""


def weighted(unit: Unit, weight: float) -> Unit:
    """Return a unit that is the given one, its contribution multiplied by a weight.

    Both share all of their state, later changes included; only the gain differs.

    Args:
        unit: The unit.
        weight: The multiplier.

    Raises:
        ConfigError: If its contribution is no difference that can be multiplied.
    """
    if weight == 1 or unit.kind in SILENT:
        return unit
    decides = getattr(unit, "skips", False)
    if unit.kind not in WEIGHTED or decides:
        what = "units that decide which tokens pass" if decides else f"units of kind {unit.kind!r}"
        raise ConfigError(
            f"A weight of {weight:g} was asked for, and the adapter has {what}, whose contribution is no difference "
            "that a weight could multiply. Give this adapter the weight 1."
        )
    unit.__dict__[_OWN] = unit  # what copies and pickles refer to
    found = object.__new__(_class_of(type(unit), float(weight)))
    found.__dict__ = unit.__dict__
    return found


_OWN = "_unweighted_unit"
_classes: dict[tuple[type[Unit], float], type[Unit]] = {}
"""One class for each kind and weight, so that equal layers share a compiled graph."""


def _class_of(kind: type[Unit], weight: float) -> type[Unit]:
    """Return the class of a kind's units with a weight."""
    if (kind, weight) not in _classes:
        _classes[kind, weight] = _make_class(kind, weight)
    return _classes[kind, weight]


def _make_class(kind: type[Unit], weight: float) -> type[Unit]:
    """Make such a class: its gain is the unit's own one times the weight."""

    def gain(unit: Any) -> Tensor:
        own = unit._buffers["gain"]
        if own is not None:
            return cast(Tensor, own * weight)
        tensors = chain(unit.parameters(), unit.buffers())
        like = next(tensors, None)
        return torch.tensor(weight) if like is None else torch.full((), weight, dtype=like.dtype, device=like.device)

    def reduced(unit: Any, protocol: Any) -> tuple[Any, ...]:
        return weighted, (unit.__dict__[_OWN], weight)

    own = {"gain": property(gain), "is_one_term": False, "__reduce_ex__": reduced, "unweighted": kind}
    return type(f"Weighted{kind.__name__}", (kind,), own)
