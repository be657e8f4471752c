"""Hosts: the one mechanism that makes a timm layer obey its units.

A host is a subclass of the class it replaces, put on the module in place (``module.__class__ = ...``). Base tensors
keep their names and their objects; units hang below the module under ``adapters.<adapter>.<unit>``, so that device
moves, state dicts, EMA copies and optimisers see them. There is one host class per kind of place and base class, made
once and rebuilt by name when unpickled.

Tensors that units change as a whole (a norm's weight and bias, a selected tensor, a projection that the model reads
instead of calling) are *computed on read*: the host class has a property of the tensor's name. timm's own forward then
works on the computed tensor; no forward is copied, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispeft.adapters.functional import affine, low_rank_linear
from vispeft.adapters.sites import Site
from vispeft.adapters.units import (
    AffineUnit,
    DeltaUnit,
    InputUnit,
    ParallelUnit,
    PrefixUnit,
    QueryUnit,
    SelectionUnit,
    SequentialUnit,
    SharedUnit,
    SideUnit,
    TokensUnit,
    Unit,
    WeightUnit,
)
from vispeft.errors import SiteError

__all__ = [
    "PASSAGE",
    "Host",
    "HostState",
    "base_class",
    "ensure_host",
    "host_class",
    "host_for",
    "owner_host",
    "passing_host",
    "put_back",
    "register_attention_host",
    "register_block_host",
    "take_off",
]

U = TypeVar("U", bound=Unit)


class Host(nn.Module):
    """What every host class has, whatever it is put on.

    A plain `Host` is enough where selections of tensors are all that acts on a module.
    """

    adapters: nn.ModuleDict
    active: tuple[str, ...]
    base: type[nn.Module]
    computed: tuple[str, ...]
    attributes: ClassVar[dict[str, Any]] = {"active": ()}
    """Plain attributes a host adds to its module, with their start values."""

    def units(self, kind: type[U]) -> Iterator[U]:
        """Iterate over the units of one kind that are active, in the order of the active adapters."""
        for name in self.active:
            for unit in cast(nn.ModuleDict, self.adapters[name]).values():
                if isinstance(unit, kind):
                    yield unit

    def own(self, name: str) -> Tensor | None:
        """Look up a tensor of the base module, replaced where an active unit selects it."""
        value = cast("Tensor | None", self.__getattr__(name))
        for unit in self.units(SelectionUnit):
            selected = unit.value(name)
            if selected is not None:
                value = selected if value is None else selected.to(value.dtype)
        return value

    def read(self, name: str) -> Tensor | None:
        """Compute what the base's own code gets when it reads a tensor by name."""
        return self.own(name)

    def acts(self) -> bool:
        """Tell whether any active unit acts here."""
        return any(True for _ in self.units(Unit))

    def plain_tensors(self) -> dict[str, Tensor | None]:
        """Compute the tensors of the plain module that does the same, in double precision, for merging.

        Returns:
            By name inside the module, the tensors that active units change; None for those that must go.

        Raises:
            NotImplementedError: If a unit has no weight form.
        """
        values = {name: self.own(name) for name in self.computed}
        return {name: value.detach().double() for name, value in values.items() if value is not None}

    def passes(self) -> bool:
        """Tell whether rows beside the tokens pass here for an active adapter."""
        return any(PASSAGE in cast(nn.ModuleDict, self.adapters[name]) for name in self.active)

    def no_plain_form(self) -> str | None:
        """Say why no plain module does the same, or None where one does."""
        if any(True for _ in self.units(QueryUnit)):
            return "no plain model has queries that read its blocks"
        if any(True for _ in self.units(SideUnit)):
            return "no plain model has a network beside it"
        return "no plain model inserts tokens" if any(True for _ in self.units(TokensUnit)) else None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the base class, since host classes are made at run time."""
        return _restore, (host_kind(self), self.base, self.computed), self.__dict__


_BEFORE_INPUT: tuple[type[Unit], ...] = (WeightUnit, DeltaUnit, SequentialUnit)
PASSAGE = "rows"
"""Name under which an adapter marks, among its units of a host, that rows beside the tokens pass there."""
COMPOSITION: tuple[type[Unit], ...] = (*_BEFORE_INPUT, InputUnit, AffineUnit)
"""The order in which units are written into a layer. A change of the input comes after everything that reads it."""


class _Foldable(Host):
    """A layer with a weight and a bias into which units can be written."""

    folds: tuple[type[Unit], ...] = (AffineUnit,)
    """The kinds that `read` writes into the tensors, in the order of composition."""
    foldable: tuple[str, ...] = ("weight", "bias")
    """The tensors of a plain layer that hold all of it."""

    def read(self, name: str) -> Tensor | None:
        own = self.own(name)
        value = self.folded(name, self.folds, own)
        # Units may be wider than the base; timm's own code goes on in the base's type.
        like = self.own("weight") if own is None else own
        return value if value is None or like is None else value.to(like.dtype)

    def plain_tensors(self) -> dict[str, Tensor | None]:
        plain = {name: self._plain(name) for name in self.foldable}
        return {name: value for name, value in plain.items() if value is not None}

    def _plain(self, name: str) -> Tensor | None:
        own = self.own(name)
        return self.folded(name, COMPOSITION, None if own is None else own.detach().double())

    def folded(self, name: str, kinds: tuple[type[Unit], ...], value: Tensor | None) -> Tensor | None:
        """Write units into a weight or bias, kind after kind in the order of composition."""
        live = [unit for kind in kinds for unit in self._written(kind)]
        if value is None and live:
            value = self.missing(name, live)
        if value is None:
            return None
        for unit in live:
            value = unit.fold_weight(value) if name == "weight" else self._shifted(value, unit)
        return value

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return unit.fold_bias(bias)

    def _written(self, kind: type[U]) -> list[U]:
        """List units in the order in which they are written: of two changes of the input, the nearer one first."""
        units = list(self.units(kind))
        return units[::-1] if issubclass(kind, InputUnit) else units

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        """Make the neutral tensor where the base has none and units need one."""
        weight = self.own("weight")
        if name != "bias" or weight is None or not any(unit.shifts() for unit in live):
            return None
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)


class LinearHost(_Foldable):
    """An adapted ``nn.Linear``: a changed input, the product, low-rank terms, what follows, then scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., out) from (..., in)."""
        for entering in self.units(InputUnit):
            x = entering.enter(x)
        out = self._product(x)
        for following in self.units(SequentialUnit):
            out = following.follow(x, out)
        for unit in self.units(AffineUnit):
            out = affine(out, unit.scale, unit.shift)
        return out

    def read(self, name: str) -> Tensor | None:
        return self.own(name)

    def input_bias(self, unit: InputUnit, dtype: torch.dtype) -> Tensor:
        """Compute what the shift of a changed input adds behind the layer.

        Args:
            unit: The unit that changes it.
            dtype: Type to compute in.

        Returns:
            (out,).
        """
        weight = self.folded("weight", _BEFORE_INPUT, cast(Tensor, self.own("weight")).to(dtype))
        assert weight is not None
        for nearer in self._written(InputUnit):
            if nearer is unit:
                break
            weight = nearer.fold_weight(weight)
        return weight @ unit.input_shift().to(weight.dtype)

    def _shifted(self, bias: Tensor, unit: Unit) -> Tensor:
        return bias + self.input_bias(unit, bias.dtype) if isinstance(unit, InputUnit) else unit.fold_bias(bias)

    def _product(self, x: Tensor) -> Tensor:
        branches = [branch for unit in self.units(DeltaUnit) for branch in unit.branches()]
        weight, bias = self._whole_weight(), self.own("bias")
        return low_rank_linear(x, weight, bias, branches) if branches else F.linear(x, weight, bias)

    def _whole_weight(self) -> Tensor:
        """Give the weight that the product is computed with, in the base's type."""
        own = cast(Tensor, self.own("weight"))
        return cast(Tensor, self.folded("weight", (WeightUnit,), own)).to(own.dtype)


