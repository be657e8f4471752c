"""The route: the adapters that act, their order and the task.

A `Route` is immutable and created once per choice; it holds the units of every host by kind, so that a forward pass
needs no search. All hosts of a model share one `Routing`, which holds the default route and each thread's temporary
override.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from vispeft.core.gate import Gate
from vispeft.core.generated import FrozenCasts
from vispeft.core.model_units import QueryUnit, SideUnit, StreamUnit, TokensUnit
from vispeft.core.origin import Memory
from vispeft.core.recovery import Recoveries
from vispeft.core.rows import Rows, check_batch, in_parts
from vispeft.core.streams import Stream
from vispeft.core.token_merging import TokenMerging
from vispeft.core.tracing import in_graph
from vispeft.core.units import (
    AffineUnit,
    BranchUnit,
    DeltaUnit,
    DepthUnit,
    InputUnit,
    ParallelUnit,
    PrefixUnit,
    SelectionUnit,
    SequentialUnit,
    SharedUnit,
    Unit,
    WeightUnit,
)
from vispeft.errors import ConfigError

__all__ = ["NOTHING", "Acting", "Route", "Routing", "acting", "keeps_route"]

F = TypeVar("F", bound=Callable[..., Any])

_SCORES = ("forward", "forward_head")
"""Methods of a model that give the scores of its classes."""


class Acting(NamedTuple):
    """The units that act at one host, by kind; within a kind, in the order in which the adapters act."""

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
    """Whether streams beside the tokens pass through this block, attention or MLP, or start in it."""
    grid: bool = False
    """Whether a unit here treats the tokens as an image; at the host of the model, whether one in any block does."""
    starting: tuple[Stream, ...] = ()
    """At the host of the model: the streams that start inside blocks."""
    lone: DeltaUnit | None = None
    """The low-rank term, where it is all that acts here."""
    scaling: AffineUnit | None = None
    """The scale and shift, where it is all that acts here."""
    routed: bool = False
    """Whether the images of a batch take units of different adapters here."""

    def units(self) -> Iterator[Unit]:
        """Iterate over all units, kind by kind."""
        kinds: Any = self[:KINDS]
        for kind in kinds:
            yield from kind


KINDS = Acting._fields.index("carries")
"""Number of the fields that hold units, which come first."""
NOTHING = Acting()
"""The value for a host at which no unit acts."""


def acting(units: Iterable[Unit], carries: bool = False, grid: bool = False, starting: Iterable[Stream] = ()) -> Acting:
    """Sort the units of one host by kind.

    Args:
        units: The units, in the order in which their adapters act.
        carries: Whether streams beside the tokens pass through.
        grid: Whether a unit treats the tokens as an image.
        starting: At the host of the model, the streams that start inside blocks.
    """
    kinds: dict[str, Any] = {}
    for unit in units:
        kinds[unit.kind] = (*kinds.get(unit.kind, ()), unit)
    (first, *others) = kinds.get("delta", ()) or (None,)
    lone = first if len(kinds) == 1 and not others and first is not None and first.is_one_term else None
    (scaling, *others) = kinds.get("affine", ()) or (None,)
    # One with a weight of its own (`vispeft.core.weighted`) takes the general path, which reads its gain.
    scaling = None if others or len(kinds) > 1 or hasattr(scaling, "unweighted") else scaling
    kinds |= {"carries": carries, "grid": grid, "starting": tuple(starting)}
    return Acting(**kinds, lone=lone, scaling=scaling)


@dataclass(frozen=True, eq=False)
class Route:
    """One immutable choice of acting adapters."""

    names: tuple[str, ...] = ()
    """The adapters, in the order in which they act."""
    task: str | None = None
    """The chosen task, where an adapter has tasks."""
    hosts: Mapping[int, Acting] = field(default_factory=dict)
    """Units by slot number of the host; hosts without any are omitted."""
    head: nn.Module | None = None
    """The classifier in use; None for the base's own."""
    owner: str | None = None
    """The adapter that owns the classifier."""
    refusal: str | None = None
    """Error message for a forward pass under this route, where no task was chosen and one is needed; else None."""
    weights: tuple[float, ...] = ()
    """Multipliers of the adapters' contributions, in the order of `names`; empty where all are 1."""
    rows: Rows | None = None
    """The adapter of each image, where the images of a batch take different ones; None where all take the same."""


