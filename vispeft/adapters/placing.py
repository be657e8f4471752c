"""Building the units of a new adapter and placing them on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from vispeft.adapters.entry import Entry, Placed
from vispeft.core.families import base_class, frozen_tensor
from vispeft.core.method import PlanItem
from vispeft.core.route import Routing
from vispeft.core.sites import View
from vispeft.core.units import DeltaUnit, DepthUnit, Unit
from vispeft.errors import ConfigError
from vispeft.hosts.base import Host, check_plain, ensure_host
from vispeft.hosts.choose import carrying_host, host_for, owner_host
from vispeft.hosts.depth import DropPathHost, depth_rates
from vispeft.hosts.layers import ConvHost
from vispeft.hosts.model import HEADS, UNITS
from vispeft.storage.codecs import find_codec

__all__ = ["build_units", "check_base", "place_items", "place_units"]


def check_base(model: nn.Module, head_path: str | None) -> None:
    """Refuse a backbone of which PyTorch parametrises tensors; units and classifiers may be of that kind.

    Args:
        model: The timm model, with adapters or without.
        head_path: The path of its classifier; None where it has none.

    Raises:
        SiteError: If it is one.
    """
    for path, module in model.named_modules():
        if path != head_path and not {UNITS, HEADS}.intersection(path.split(".")):
            check_plain(module, repr(path))


@torch.no_grad()
def build_units(
    items: Iterable[PlanItem], model: nn.Module, seed: int | None, present: Mapping[str, Unit] | None = None
) -> dict[str, Unit]:
    """Build the units of a plan's items; each reads the frozen weight of its site.

    Args:
        items: The items.
        model: The timm model.
        seed: Seed of the initial values; None for units to be loaded from a file.
        present: Units that the adapter has already, by key; they may lend.

    Returns:
        Units by key.

    Raises:
        ConfigError: If a term with dropout is to act at a convolution.
    """
    reference = next(model.parameters())
    # Adapters of a half-precision base stay in float32, or their small updates would be rounded away.
    dtype = reference.dtype if reference.dtype in (torch.float32, torch.float64) else torch.float32
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    units: dict[str, Unit] = {}
    for item in items:
        unit = item.build()
        if item.lender is not None:
            unit.borrow({**(present or {}), **units}[item.lender])
        weight = frozen_tensor(model.get_submodule(item.site.path), "weight")
        if weight is not None:
            rows = item.site.rows
            unit.prepare(weight.detach() if rows is None else weight.detach()[rows.start : rows.stop])
        if generator is not None:
            _check_dropout(item, model, unit)
            unit.reset(generator)
            for name, value in ({} if item.start is None else item.start()).items():
                unit.get_parameter(name).copy_(value)
        for codec in unit.codecs().values():
            find_codec(codec)  # fail now rather than on saving, after training
        units[item.key] = unit.to(device=reference.device, dtype=dtype).train(model.training)
    return units


def _check_dropout(item: PlanItem, model: nn.Module, unit: Unit) -> None:
    """Refuse dropout of a new term at a convolution. Those of files may have it: it does nothing in prediction."""
    if not isinstance(unit, DeltaUnit) or not unit.dropout.share:
        return
    module = model.get_submodule(item.site.path)
    if host_for(item.site, module, unit)[0] is ConvHost:
        raise ConfigError(
            f"dropout={unit.dropout.share:g} was asked for, and {item.site.path!r} ({item.site.role}) is a "
            f"{base_class(module).__name__}: terms are added to the weight of a convolution, where there is no input "
            "to drop from. Set dropout=0, or leave this role out and attach it as an adapter of its own."
        )


def place_units(entry: Entry, name: str, model: nn.Module, view: View, routing: Routing) -> None:
    """Put all units of a new adapter at their hosts, and set the rates of stochastic depth.

    Args:
        entry: The adapter.
        name: Its name.
        model: The timm model.
        view: Its description.
        routing: Its route.

    Raises:
        SiteError: If no host carries a unit.
    """
    place_items(entry, name, entry.plan.items, model, view, routing)
    _place_depth(entry, name, model, view, routing)
    _tidy(entry, name, model)


def place_items(
    entry: Entry, name: str, items: Sequence[PlanItem], model: nn.Module, view: View, routing: Routing
) -> None:
    """Put units at their hosts. All hosts are chosen before any module changes, so that an error changes nothing.

    Args:
        entry: The adapter.
        name: Its name.
        items: The items of its plan whose units to place.
        model: The timm model.
        view: Its description.
        routing: Its route.

    Raises:
        SiteError: If no host carries a unit.
    """
    chosen = [host_for(i.site, model.get_submodule(i.site.path), entry.units[i.key]) for i in items]
    carrying = [(module, carrying_host(module)) for module in _carriers(entry, items, model, view)]
    owner, biases = owner_host()
    for item, (kind, computed) in zip(items, chosen, strict=True):
        host = _host(entry, model.get_submodule(item.site.path), kind, computed, routing=routing)
        _slots(host, name)[item.slot] = entry.units[item.key]
        entry.placed.append(Placed(host, entry.units[item.key], item.task))
        if item.site.owner is not None:
            _host(entry, model.get_submodule(item.site.owner), owner, biases, routing=routing)
    for module, kind in carrying:
        host = _host(entry, module, kind, routing=routing)
        host.carried |= {name}
        entry.carriers.append(host)
    _tidy(entry, name, model)


def _tidy(entry: Entry, name: str, model: nn.Module) -> None:
    """List each host once, and let the containers of units follow the model's mode."""
    entry.hosts = list(dict.fromkeys(entry.hosts))
    for host in entry.hosts:
        _slots(host, name).training = host.adapters.training = model.training


def _place_depth(entry: Entry, name: str, model: nn.Module, view: View, routing: Routing) -> None:
    """Set the method's rates at the drop-path modules."""
    rate = entry.method.stochastic_depth()
    if rate <= 0:
        return
    device = next(model.parameters()).device
    for paths, own in zip(view.drop_path_paths, depth_rates(view.depth, rate), strict=True):
        for path in paths:
            host = _host(entry, model.get_submodule(path), DropPathHost, routing=routing)
            unit = DepthUnit(own).to(device).train(model.training)
            _slots(host, name)["depth"] = unit
            entry.placed.append(Placed(host, unit))


def _carriers(entry: Entry, items: Sequence[PlanItem], model: nn.Module, view: View) -> list[nn.Module]:
    """List the blocks, attention modules and MLPs that streams of an adapter pass through or start in."""
    sites = []
    for item in items:
        unit = entry.units[item.key]
        if unit.kind == "branch":
            sites += [site for site in view.at("block", "attn", "mlp") if site.block == item.site.block]
        elif unit.makes_streams(view.layout):
            sites += list(view.at("block", "attn"))
    return [model.get_submodule(path) for path in dict.fromkeys(site.path for site in sites)]


def _host(
    entry: Entry, module: nn.Module, kind: type[Host], computed: tuple[str, ...] = (), *, routing: Routing
) -> Host:
    """Make a module a host and note it at once, so that an error behind it can be rolled back."""
    host = ensure_host(module, kind, computed, routing=routing)
    entry.hosts.append(host)
    return host


def _slots(host: Host, name: str) -> nn.ModuleDict:
    if name not in host.adapters:
        host.adapters[name] = nn.ModuleDict()
    return cast(nn.ModuleDict, host.adapters[name])
