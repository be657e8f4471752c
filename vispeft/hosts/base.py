"""Hosts: the single mechanism by which units act on a timm layer.

A host is a subclass of the class it replaces, put on the module in place (``module.__class__ = ...``). Base tensors
keep their names and their objects; units hang below the module under ``adapters.<adapter>.<unit>``, so that device
moves, state dicts, EMA copies and optimisers see them. There is one host class per kind of place and base class, made
once and rebuilt by name when unpickled.

Tensors that units change as a whole (a norm's weight and bias, a selected tensor, a projection that the model reads
instead of calling) are *computed on read*: the host class has a property of the tensor's name. timm's own forward then
works on the computed tensor; no forward is copied, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from vispeft.core.gate import plain_class, waits_for_changes
from vispeft.core.route import NOTHING, Acting, Routing, keeps_route
from vispeft.core.units import SelectionUnit
from vispeft.errors import SiteError

__all__ = [
    "COMPILED",
    "Host",
    "HostState",
    "check_plain",
    "ensure_host",
    "host_class",
    "host_kind",
    "put_back",
    "take_off",
]


COMPILED = "acts_compiled"
"""Attribute of a host inside compiled blocks: what acts at it."""
_NOT_COPIED = (COMPILED, "_compiled_call_impl")
"""Attributes that only the compiled model has, not its copies; the second is PyTorch's."""


