"""Which host carries which unit on which layer."""

from __future__ import annotations

from torch import nn

from vispeft.core.families import base_class
from vispeft.core.sites import Site
from vispeft.core.units import (
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
from vispeft.hosts.base import Host
from vispeft.hosts.layers import (
    _BIASES,
    ConvHost,
    IdentityHost,
    LinearHost,
    NormHost,
    ReaderHost,
    ReadLinearHost,
    ShiftlessNormHost,
)

__all__ = ["host_for", "owner_host", "passing_host", "register_attention_host", "register_block_host"]


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
