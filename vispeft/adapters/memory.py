"""The hosts that a choice of memory needs besides those that carry units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.core.families import base_class
from vispeft.core.origin import Memory
from vispeft.core.route import Routing
from vispeft.core.sites import Site, View
from vispeft.hosts.activations import ELEMENTWISE, ActivationHost
from vispeft.hosts.base import Host, ensure_host
from vispeft.hosts.layers import LinearHost, NormHost

__all__ = ["left_alone", "place_memory"]


def place_memory(model: nn.Module, view: View, routing: Routing, entries: Iterable[Entry]) -> list[Host]:
    """Make hosts of norms, activations and first layers of MLPs whose outputs are computed again.

    Args:
        model: The timm model.
        view: Its description.
        routing: Its route, which holds the choice.
        entries: Its adapters.

    Returns:
        These hosts, which need not carry units.
    """
    wanted = dict(_wanted(model, view, routing.memory, list(entries)))
    return [ensure_host(model.get_submodule(path), kind, routing=routing) for path, kind in wanted.items()]


def _wanted(model: nn.Module, view: View, memory: Memory, entries: list[Entry]) -> Iterator[tuple[str, type[Host]]]:
    """Iterate over paths and kinds of hosts."""
    if memory == "plain" or not entries:
        return
    paths = {id(module): path for path, module in model.named_modules()}
    reading = {paths[id(p.host)] for entry in entries for p in entry.placed if p.unit.kind == "delta"}
    for site in view.sites:
        if site.role in ("norm1", "norm2") and isinstance(model.get_submodule(site.path), nn.LayerNorm):
            served = memory == "leaner" and site.role == "norm2" and site.consumers
            if served or reading.intersection(site.consumers):
                yield site.path, NormHost
        elif site.role == "mlp.act" and _is_served(model, view, site):
            if memory == "leaner":
                yield _beside(site, "fc1"), LinearHost
            if memory == "leaner" or _beside(site, "fc2") in reading:
                yield site.path, ActivationHost


def left_alone(model: nn.Module, view: View) -> list[str]:
    """List the activations of MLPs that ``leaner`` does not serve: of gated MLPs, and unusual ones.

    Args:
        model: The timm model.
        view: Its description.
    """
    return [site.path for site in view.at("mlp.act") if not _is_served(model, view, site)]


def _is_served(model: nn.Module, view: View, site: Site) -> bool:
    """Return whether an activation is element by element, and follows one whole layer alone."""
    module = model.get_submodule(site.path)
    if base_class(module).__name__ not in ELEMENTWISE or getattr(module, "inplace", False):
        return False
    first = _beside(site, "fc1")
    roles = [found.role for found in view.sites if found.path == first]
    return roles == ["mlp.fc1"]


def _beside(site: Site, name: str) -> str:
    """Return the path of a layer of the same MLP."""
    return f"{site.path.rpartition('.')[0]}.{name}"