class Host(nn.Module):
    """Base class of all hosts.

    A plain `Host` suffices if only selection units act on a module.
    """

    adapters: nn.ModuleDict
    routing: Routing
    """The route of the model, shared by all of its hosts."""
    slot: int
    """Number of this host in routes."""
    carried: frozenset[str]
    """Names of the adapters whose streams pass through."""
    replaces: type[nn.Module]
    """The class the host replaces."""
    computed: tuple[str, ...]
    acts_compiled: Acting | None = None
    """What acts here in compiled blocks; a slot's number would be a constant of the graph, which no other block has."""
    attributes: ClassVar[dict[str, Any]] = {"routing": None, "slot": 0, "carried": frozenset()}
    """Plain attributes a host adds to its module, with their start values."""
    in_merging: ClassVar[bool] = False
    """Whether hosts of this kind take part where the model merges tokens."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Methods that run a whole forward pass: they read the route once and keep it until they return."""

    @property
    def acting(self) -> Acting:
        """The units that act here under the route of the calling thread."""
        routing = self.routing
        if is_dynamo_compiling():
            told = self.acts_compiled
            return routing.traced.hosts.get(self.slot, NOTHING) if told is None else told
        # As `Routing.present`, without the call.
        return (routing._thread.route or routing.default).hosts.get(self.slot, NOTHING)

    def own(self, name: str, acting: Acting | None = None) -> Tensor | None:
        """Return a tensor of the base module, or its replacement by an acting selection unit.

        Args:
            name: Its name.
            acting: The units that act here, where the caller has looked them up.
        """
        value = self._parameters[name] if name in self._parameters else self._other_tensor(name)
        for unit in (self.acting if acting is None else acting).selection:
            selected = unit.value(name)
            if selected is None:
                continue
            selected = selected if value is None else selected.to(value.dtype)
            value = selected if unit.gain is None or value is None else torch.lerp(value, selected, unit.gain)
        return value

    def _other_tensor(self, name: str) -> Tensor | None:
        """Return a tensor that is no parameter: a buffer, or what PyTorch's pruning and weight norm set on each call.

        Raises:
            AttributeError: If there is none.
            SiteError: If the module was parametrised behind the host.
        """
        if name in self.__dict__:
            return cast("Tensor | None", self.__dict__[name])
        check_plain(self, "the place of an adapter")
        return cast("Tensor | None", self.__getattr__(name))

    def read(self, name: str) -> Tensor | None:
        """Compute the tensor that timm's code gets when it reads this attribute."""
        return self.own(name)

    def change_selected(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change the tensors that selection units of any adapter hold in place of one of the base.

        Args:
            name: Its name.
            change: Computes the new values, of any shape.
        """
        for unit in self.adapters.modules():
            value = unit.value(name) if isinstance(unit, SelectionUnit) else None
            if value is not None:
                changed = nn.Parameter(change(value.detach()), requires_grad=value.requires_grad)
                unit.register_parameter(name, changed)

    def acts(self) -> bool:
        """Return whether a unit acts here or a stream passes through."""
        acting = self.acting
        return acting.carries or any(True for _ in acting.units()) or self.merges()

    def merges(self) -> bool:
        """Return whether the host takes part in token merging."""
        return self.in_merging and self.routing.merging is not None

    def plain_tensors(self) -> dict[str, Tensor | None]:
        """Compute the tensors of the equivalent plain module, in double precision, for merging.

        Returns:
            The tensors that acting units change, by name in the module; None for those to remove.

        Raises:
            NotImplementedError: If a unit has no weight form.
        """
        values = {name: self.own(name) for name in self.computed}
        return {name: value.detach().double() for name, value in values.items() if value is not None}

    def no_plain_form(self) -> str | None:
        """Return why no plain module is equivalent; None if one is."""
        acting = self.acting
        if acting.queries:
            return "no plain model has queries that read its blocks"
        if acting.stream or acting.branch or acting.carries:
            return "no plain model has streams beside its tokens"
        if acting.side:
            return "no plain model has a network beside it"
        if self.merges():
            return "no plain model merges tokens"
        return "no plain model inserts tokens" if acting.tokens else None

    @classmethod
    def class_without(cls, plain: type[nn.Module], routing: Routing) -> type[nn.Module]:
        """Return the class of a module that is no host any more.

        Args:
            plain: The class that was replaced.
            routing: The route of the model.
        """
        return plain

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the base class, since host classes are made at run time."""
        state = {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}
        return _restore, (host_kind(self), self.replaces, self.computed), state


def check_plain(module: nn.Module, place: str) -> None:
    """Refuse a module of which `torch.nn.utils.parametrize` computes tensors, in place of its class.

    Args:
        module: The module.
        place: Where it is, for the error message.

    Raises:
        SiteError: If it is one.
    """
    if "parametrizations" in module._modules:
        tensors = ", ".join(cast(nn.ModuleDict, module._modules["parametrizations"])) or "tensors"
        raise SiteError(
            f"PyTorch parametrises the {tensors} of {place}, and vispeft adapts layers that hold their tensors. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first."
        )


def _property(name: str) -> property:
    """Make the property of a computed tensor. What PyTorch's pruning sets there is what units read in place of it."""

    def write(host: Host, value: Any) -> None:
        host.__dict__[name] = value

    def delete(host: Host) -> None:
        del host.__dict__[name]

    return property(_reader(name), write, delete)


def _reader(name: str) -> Callable[[Host], Tensor | None]:
    def read(host: Host) -> Tensor | None:
        if host.routing.sharded and type(own := host._parameters.get(name)) not in (nn.Parameter, type(None)):
            return own  # the part that this process has: the whole is there while the block runs
        try:
            return host.read(name)
        except AttributeError as error:
            if not any(name in held for held in (host._parameters, host._buffers, host.__dict__)):
                raise  # there is no such tensor
            # nn.Module would treat this as a missing attribute and silently return the base's tensor.
            raise RuntimeError(f"A unit failed to compute {name!r} of a {host.replaces.__name__}: {error}") from error

    return read


_CLASSES: dict[tuple[type[Host], type[nn.Module], tuple[str, ...]], type[Host]] = {}


def host_class(host: type[Host], base: type[nn.Module], computed: tuple[str, ...]) -> type[Host]:
    """Create, or look up, the host class for a base class.

    Args:
        host: The kind of host.
        base: The class it replaces.
        computed: Names of the tensors that are computed on read.

    Returns:
        A subclass of both.
    """
    key = (host, base, computed)
    if key in _CLASSES:
        return _CLASSES[key]
    properties = {name: _property(name) for name in computed}
    body = {"__module__": __name__, "__doc__": base.__doc__, "replaces": base, "computed": computed, **properties}
    made = type(f"Adapted{base.__name__}", (host, base), body)
    for name in host.whole:
        if hasattr(made, name):
            setattr(made, name, waits_for_changes(keeps_route(getattr(made, name))))
    return _CLASSES.setdefault(key, made)


def _restore(host: type[Host], base: type[nn.Module], computed: tuple[str, ...]) -> Host:
    cls = host_class(host, base, computed)
    return cls.__new__(cls)


def host_kind(module: Host) -> type[Host]:
    """Return the kind of a host; kind, base class and computed tensors determine its class."""
    return cast(type[Host], type(module).__mro__[1])


def ensure_host(module: nn.Module, host: type[Host], computed: tuple[str, ...] = (), *, routing: Routing) -> Host:
    """Turn a module into a host, in place.

    An existing host keeps its kind if that is the same or a subclass, and gains the computed tensors.

    Args:
        module: The module.
        host: The kind of host that is needed.
        computed: Names of the tensors that units will change.
        routing: The route of the model.

    Returns:
        The same object.

    Raises:
        SiteError: If the module is a host of an incompatible kind.
    """
    if isinstance(module, Host):
        kind = host_kind(module)
        if issubclass(host, kind):
            kind = host
        elif not issubclass(kind, host):
            raise SiteError(f"A {module.replaces.__name__} cannot be a {host.__name__} and a {kind.__name__} at once.")
        computed = tuple(sorted({*computed, *module.computed}))
        module.__class__ = host_class(kind, module.replaces, computed)
        return module
    plain: Any = module
    plain.adapters = nn.ModuleDict().train(module.training)
    plain.__dict__.update({**host.attributes, "routing": routing, "slot": routing.new_slot()})
    # The class comes last: another thread may be about to run the module.
    plain.__class__ = host_class(host, plain_class(module), tuple(sorted(computed)))
    return cast(Host, module)


@dataclass
class HostState:
    """Everything vispeft added to one module, kept aside while the model is merged."""

    module: nn.Module
    kind: type[Host]
    computed: tuple[str, ...]
    attributes: dict[str, Any]
    adapters: nn.ModuleDict


def take_off(module: Host) -> HostState:
    """Turn a host back into the plain timm module and return its state.

    Args:
        module: The host, changed in place.

    Returns:
        The state for `put_back`.
    """
    kind = host_kind(module)
    attributes = {name: module.__dict__.pop(name) for name in kind.attributes}
    attributes["routing"].forget()
    module.__dict__.pop(COMPILED, None)
    state = HostState(module, kind, module.computed, attributes, module.adapters)
    plain: Any = module
    del plain.adapters
    plain.__class__ = kind.class_without(module.replaces, attributes["routing"])
    return state


def put_back(state: HostState) -> None:
    """Undo `take_off`.

    Args:
        state: The state it returned.
    """
    plain: Any = state.module
    plain.adapters = state.adapters
    plain.__dict__.update(state.attributes)
    plain.__class__ = host_class(state.kind, plain_class(state.module), state.computed)
