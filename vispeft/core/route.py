"""The route: which adapters act, in which order and for which task.

A `Route` is immutable and made once per choice; it holds the units of every host by kind, so that a forward pass
searches nothing. All hosts of a model share one `Routing`, which knows the route that is set for good and the one that
the calling thread uses for a while.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.compiler import is_compiling

from vispeft.core.units import (
    AffineUnit,
    BranchUnit,
    DeltaUnit,
    DepthUnit,
    InputUnit,
    ParallelUnit,
    PrefixUnit,
    QueryUnit,
    SelectionUnit,
    SequentialUnit,
    SharedUnit,
    SideUnit,
    Stream,
    StreamUnit,
    TokensUnit,
    Unit,
    WeightUnit,
)
from vispeft.errors import ConfigError

__all__ = ["NOTHING", "Acting", "Route", "Routing", "acting", "keeps_route"]

F = TypeVar("F", bound=Callable[..., Any])


class Acting(NamedTuple):
    """The units that act at one host, by kind; each kind in the order in which the adapters act."""

    selection: tuple[SelectionUnit, ...] = ()
    weight: tuple[WeightUnit, ...] = ()
    input: tuple[InputUnit, ...] = ()
    delta: tuple[DeltaUnit, ...] = ()
    sequential: tuple[SequentialUnit, ...] = ()
    affine: tuple[AffineUnit, ...] = ()
    branch: tuple[BranchUnit, ...] = ()
    parallel: tuple[ParallelUnit, ...] = ()
    prefix: tuple[PrefixUnit, ...] = ()
    tokens: tuple[TokensUnit, ...] = ()
    stream: tuple[StreamUnit, ...] = ()
    queries: tuple[QueryUnit, ...] = ()
    side: tuple[SideUnit, ...] = ()
    shared: tuple[SharedUnit, ...] = ()
    depth: tuple[DepthUnit, ...] = ()
    carries: bool = False
    """Whether streams beside the tokens pass this block, attention or MLP, or start in it."""
    starting: tuple[Stream, ...] = ()
    """At the host of the model: the streams that start inside blocks."""

    def units(self) -> Iterator[Unit]:
        """Iterate over all units, kind after kind."""
        kinds: Any = self[: len(self) - 2]
        for kind in kinds:
            yield from kind


NOTHING = Acting()
"""Of a host at which nothing acts."""


def acting(units: Iterable[Unit], carries: bool = False, starting: Iterable[Stream] = ()) -> Acting:
    """Sort the units of one host by kind.

    Args:
        units: The units, in the order in which their adapters act.
        carries: Whether streams beside the tokens pass there.
        starting: At the host of the model, the streams that start inside blocks.
    """
    kinds: dict[str, tuple[Any, ...]] = {}
    for unit in units:
        kinds[unit.kind] = (*kinds.get(unit.kind, ()), unit)
    return Acting(**kinds, carries=carries, starting=tuple(starting))


@dataclass(frozen=True, eq=False)
class Route:
    """One choice of adapters that act; never changed."""

    names: tuple[str, ...] = ()
    """The adapters, in the order in which they act."""
    task: str | None = None
    """The task that is asked for, where an adapter has tasks."""
    hosts: Mapping[int, Acting] = field(default_factory=dict)
    """Units by the number of the host's slot; hosts without any are left out."""
    head: nn.Module | None = None
    """The classifier that answers; None for the base's own."""
    owner: str | None = None
    """The adapter whose classifier that is."""
    refusal: str | None = None
    """Why a forward pass cannot run under this route: an adapter has tasks and none was chosen."""


@dataclass(eq=False)
class _Entered:
    """A block of code that a thread has entered and not left."""

    route: Route
    """The route it uses."""
    before: Route | None
    """The one its thread used before."""


class _Thread(threading.local):
    """The route one thread uses, where it is not the one set for good."""

    route: Route | None = None

    def __init__(self) -> None:
        """Start outside of every block, as each thread does."""
        self.entered: list[_Entered] = []


class _Block(AbstractContextManager[None]):
    """A block of code in which the calling thread uses a route.

    It may be entered repeatedly: a graph that is kept goes backward several times, and each time computes again under
    the route of its forward pass.
    """

    def __init__(self, routing: Routing, route: Route) -> None:
        """Note the route.

        Args:
            routing: Where the hosts find it.
            route: The route.
        """
        self.routing, self.route = routing, route

    def __enter__(self) -> None:
        """Let the calling thread use the route."""
        self.routing._enter(self.route)

    def __exit__(self, *_: object) -> None:
        """Put back the one before."""
        self.routing._leave()


class Routing:
    """Where the hosts of one model find the route.

    A copy of the model, and a pickled one, start from the route that was set for good.
    """

    def __init__(self) -> None:
        """Start with nothing that acts."""
        self.default = Route()
        self.traced = self.default
        self.slots = 0
        self._thread = _Thread()
        self._entered: list[_Entered] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the threads out."""
        return {"default": self.default, "slots": self.slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from the route that was set for good."""
        self.default = self.traced = state["default"]
        self.slots = state["slots"]
        self._thread = _Thread()
        self._entered = []

    def new_slot(self) -> int:
        """Number one more host."""
        self.slots += 1
        return self.slots

    def present(self) -> Route:
        """Give the route of the calling thread.

        A compiled graph cannot ask which thread runs it: it is made for the route that was chosen last, in any thread,
        and made again for another one.
        """
        if is_compiling():
            return self.traced
        return self._thread.route or self.default

    def set(self, route: Route) -> None:
        """Choose a route for good: every thread's next forward pass takes it.

        Args:
            route: The route.
        """
        self.default = self.traced = route

    @property
    def is_overridden(self) -> bool:
        """Whether the calling thread uses a route of its own."""
        return self._thread.route is not None

    def using(self, route: Route) -> AbstractContextManager[None]:
        """Let the calling thread use a route in a block, and put back the one before, also after an error.

        Args:
            route: The route.
        """
        return _Block(self, route)

    def _enter(self, route: Route) -> None:
        """Enter a block in the calling thread."""
        thread = self._thread
        entered = _Entered(route, thread.route)
        thread.entered.append(entered)
        self._entered.append(entered)
        thread.route = self.traced = route

    def _leave(self) -> None:
        """Leave the last block of the calling thread; compiled graphs follow the last one that is still open."""
        thread = self._thread
        left = thread.entered.pop()
        self._entered.remove(left)
        thread.route = left.before
        self.traced = self._entered[-1].route if self._entered else self.default

    def refresh(self, made_again: Callable[[Route], Route]) -> None:
        """Exchange routes that hold what is no longer there, such as a classifier that was replaced.

        Args:
            made_again: Makes a route of the same choice.
        """
        thread = self._thread
        self.set(made_again(self.default))
        for entered in thread.entered:
            entered.route, entered.before = made_again(entered.route), entered.before and made_again(entered.before)
        if thread.route is not None:
            thread.route = self.traced = made_again(thread.route)


def keeps_route(method: F) -> F:
    """Let a method of a model's host take the route once, and keep it to its end.

    Args:
        method: The method; its object has ``routing``.

    Returns:
        The method, with the same signature.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        thread, route = self.routing._thread, self.routing.present()
        if route.refusal is not None:
            raise ConfigError(route.refusal)
        # A graph is made for one route; and a thread that uses one keeps it.
        if is_compiling() or thread.route is not None:
            return method(self, *args, **kwargs)
        thread.route = route
        try:
            return method(self, *args, **kwargs)
        finally:
            thread.route = None

    return run  # type: ignore[return-value]