@dataclass(eq=False)
class _Entered:
    """A block of code that a thread has entered and not left."""

    route: Route
    """The route it uses."""
    before: Route | None
    """The one its thread used before."""
    block: _Block
    """The block."""
    thread: tuple[int, int] = field(default_factory=lambda: (os.getpid(), threading.get_ident()))
    """The process and the thread; a forked process has none of the other threads."""


class _Thread(threading.local):
    """One thread's temporary route, if it has one."""

    route: Route | None = None

    def __init__(self) -> None:
        """Start outside of every block, as each thread does."""
        self.entered: list[_Entered] = []


class _Block(AbstractContextManager[None]):
    """A block of code in which the calling thread uses a route.

    It may be entered repeatedly: a graph that is kept goes backward several times, and each time computes again under
    the route of its forward pass.
    """

    def __init__(self, routing: Routing, find: Callable[[], Route], gate: Callable[[], Any]) -> None:
        """Store how the route is found.

        Args:
            routing: Where the hosts find it.
            find: Returns the route; called on entering, since adapters may have been removed in between.
            gate: Returns what is entered meanwhile.
        """
        self.routing, self.find, self.gate = routing, find, gate

    def __enter__(self) -> None:
        """Let the calling thread use the route."""
        with self.gate():
            self.routing._enter(self.find(), self)

    def __exit__(self, *_: object) -> None:
        """Put back the one before."""
        self.routing._leave(self)


class Routing:
    """The current route of one model, shared by its hosts.

    Copied and unpickled models start from the default route.
    """

    def __init__(self) -> None:
        """Create a routing under which no adapter acts."""
        self.default = Route()
        self.traced = self.default
        self.traced_index: Tensor | None = None
        """`Rows.index` of the route that compiled graphs use; read there, each order of rows would need a graph."""
        self.slots = 0
        self.gate = Gate()
        self.casts = FrozenCasts()
        self.recoveries = Recoveries()
        self.memory: Memory = "lean"
        """How much the backward pass keeps, see `MEMORY`."""
        self.merging: TokenMerging | None = None
        """How many tokens the blocks merge; None for none."""
        self.sharded = False
        """Whether each process holds a part of the frozen weights; it is whole while its block runs."""
        self.compiled: Sequence[Any] = ()
        """The hosts inside compiled blocks; each is told what acts at it, so that equal blocks share a graph."""
        self._thread = _Thread()
        self._entered: list[_Entered] = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the routes of threads."""
        return {"default": self.default, "slots": self.slots, "memory": self.memory, "merging": self.merging}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the default route."""
        self.default = self.traced = state["default"]
        self.traced_index = None
        self.slots = state["slots"]
        self.memory = state.get("memory", "lean")
        self.merging = state.get("merging")
        self.gate = Gate()
        self.casts = FrozenCasts()
        self.recoveries = Recoveries()
        self.sharded = False
        self.compiled = ()
        self._thread = _Thread()
        self._entered = []

    def new_slot(self) -> int:
        """Assign a slot number to one more host."""
        self.slots += 1
        return self.slots

    def present(self) -> Route:
        """Return the route of the calling thread.

        A compiled graph cannot ask which thread runs it: it is compiled for the route chosen last, in any thread,
        and recompiled for another one.
        """
        if is_dynamo_compiling():
            return self.traced
        return self._thread.route or self.default

    def forget(self) -> None:
        """Drop what is kept of the tensors: casts of frozen ones, and answers about scales."""
        self.casts.drop()
        self.recoveries.drop()

    def recovers(self, unit: AffineUnit) -> bool:
        """Return whether the input of a scale and shift can be recovered from its output; see `Recoveries`.

        Args:
            unit: The unit.
        """
        acting = self.present().hosts.values()
        return self.recoveries.of(unit, (other for host in acting for other in host.affine))

    def set(self, route: Route) -> None:
        """Set the default route: every thread's next forward pass uses it.

        Args:
            route: The route.
        """
        self.default = route
        self.trace(route)

    def trace(self, route: Route) -> None:
        """Let compiled graphs use a route, once no graph of another thread runs.

        Args:
            route: The route.
        """
        with self.gate.graphs:
            self.traced = route
            self.traced_index = None if route.rows is None else route.rows.index
            for host in self.compiled:
                host.acts_compiled = route.hosts.get(host.slot, NOTHING)

    @property
    def is_overridden(self) -> bool:
        """Whether the calling thread uses a route of its own."""
        return self._thread.route is not None

    def using(self, route: Route) -> AbstractContextManager[None]:
        """Use a route in the calling thread and restore the previous one on exit, also after an error.

        Args:
            route: The route.
        """
        return _Block(self, lambda: route, nullcontext)

    def choosing(self, find: Callable[[], Route]) -> AbstractContextManager[None]:
        """Use a route that is found when the block is entered, after any change of the model; see `using`.

        Args:
            find: Returns the route.
        """
        return _Block(self, find, self.gate.beside)

    def used_elsewhere(self, name: str | None = None) -> bool:
        """Return whether a block of code of another thread is open that uses an adapter.

        Args:
            name: The adapter; None for any block, also one that uses the base alone.
        """
        process, own = os.getpid(), threading.get_ident()
        others = [entered for entered in list(self._entered) if entered.thread[0] == process]
        others = [entered for entered in others if entered.thread[1] != own]
        return any(name is None or name in (*e.route.names, *(e.before or e.route).names) for e in others)

    def _enter(self, route: Route, block: _Block) -> None:
        """Enter a block in the calling thread."""
        thread = self._thread
        entered = _Entered(route, thread.route, block)
        thread.entered.append(entered)
        thread.route = route
        with self.gate.graphs:
            self._entered.append(entered)
            self.trace(route)

    def _leave(self, block: _Block) -> None:
        """Leave a block of the calling thread; compiled graphs follow the last one that is still open.

        Raises:
            ConfigError: If it was entered in another thread.
        """
        thread = self._thread
        places = [place for place, entered in enumerate(thread.entered) if entered.block is block]
        if not places:
            raise ConfigError(
                "A block of using() or disabled() was left in another thread than it was entered in, which keeps the "
                "choice. Enter and leave it around the call of the model."
            )
        left = thread.entered.pop(places[-1])
        if places[-1] < len(thread.entered):  # a later block is still open, as where generators take turns
            thread.entered[places[-1]].before = left.before
        else:
            thread.route = left.before
        with self.gate.graphs:
            self._entered.remove(left)
            self.trace(self._entered[-1].route if self._entered else self.default)

    def refresh(self, made_again: Callable[[Route], Route]) -> None:
        """Rebuild routes that refer to removed objects, such as a replaced classifier.

        Args:
            made_again: Builds a new route for the same choice.
        """
        thread = self._thread
        self.set(made_again(self.default))
        for entered in thread.entered:
            entered.route, entered.before = made_again(entered.route), entered.before and made_again(entered.before)
        if thread.route is not None:
            thread.route = made_again(thread.route)
            self.trace(thread.route)