class ReadLinearHost(LinearHost):
    """A linear layer whose weight the model reads: units are written into the weight on every read.

    Where the owner calls it after all (low-rank terms only, see `ReaderHost`), it acts as a `LinearHost`.
    """

    folds = COMPOSITION
    foldable = ("weight",)

    def read(self, name: str) -> Tensor | None:
        return _Foldable.read(self, name)


class ReaderHost(Host):
    """An attention module that reads ``qkv.weight`` and keeps the biases itself (SwinV2, EVA-02).

    The biases are computed on read from the units of the projection. For low-rank terms alone, which leave the biases
    as they are, timm's own switch makes the module call the projection, whose host then adds the terms cheaply; the
    switch adds the bias behind the layer and in place, which is wrong for everything else.
    """

    qkv: nn.Linear

    @property
    def qkv_bias_separate(self) -> bool:
        """Tell timm whether to call the projection and add the biases itself."""
        if self._projection_has(AffineUnit):
            return False
        return self._projection_has(DeltaUnit, InputUnit) or bool(self.__dict__["qkv_bias_separate"])

    def read(self, name: str) -> Tensor | None:
        value = self.own(name)
        # A projection that is called changes its input itself; only where its weight is read must biases hold it all.
        read_whole = value is not None and name in _BIASES and self._projection_has(AffineUnit)
        return self._whole_bias(name, value) if read_whole and value is not None else value

    def _whole_bias(self, name: str, value: Tensor) -> Tensor:
        """Write the projection's units into one of the biases."""
        start = _BIASES.index(name) * value.numel()
        rows = slice(start, start + value.numel())
        whole = value
        for entering in self._projection_units(InputUnit):
            whole = whole + cast(LinearHost, self.qkv).input_bias(entering, value.dtype)[rows]
        for unit in self._projection_units(AffineUnit):
            whole = unit.scale[rows] * whole + unit.shift[rows]
        return whole.to(value.dtype)

    def acts(self) -> bool:
        return super().acts() or self._projection_has(AffineUnit, InputUnit)

    def plain_tensors(self) -> dict[str, Tensor | None]:
        if not self._projection_has(AffineUnit, InputUnit):
            return super().plain_tensors() if super().acts() else {}
        # timm's key bias is a buffer that no state dict holds: a shift there needs one plain bias of the projection.
        biases = [self._whole_bias(name, cast(Tensor, self.own(name)).detach().double()) for name in _BIASES]
        return {"qkv.bias": torch.cat(biases), **dict.fromkeys(_BIASES)}

    def _projection_units(self, kind: type[U]) -> Iterator[U]:
        if isinstance(self.qkv, Host):
            yield from self.qkv.units(kind)

    def _projection_has(self, *kinds: type[Unit]) -> bool:
        return any(True for kind in kinds for _ in self._projection_units(kind))


