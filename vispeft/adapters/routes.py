"""Building the route of a choice of adapters, and refusing adapters that cannot act together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.heads import HeadRack
from vispeft.core.route import NOTHING, Acting, Route, acting
from vispeft.core.units import Unit
from vispeft.core.weighted import weighted
from vispeft.errors import ConfigError, SiteError, UnknownNameError
from vispeft.hosts.task_slices import sliced, unsliceable

__all__ = ["make_route", "make_shared_route", "recent"]

K = TypeVar("K")
KEPT = 128
"""Number of routes of one kind that are kept; of 24 adapters there are 735471 sets of eight alone."""
Entries = Mapping[str, Entry]


def make_route(
    entries: Entries,
    heads: HeadRack,
    slot: int,
    names: tuple[str, ...],
    task: str | None,
    weights: tuple[float, ...] = (),
) -> Route:
    """Build the route of a choice of adapters.

    Args:
        entries: The adapters of the model, by name.
        heads: Their classifiers.
        slot: Slot number of the model's own host.
        names: The adapters that act, in order.
        task: The task; None for no task.
        weights: Multipliers of their contributions; empty for 1.

    Raises:
        UnknownNameError: If there is no such adapter, or it has no such task.
        ConfigError: If an adapter is named twice, or a contribution cannot be multiplied.
        SiteError: If two adapters cannot act together.
    """
    _check_names(entries, names)
    refusal = _check_task(entries, names, task)
    _check_beside(entries, names)
    _check_selections(entries, names)
    _check_branches(entries, names)
    units: dict[int, list[Unit]] = {}
    carries: set[int] = set()
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        for place, unit in entries[name].acting(task):
            units.setdefault(place, []).append(weighted(unit, weight))
        carries |= {host.slot for host in entries[name].carriers}
    grids = {place for place, found in units.items() if any(getattr(unit, "needs_grid", False) for unit in found)}
    for places in (carries, grids):
        if places:
            places.add(slot)
    branching = [unit for found in units.values() for unit in found if unit.kind == "branch"]
    starting = {stream.name: stream for unit in branching for stream in unit.streams()}
    hosts: dict[int, Acting] = {
        place: acting(
            units.get(place, ()), place in carries, place in grids, starting.values() if place == slot else ()
        )
        for place in {**units, **dict.fromkeys(carries | grids)}
    }
    owner = next((name for name in reversed(names) if heads.get(name) is not None), None)
    _check_width(entries, names, owner, heads.base if owner is None else heads.get(owner))
    head = None if owner is None else heads.get(owner)
    return Route(names, task, hosts, head, owner, refusal, weights)


def make_shared_route(entries: Entries, routes: Sequence[Route]) -> Route:
    """Build the route of one pass for several tasks, each of which has a part of the batch.

    Args:
        entries: The adapters of the model, by name.
        routes: The routes of the tasks, in the order of their parts.

    Raises:
        ConfigError: If a task has a unit that cannot act on a part of a batch.
    """
    names = routes[0].names
    hosts = {placed.host.slot: placed.host for name in names for placed in entries[name].placed}
    shared: dict[int, Acting] = {}
    for slot in dict.fromkeys(slot for route in routes for slot in route.hosts):
        actings = [route.hosts.get(slot, NOTHING) for route in routes]
        unit = unsliceable(actings, hosts.get(slot))
        if unit is not None:
            holding = (name for name in names if any(unit in own.modules() for own in entries[name].units.values()))
            name = next(holding)
            raise ConfigError(
                f"The tasks of adapter {name!r} cannot pass the backbone in one batch: {entries[name].method.name!r} "
                f"has units of kind {unit.kind!r} for each task at a {hosts[slot].replaces.__name__}, which act on "
                "whole batches. Run one task per pass (batched=False)."
            )
        shared[slot] = sliced(actings)
    return Route(names, None, shared, routes[0].head, routes[0].owner)


def recent(held: dict[K, Route], key: K, make: Callable[[], Route]) -> Route:
    """Return the route that is held for a key, or make it. The `KEPT` ones that were used last are held.

    Args:
        held: Routes by key, the one used last at the end; changed in place, by several threads without a lock.
        key: The key.
        make: Makes the route.
    """
    found = held.pop(key, None)
    found = make() if found is None else found
    held[key] = found
    if len(held) > KEPT:
        for oldest in list(held)[:-KEPT]:
            held.pop(oldest, None)
    return found


def _check_names(entries: Entries, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"An adapter was asked for by {name!r}; names are text, such as 'default'.")
        if name not in entries:
            raise UnknownNameError("adapter", name, entries)
    if len(set(names)) < len(names):
        raise ConfigError(f"An adapter was named twice: {', '.join(names)}.")


def _check_task(entries: Entries, names: tuple[str, ...], task: str | None) -> str | None:
    """Raise on an unknown task; return the error message of a forward pass if a needed task is missing."""
    tasks = {name: entries[name].tasks or () for name in names if entries[name].tasks}
    if task is not None and not tasks:
        raise UnknownNameError("task", task, ())
    for name, known in tasks.items():
        if task is not None and task not in known:
            raise UnknownNameError(f"task of adapter {name!r}", task, known)
    choosing = [name for name in tasks if not entries[name].method.one_pass]
    if task is not None or not choosing:
        return None
    name, known = choosing[0], tasks[choosing[0]]
    return (
        f"Adapter {name!r} has tasks ({', '.join(known)}), and none was chosen. Run the model in a block "
        f"`with bank.using({name!r}, task={known[0]!r})`, or call set_active({name!r}, task={known[0]!r})."
    )


def _check_selections(entries: Entries, names: tuple[str, ...]) -> None:
    """Raise if two adapters replace the same tensor of the base."""
    owners: dict[str, str] = {}
    for name in names:
        for entry in entries[name].tensors():
            if entry.unit.kind != "selection":
                continue
            tensor = f"{entry.key.split('/', 1)[0]}.{entry.name}"
            if owners.get(tensor, name) != name:
                raise SiteError(
                    f"Adapters {owners[tensor]!r} and {name!r} both replace {tensor}; only one of them can act. "
                    "Activate one, or merge one first."
                )
            owners[tensor] = name


def _check_branches(entries: Entries, names: tuple[str, ...]) -> None:
    """Raise if two adapters branch for the same task."""
    owners: dict[str, str] = {}
    for name in names:
        branching = [unit for unit in entries[name].units.values() if unit.kind == "branch"]
        for stream in (stream for unit in branching for stream in unit.streams()):
            if owners.setdefault(stream.name, name) != name:
                raise SiteError(
                    f"Adapters {owners[stream.name]!r} and {name!r} both branch for the task {stream.name!r}; only one "
                    "of them can act. Activate one, or rename a task with rename_task."
                )


def _check_beside(entries: Entries, names: tuple[str, ...]) -> None:
    """Raise if a network beside the backbone acts with adapters that it would replace or cut off from gradients."""
    beside: dict[str, Any] = {
        name: unit
        for name in names
        for unit in entries[name].units.values()
        if unit.kind in ("side", "queries") or (unit.kind == "stream" and any(s.shapes for s in unit.streams()))
    }
    if len(beside) > 1:
        first, second = list(beside)[:2]
        raise SiteError(
            f"Adapters {first!r} and {second!r} both replace the output of the model; only one of them can act. "
            "Activate one."
        )
    others = [name for name in names if name not in beside and entries[name].units]
    for name, unit in beside.items():
        if getattr(unit, "detach_hidden", False) and others:
            raise SiteError(
                f"Adapter {name!r} runs the backbone without gradients, so {others[0]!r} inside of it would not train. "
                "Activate one of them, or attach the first with detach_hidden=False, which gives up its memory saving."
            )


def _check_width(entries: Entries, names: tuple[str, ...], owner: str | None, head: nn.Module | None) -> None:
    """Refuse a linear classifier in front of which another adapter widens the features."""
    if not isinstance(head, nn.Linear):
        return
    for name in names:
        streams = [stream for unit in entries[name].units.values() for stream in unit.streams()]
        if name != owner and any(stream.shapes for stream in streams):
            raise SiteError(
                f"Adapter {name!r} widens the features that the classifier reads, and the classifier is that of "
                f"{'the base' if owner is None else repr(owner)}. Name {name!r} last, so that its own one answers."
            )