def keeps_route(method: F) -> F:
    """Decorate a method of a model's host to read the route once and keep it until it returns.

    Args:
        method: The method; its object has ``routing``.

    Returns:
        The method, with the same signature.
    """

    def parted(self: Any, rows: Rows, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_graph():
            raise ConfigError(
                "The adapters of these rows cannot share a pass, and a graph of the whole model holds one. Compile by "
                "block instead (bank.compile()), or run the adapters one after the other."
            )

        def part(route: Route, images: Tensor, *more: Any, **named: Any) -> Any:
            with self.routing.using(route):
                return run(self, images, *more, **named)

        others = {name: value for name, value in kwargs.items() if value is not batch}
        before_head = method.__name__ == "forward_head" and others.get("pre_logits", any(args[:1]))
        scores = method.__name__ in _SCORES and not before_head
        return in_parts(part, rows, batch, args, others, scores)

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        thread, route = self.routing._thread, self.routing.present()
        if route.refusal is not None:
            raise ConfigError(route.refusal)
        if route.rows is not None:
            batch = check_batch(route.rows, args, kwargs)
            if route.rows.parts:
                return parted(self, route.rows, batch, args[1:], kwargs)
        # A graph is compiled for one route, and a thread that has a route already keeps it.
        if in_graph() or thread.route is not None:
            return method(self, *args, **kwargs)
        thread.route = route
        try:
            return method(self, *args, **kwargs)
        finally:
            thread.route = None

    return run  # type: ignore[return-value]
