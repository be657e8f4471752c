"""The hosts that a choice of memory needs besides those that carry units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.core.families import base_class
from vispeft.core.origin import Memory
from vispeft.core.route import Routing
from vispeft.core.sites import View
from vispeft.hosts.activations import ELEMENTWISE, ActivationHost
from vispeft.hosts.base import Host, ensure_host
from vispeft.hosts.layers import LinearHost, NormHost

__all__ = ["place_memory"]


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
        elif site.role == "mlp.act" and base_class(model.get_submodule(site.path)).__name__ in ELEMENTWISE:
            first, second = (f"{site.path.rpartition('.')[0]}.{name}" for name in ("fc1", "fc2"))
            if memory == "leaner" and _is_plain(view, first):
                yield first, LinearHost
                yield site.path, ActivationHost
            elif second in reading:
                yield site.path, ActivationHost


def _is_plain(view: View, path: str) -> bool:
    """Return whether a first layer is followed by the activation alone."""
    return any(site.path == path and site.role == "mlp.fc1" for site in view.sites) and not any(
        site.path == path and site.rows is not None for site in view.sites
    )
