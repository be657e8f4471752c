"""Choice of the host that carries a unit on a layer."""

from __future__ import annotations

from torch import nn

from vispeft.core.families import base_class, block_host
from vispeft.core.sites import Site
from vispeft.core.units import AffineUnit, DeltaUnit, ParallelUnit, Unit, WeightUnit
from vispeft.errors import SiteError
from vispeft.hosts.base import Host
from vispeft.hosts.depth import DropPathHost
from vispeft.hosts.layers import (
    BIASES,
    ConvHost,
    IdentityHost,
    LinearHost,
    NormHost,
    ReaderHost,
    ReadLinearHost,
    ShiftlessNormHost,
)

__all__ = ["carrying_host", "host_for", "owner_host"]

Choice = tuple[type[Host], tuple[str, ...]]
"""Kind of host, and names of the tensors computed on read."""

_IN_LINEAR = frozenset({"weight", "delta", "affine", "input", "sequential", "branch"})
_IN_CONV = frozenset({"weight", "delta", "affine"})
_OF_MODEL = frozenset({"tokens", "stream", "queries", "side"})
_BRANCHING = ("attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
"""Roles of the layers that blocks run on all streams."""
NORMS_WITHOUT_BIAS = frozenset({"RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32", "RMSNorm"})


def owner_host() -> Choice:
    """Choose the host of a module that reads a projection's weight.

    Returns:
        Kind of host, and names of the tensors computed on read.
    """
    return ReaderHost, BIASES


def carrying_host(module: nn.Module) -> type[Host]:
    """Choose the host of a block, an attention module or an MLP through which streams pass.

    Args:
        module: timm's module.

    Raises:
        SiteError: If its family has none.
    """
    found = block_host(module)
    if found is None:
        raise SiteError(
            f"There is no host that passes streams beside the tokens through a {base_class(module).__name__}."
        )
    return found


def host_for(site: Site, module: nn.Module, unit: Unit) -> Choice:
    """Choose the host a unit needs at a site.

    Args:
        site: The place.
        module: timm's module there.
        unit: The unit.

    Returns:
        Kind of host, and names of the tensors computed on read.

    Raises:
        SiteError: If no host carries this kind of unit there.
    """
    if unit.kind == "selection":
        return Host, tuple(name for name, _ in unit.named_parameters())
    if unit.kind == "shared" or (unit.kind in _OF_MODEL and site.role == "tokens"):
        return Host, ()
    if site.rows is not None and not isinstance(unit, DeltaUnit | WeightUnit):
        raise SiteError(f"A unit of kind {unit.kind!r} acts on whole layers; {site.role!r} is a part of {site.path!r}.")
    if unit.kind == "branch" and site.role not in _BRANCHING:
        raise SiteError(
            f"A unit that starts streams was to act at {site.path!r} ({site.role}); streams start at "
            f"{', '.join(_BRANCHING)}."
        )
    if unit.kind == "depth":
        return DropPathHost, ()
    if isinstance(unit, ParallelUnit) and block_host(module) is not None:
        return carrying_host(module), ()
    if unit.kind == "prefix":
        return carrying_host(module), ()
    found = _layer_host(site, base_class(module), unit)
    if found is None:
        raise SiteError(
            f"A unit of kind {unit.kind!r} was to act at {site.path!r} ({site.role}), "
            f"but there is no host that carries it on a {base_class(module).__name__}."
        )
    return found


def _layer_host(site: Site, base: type[nn.Module], unit: Unit) -> Choice | None:
    """Choose the host of a single layer."""
    if issubclass(base, nn.Linear) and unit.kind in _IN_LINEAR:
        return (ReadLinearHost, ("weight",)) if site.reads_weight else (LinearHost, ())
    if issubclass(base, nn.Conv2d) and unit.kind in _IN_CONV:
        return ConvHost, ("bias", "weight")
    if not isinstance(unit, AffineUnit):
        return None
    if issubclass(base, nn.Identity):
        return IdentityHost, ()
    if base.__name__ in NORMS_WITHOUT_BIAS:
        return ShiftlessNormHost, ("weight",)
    return (NormHost, ("bias", "weight")) if issubclass(base, nn.LayerNorm) else None
