"""The method that holds the result of a composition: LoRA, a sparse change, or copies of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor

from vispeft.adapters.holder import BankState
from vispeft.compose.low_rank import Term, pad
from vispeft.core.method import Method, method
from vispeft.core.plan import Plan, make_plan
from vispeft.core.sites import Site
from vispeft.errors import ConfigError

__all__ = ["Carrier", "carry_tensors", "carry_terms"]

SPARSE = 0.5
"""Largest share of entries that are not zero of a change that is stored as a sparse one: an entry and its place take
about 5 bytes, an entry of a whole tensor 4."""


@dataclass(frozen=True)
class Carrier:
    """A method and the tensors of its units, as `AdapterBank.load_state_dict` takes them."""

    method: Method
    """The method."""
    tensors: dict[str, Tensor]
    """Tensors by their names in files."""


def carry_terms(bank: BankState, terms: Mapping[Site, Term]) -> Carrier:
    """Hold low-rank terms as LoRA; sites that its roles and blocks reach beside them get zeros.

    Args:
        bank: The bank of the model.
        terms: The terms by site; without any, the carrier is a linear probe.
    """
    if not terms:
        return Carrier(method("linear_probe"), {})
    rank = max(1, *(term.rank for term in terms.values()))
    roles, blocks = _places(list(terms))
    # Factors with a multiplier of 1.
    config = method("lora", rank=rank, alpha=float(rank), roles=roles, blocks=blocks)
    plan = make_plan(config, bank._outer)
    by_key = {site.key: term for site, term in terms.items()}
    found: dict[str, Tensor] = {}
    for item in plan:
        shapes = item.shapes()
        term = by_key.get(item.site.key)
        a, b = (
            (torch.zeros(shape, dtype=torch.float64) for shape in shapes.values()) if term is None else pad(term, rank)
        )
        found |= {f"{item.key}.A": a, f"{item.key}.B": b}
    return Carrier(config, found)


def _places(sites: list[Site]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return roles and blocks that reach sites; None for the whole model."""
    roles = tuple(dict.fromkeys(site.role for site in sites))
    blocks = {site.block for site in sites}
    return roles, None if None in blocks else tuple(sorted(cast("set[int]", blocks)))


def carry_tensors(bank: BankState, changes: Mapping[str, Tensor]) -> Carrier:
    """Hold changes of tensors: as a sparse change if most entries are zero, else as copies of the changed tensors.

    Args:
        bank: The bank of the model.
        changes: ``W' - W`` by state-dict name.

    Raises:
        ConfigError: If the base lacks a tensor.
    """
    if not changes:
        return carry_terms(bank, {})
    sites = {f"{s.path}.weight": s for s in bank.view.sites if s.rows is None and s.kind in ("linear", "conv")}
    if set(changes) <= set(sites):
        # Half an entry more, so that rounding the budget down cannot lose one.
        share = max((int(change.count_nonzero()) + 0.5) / change.numel() for change in changes.values())
        if 0 < share <= SPARSE:
            return _sparse(bank, {sites[key]: change for key, change in changes.items()}, share)
    return _copies(bank, changes)


def _sparse(bank: BankState, changes: Mapping[Site, Tensor], share: float) -> Carrier:
    """Hold changes of few entries; layers with fewer than the share keep further entries, at zero."""
    roles, blocks = _places(list(changes))
    config = method("sparse", budget=share, support="given", roles=roles, blocks=blocks)
    by_key = {site.key: change for site, change in changes.items()}
    found: dict[str, Tensor] = {}
    for item in make_plan(config, bank._outer):
        count = prod(item.shapes()["values"])
        change = by_key.get(item.site.key, torch.zeros(item.site.out_features, item.site.columns)).flatten()
        places = (change != 0).float().topk(count).indices.sort().values
        found |= {f"{item.key}.values": change[places], f"{item.key}.positions": places.to(torch.int32)}
    return Carrier(config, found)


def _copies(bank: BankState, changes: Mapping[str, Tensor]) -> Carrier:
    """Hold copies of the tensors, changed, and of those that stand at the same places."""
    base = dict(bank.base_tensors())
    lacking = [key for key in changes if key not in base]
    if lacking:
        raise ConfigError(
            f"The result needs {lacking[0]}, which this backbone has not, so no copy of its tensors can hold it. Merge "
            "the adapters into a plain model instead: bank.merge()."
        )
    plan = _plan_of_copies(bank, set(changes))
    found: dict[str, Tensor] = {}
    for item in plan:
        for name in item.shapes():
            key = f"{item.site.path}.{name}" if item.site.path else name
            value = base[key].detach()
            change = changes.get(key)
            wide = torch.promote_types(value.dtype, torch.float32)
            found[f"{item.key}.{name}"] = value.to(wide) if change is None else (value.double() + change).to(wide)
    return Carrier(plan.method, found)


def _plan_of_copies(bank: BankState, names: set[str]) -> Plan:
    """Plan copies of as few tensors as roles and blocks allow, among them those that are named."""
    paths = {name.rpartition(".")[0] for name in names}
    layers = {s.path: s for s in reversed(bank.view.sites) if s.rows is None and s.kind in ("linear", "conv", "norm")}
    whole = make_plan(method("full"), bank._outer)
    if not paths <= set(layers):
        return whole
    roles, blocks = _places([layers[path] for path in sorted(paths)])
    plan = make_plan(method("full", roles=roles, blocks=blocks), bank._outer)
    held = {f"{item.site.path}.{name}" for item in plan for name in item.shapes()}
    return plan if names <= held else whole
