"""The route of a batch whose images take different adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.heads import HeadRack
from vispeft.adapters.routes import recent
from vispeft.core.route import NOTHING, Acting, Route, Routing
from vispeft.core.rows import Names, rows_of, widened
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.hosts.row_units import by_rows, unroutable

__all__ = ["RowRoutes", "check_rows"]

Find = Callable[[tuple[str, ...], str | None], Route]


def check_rows(entries: Mapping[str, Entry], names: Sequence[str], rows: object, task: str | None) -> Names:
    """Check the adapters of the images of a batch.

    Args:
        entries: The adapters of the model, by name.
        names: Adapters given for the whole batch.
        rows: One adapter or None for each image.
        task: The task; None for none.

    Returns:
        The rows.

    Raises:
        ConfigError: If names are given too, or the rows are none.
        UnknownNameError: If a row names an unknown adapter, or no adapter of the rows has tasks.
    """
    if names:
        raise ConfigError(
            f"using({', '.join(map(repr, names))}, rows=...): give names for the whole batch, or rows with one name "
            "for each image, not both."
        )
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise ConfigError(f"using(rows={rows!r}): give a list with one adapter, or None, for each image of the batch.")
    for name in rows:
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"using(rows=...): {name!r} is no adapter; give a name, or None for the base.")
        if name is not None and name not in entries:
            raise UnknownNameError("adapter", name, entries)
    if task is not None and not any(entries[name].tasks for name in rows if name is not None):
        raise UnknownNameError("task", task, ())
    return tuple(rows)


class RowRoutes:
    """Makes the routes of rows, and keeps what does not depend on their order."""

    def __init__(self, heads: HeadRack, routing: Routing) -> None:
        """Keep nothing yet.

        Args:
            heads: The classifiers of the adapters.
            routing: The route of the model.
        """
        self.heads, self.routing = heads, routing
        self._shared: dict[tuple[Names, str | None], Route] = {}
        self._alone: dict[tuple[str, str | None], bool] = {}

    def clear(self) -> None:
        """Forget what is kept, after a change of the adapters."""
        # New ones, so that a thread that makes a route meanwhile does not keep it behind the change.
        self._shared, self._alone = {}, {}

    def make(self, entries: Mapping[str, Entry], find: Find, names: Names, task: str | None) -> Route:
        """Make the route of a batch.

        Args:
            entries: The adapters of the model, by name.
            find: Returns the route of adapters that act on a whole batch.
            names: One adapter for each image; None for the base.
            task: The task of those adapters that have some.

        Returns:
            The route: one pass, or one for each part of the batch, where adapters cannot share a pass.
        """

        def own(name: str | None) -> Route:
            return find((), None) if name is None else find((name,), task if entries[name].tasks else None)

        device = next(self.heads.model.parameters()).device
        # In the order of attaching, so that batches of the same adapters share what is kept.
        members: Names = (*(name for name in entries if name in names), *((None,) if None in names else ()))
        alone = [name for name in members if name is not None and not self.shares(entries[name], name, own(name))]
        together = tuple(name for name in members if name not in alone)
        groups = [group for group in (together, *((name,) for name in alone)) if group]
        if len(groups) == 1:
            return replace(self._of(groups[0], task, own), rows=rows_of(names, groups[0], device))
        parts = []
        for group in groups:
            images = [image for image, name in enumerate(names) if name in group]
            chosen = tuple(names[image] for image in images)
            parts.append((images, replace(self._of(group, task, own), rows=rows_of(chosen, group, device))))
        refusal = next((route.refusal for _, route in parts if route.refusal), None)
        head = self._head(members, own)
        acting = tuple(name for name in members if name is not None)
        return Route(acting, task, {}, head, None, refusal, rows=rows_of(names, members, device, parts))

    def shares(self, entry: Entry, name: str, route: Route) -> bool:
        """Return whether an adapter can share a pass with others.

        Args:
            entry: The adapter.
            name: Its name.
            route: Its route alone.
        """
        key, alone = (name, route.task), self._alone
        if key not in alone:
            hosts = {host.slot: host for host in entry.hosts}
            alone[key] = any(unroutable(units, hosts.get(slot)) for slot, units in route.hosts.items())
        return not alone[key]

    def _of(self, members: Names, task: str | None, own: Callable[[str | None], Route]) -> Route:
        """Return the route of a set of adapters, without rows."""
        if len(members) == 1:
            return own(members[0])
        return recent(self._shared, (members, task), lambda: self._joined(members, task, own))

    def _joined(self, members: Names, task: str | None, own: Callable[[str | None], Route]) -> Route:
        """Make the route of several adapters, without rows."""
        routes = [own(name) for name in members]
        hosts: dict[int, Acting] = {}
        for slot in dict.fromkeys(slot for route in routes for slot in route.hosts):
            hosts[slot] = by_rows([route.hosts.get(slot, NOTHING) for route in routes], self.routing)
        refusal = next((route.refusal for route in routes if route.refusal), None)
        acting = tuple(name for name in members if name is not None)
        return Route(acting, task, hosts, self._head(members, own), None, refusal)

    def _head(self, members: Names, own: Callable[[str | None], Route]) -> nn.Module | None:
        base = self.heads.base
        return None if base is None else RowHead([own(name).head or base for name in members], base, self.routing)


class RowHead(nn.Module):
    """The classifiers of several adapters: each image gets the scores of its own one.

    Scores are as wide as those of the widest classifier, filled with minus infinity, a probability of zero.
    """

    def __init__(self, heads: Sequence[nn.Module], base: nn.Module, routing: Routing) -> None:
        """Hold the classifiers, which belong to the model.

        Args:
            heads: The classifiers, in the order of `Rows.members`.
            base: That of the base, whose forward pass would ask the route.
            routing: The route of the model.
        """
        super().__init__()
        self.heads, self.base, self.routing = tuple(heads), (base,), routing  # in tuples, or they would be children
        self.out_features = max(getattr(head, "out_features", 0) for head in heads)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, ..., classes of the widest) from features (B, ..., width)."""
        rows = self.routing.present().rows
        assert rows is not None, "made for a route of rows"
        (base,) = self.base
        plain = getattr(type(base), "replaces", type(base))
        # Each for all images: few features, and one graph for all orders of the adapters.
        scores = [plain.forward(base, x) if head is base else head(x) for head in self.heads]
        return torch.stack(widened(scores))[rows.index, torch.arange(x.shape[0], device=x.device)]