_BIASES = ("q_bias", "k_bias", "v_bias")


class ConvHost(_Foldable):
    """An adapted convolution: scale and shift are written into weight and bias on read."""


class NormHost(_Foldable):
    """An adapted norm: scale and shift are written into weight and bias on read.

    Nothing but the norm's own input is then kept for the backward pass.
    """

    def missing(self, name: str, live: Sequence[Unit]) -> Tensor | None:
        unit = next(self.units(AffineUnit))
        fill = torch.ones if name == "weight" else torch.zeros
        return fill(unit.scale.numel(), dtype=unit.scale.dtype, device=unit.scale.device)


class ShiftlessNormHost(NormHost):
    """An adapted norm that has a weight only (RMSNorm): the shift is added behind it."""

    foldable = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        out = super().forward(x)
        shift = self.trailing_shift()
        return out if shift is None else out + shift.to(out.dtype)

    def trailing_shift(self) -> Tensor | None:
        """Sum up what is added behind the norm, (width,)."""
        total: Tensor | None = None
        for unit in self.units(AffineUnit):
            total = unit.shift if total is None else unit.scale * total + unit.shift
        return total


class IdentityHost(Host):
    """An affine map where the model has an identity (the place of the last norm under average pooling)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        for unit in self.units(AffineUnit):
            x = affine(x, unit.scale, unit.shift)
        return x

    def no_plain_form(self) -> str | None:
        return "the model has an identity here, and no plain layer scales and shifts in its place"


def _reader(name: str) -> Callable[[Host], Tensor | None]:
    def read(host: Host) -> Tensor | None:
        try:
            return host.read(name)
        except AttributeError as error:
            # nn.Module would take it for a missing attribute and quietly hand out the base's tensor.
            raise RuntimeError(f"A unit failed to compute {name!r} of a {host.base.__name__}: {error}") from error

    return read


_CLASSES: dict[tuple[type[Host], type[nn.Module], tuple[str, ...]], type[Host]] = {}


def host_class(host: type[Host], base: type[nn.Module], computed: tuple[str, ...]) -> type[Host]:
    """Make, once, the host class for a base class.

    Args:
        host: The kind of host.
        base: The class it stands in for.
        computed: Names of the tensors that are computed on read.

    Returns:
        A subclass of both.
    """
    key = (host, base, computed)
    if key in _CLASSES:
        return _CLASSES[key]
    properties = {name: property(_reader(name)) for name in computed}
    body = {"__module__": __name__, "__doc__": base.__doc__, "base": base, "computed": computed, **properties}
    return _CLASSES.setdefault(key, type(f"Adapted{base.__name__}", (host, base), body))


def _restore(host: type[Host], base: type[nn.Module], computed: tuple[str, ...]) -> Host:
    cls = host_class(host, base, computed)
    return cls.__new__(cls)


def host_kind(module: Host) -> type[Host]:
    """Give the kind of a host, which with its base and its computed tensors makes its class."""
    return cast(type[Host], type(module).__mro__[1])


def base_class(module: nn.Module) -> type[nn.Module]:
    """Give the class a module has without vispeft."""
    return module.base if isinstance(module, Host) else type(module)


def ensure_host(module: nn.Module, host: type[Host], computed: tuple[str, ...] = ()) -> Host:
    """Make a module obey units, in place.

    A module that is a host already keeps its kind when that is at least as able, and gains computed tensors.

    Args:
        module: The module.
        host: The kind of host that is needed.
        computed: Names of the tensors that units will change.

    Returns:
        The same object.

    Raises:
        SiteError: If the module is a host of a kind that does not go together with the one needed.
    """
    if isinstance(module, Host):
        kind = host_kind(module)
        if issubclass(host, kind):
            kind = host
        elif not issubclass(kind, host):
            raise SiteError(f"A {module.base.__name__} cannot be a {host.__name__} and a {kind.__name__} at once.")
        computed = tuple(sorted({*computed, *module.computed}))
        module.__class__ = host_class(kind, module.base, computed)
        return module
    plain: Any = module
    plain.__class__ = host_class(host, type(module), tuple(sorted(computed)))
    adapted = cast(Host, module)
    adapted.adapters = nn.ModuleDict()
    adapted.__dict__.update(host.attributes)
    return adapted


@dataclass
class HostState:
    """Everything vispeft put on one module, taken off for as long as the model is merged."""

    module: nn.Module
    kind: type[Host]
    computed: tuple[str, ...]
    attributes: dict[str, Any]
    adapters: nn.ModuleDict


def take_off(module: Host) -> HostState:
    """Turn a host back into what it was, keeping what it carried.

    Args:
        module: The host; it has its base class again afterwards.

    Returns:
        What `put_back` needs.
    """
    kind = host_kind(module)
    attributes = {name: module.__dict__.pop(name) for name in kind.attributes}
    state = HostState(module, kind, module.computed, attributes, module.adapters)
    plain: Any = module
    del plain.adapters
    plain.__class__ = module.base
    return state


def put_back(state: HostState) -> None:
    """Undo `take_off`.

    Args:
        state: What it returned.
    """
    state.module.__class__ = host_class(state.kind, type(state.module), state.computed)
    host = cast(Host, state.module)
    host.adapters = state.adapters
    host.__dict__.update(state.attributes)


def owner_host() -> tuple[type[Host], tuple[str, ...]]:
    """Give the host of a module that reads a projection's weight.

    Returns:
        The kind of host, and the tensors to be computed on read.
    """
    return ReaderHost, _BIASES


_BLOCK_HOSTS: dict[type[nn.Module], type[Host]] = {}


def register_block_host(block: type[nn.Module], host: type[Host]) -> None:
    """Say which host a family's blocks need for terms beside their branches.

    Args:
        block: timm's class of a block.
        host: The host, with the family's own forward of a block.
    """
    _BLOCK_HOSTS[block] = host


_ATTENTION_HOSTS: dict[type[nn.Module], tuple[type[Host], type[Host]]] = {}


def register_attention_host(attention: type[nn.Module], host: type[Host], reading: type[Host] | None = None) -> None:
    """Say which host a family's attention modules need for keys, values and rows that are not the tokens'.

    Args:
        attention: timm's class.
        host: The host, with the family's own attention.
        reading: The same for modules that keep the biases of their projection, also a `ReaderHost`.
    """
    _ATTENTION_HOSTS[attention] = (host, reading or host)


def passing_host(module: nn.Module) -> type[Host]:
    """Choose the host of a block or an attention that rows beside the tokens pass.

    Args:
        module: The block or attention.

    Raises:
        SiteError: If the family has none.
    """
    base = base_class(module)
    if base in _ATTENTION_HOSTS:
        host, reading = _ATTENTION_HOSTS[base]
        return reading if getattr(module, "q_bias", None) is not None else host
    found = next((host for block, host in _BLOCK_HOSTS.items() if issubclass(base, block)), None)
    if found is None:
        raise SiteError(f"There is no host that takes rows beside the tokens through a {base.__name__}.")
    return found


_LINEAR_UNITS = (WeightUnit, DeltaUnit, AffineUnit, InputUnit, SequentialUnit)
NORMS_WITHOUT_BIAS = frozenset({"RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32", "RMSNorm"})


def host_for(site: Site, module: nn.Module, unit: Unit) -> tuple[type[Host], tuple[str, ...]]:
    """Choose the host a unit needs at a site.

    Args:
        site: The place.
        module: What stands there.
        unit: What comes there.

    Returns:
        The kind of host, and the tensors to be computed on read.

    Raises:
        SiteError: If no host carries this kind of unit there.
    """
    base = base_class(module)
    if isinstance(unit, SelectionUnit):
        return Host, tuple(name for name, _ in unit.named_parameters())
    if isinstance(unit, SharedUnit):
        return Host, ()
    if isinstance(unit, TokensUnit | QueryUnit | SideUnit) and site.role == "tokens":
        return Host, ()
    if site.rows is not None and not isinstance(unit, DeltaUnit | WeightUnit):
        raise SiteError(f"A unit of kind {unit.kind!r} acts on whole layers; {site.role!r} is a part of {site.path!r}.")
    if isinstance(unit, ParallelUnit):
        found = next((host for block, host in _BLOCK_HOSTS.items() if issubclass(base, block)), None)
        if found is not None:
            return found, ()
    if isinstance(unit, PrefixUnit):
        return passing_host(module), ()
    if issubclass(base, nn.Linear) and isinstance(unit, _LINEAR_UNITS):
        return (ReadLinearHost, ("weight",)) if site.reads_weight else (LinearHost, ())
    if isinstance(unit, AffineUnit):
        if issubclass(base, nn.Conv2d):
            return ConvHost, ("bias", "weight")
        if issubclass(base, nn.Identity):
            return IdentityHost, ()
        if base.__name__ in NORMS_WITHOUT_BIAS:
            return ShiftlessNormHost, ("weight",)
        if issubclass(base, nn.LayerNorm):
            return NormHost, ("bias", "weight")
    raise SiteError(
        f"A unit of kind {unit.kind!r} was to act at {site.path!r} ({site.role}), "
        f"but there is no host that carries it on a {base.__name__}."
    )
