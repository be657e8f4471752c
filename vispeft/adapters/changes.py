"""What an adapter changes: the difference ``W' - W`` of each tensor, and the factors where it is of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.holder import BankState
from vispeft.adapters.merge import plan_merge
from vispeft.compose.low_rank import Term
from vispeft.core.modes import evaluating
from vispeft.core.sites import Site
from vispeft.core.units import DeltaUnit, Unit, WeightUnit
from vispeft.errors import ConfigError, MergeError
from vispeft.hosts.layers import BIASES
from vispeft.hosts.token_merging import without_merging

__all__ = ["Change", "Class", "class_of", "read_change"]

Class = Literal["additive", "dependent"]
"""Whether a change is the same on any frozen weight, or computed from it (DoRA, masks, scale and shift)."""


@dataclass(frozen=True)
class Change:
    """The change that one adapter makes to the frozen weights."""

    kind: Class
    """Its class of composition."""
    terms: dict[Site, Term] | None = None
    """Its low-rank terms by site, with their multipliers in B; None if it has other changes."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """``W' - W`` by state-dict name, where it has no terms."""


@torch.no_grad()
def read_change(bank: BankState, name: str) -> Change:
    """Read the change that an adapter makes.

    Args:
        bank: The bank of the model.
        name: The adapter, which must act alone under the present route.

    Returns:
        Its terms, or its change of each tensor.

    Raises:
        ConfigError: If it has tasks, or is no change of weights (prompts, bottlenecks, side networks).
    """
    entry = bank._entries[name]
    if entry.tasks is not None:
        raise ConfigError(
            f"Adapter {name!r} has tasks ({', '.join(entry.tasks)}), and changes of weights of one task each cannot be "
            "told apart in a sum. Attach one adapter for each task."
        )
    with evaluating(bank.model):
        terms = _terms(entry)
        if terms is not None:
            return Change("additive", terms=terms)
        return Change(class_of(entry, bank.model), tensors=_differences(bank, name, entry))


def _terms(entry: Entry) -> dict[Site, Term] | None:
    """Return the terms of an adapter that consists of low-rank terms; None for any other."""
    acting = {key: unit for key, unit in entry.units.items() if unit.kind not in ("shared", "depth")}
    if not all(isinstance(u, DeltaUnit) and type(u).fold_weight is DeltaUnit.fold_weight for u in acting.values()):
        return None
    found = {}
    for item in entry.plan:
        unit = acting.get(item.key)
        if unit is None:
            continue
        a, b = cast(DeltaUnit, unit).factors()
        gain = 1.0 if unit.gain is None else float(unit.gain)
        found[item.site] = Term(_wide(a.detach()), _wide(b.detach()) * cast(DeltaUnit, unit).scale * gain)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.double()


def _differences(bank: BankState, name: str, entry: Entry) -> dict[str, Tensor]:
    """Compute ``W' - W`` of every tensor that merging would write."""
    try:
        with without_merging(bank._routing):
            merged, stays = plan_merge(bank.model, bank.view, partial=True)
    except MergeError as error:
        raise ConfigError(f"Adapter {name!r} cannot be added or averaged: {error}") from error
    if stays:
        path, reason = next(iter(stays.items()))
        raise ConfigError(
            f"Adapter {name!r} ({entry.method.name}) is no change of weights, so it cannot be added or averaged: "
            f"{path or 'the model'}: {reason}. Let it act with others: bank.stack([...])."
        )
    base = dict(bank.base_tensors())
    found: dict[str, Tensor] = {}
    for key, value in merged.items():
        if value is None:
            continue
        before = base.get(key)
        own = _separate_biases(bank.model, key, merged) if before is None else before
        change = value if own is None else value - own.detach().double()
        if not change.any():
            continue  # merging writes both tensors of a layer, also where one changes
        found[key] = change.to(torch.float64 if before is not None and before.dtype == torch.float64 else torch.float32)
    return found


def _separate_biases(model: nn.Module, key: str, merged: Mapping[str, Tensor | None]) -> Tensor | None:
    """Return the bias of a projection that the attention module holds in three parts, where merging joins them."""
    owner = key.rpartition(".")[0].rpartition(".")[0]
    if not key.endswith(".qkv.bias") or f"{owner}.{BIASES[0]}" not in merged:
        return None
    module = model.get_submodule(owner)
    parts = [{**module._parameters, **module._buffers}.get(bias) for bias in BIASES]
    return torch.cat([part for part in parts if part is not None])


@torch.no_grad()
def class_of(entry: Entry, model: nn.Module) -> Class:
    """Find whether an adapter's change is a term that does not depend on the frozen weights.

    A unit that changes weights is tried on a shifted weight: a term that is added stays what it is.

    Args:
        entry: The adapter, whose units are changes of weights.
        model: Its model.
    """
    tried: set[type[Unit]] = set()
    for item in entry.plan:
        unit = entry.units[item.key]
        if unit.kind in ("shared", "depth", "delta") or type(unit) in tried:
            continue
        tried.add(type(unit))
        if not isinstance(unit, WeightUnit):
            return "dependent"
        weight = cast(Tensor, model.get_submodule(item.site.path).weight).detach().flatten(1).double()
        shift = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device).view_as(weight)
        added, moved = unit.fold_weight(weight) - weight, unit.fold_weight(weight + shift) - weight - shift
        if not torch.allclose(added, moved, rtol=1e-6, atol=1e-9 + 1e-6 * float(added.abs().max())):
            return "dependent"
    return "additive"
