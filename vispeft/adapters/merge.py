"""Merging: writing adapters into plain timm layers, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vispeft.adapters.hosts import Host, HostState, ShiftlessNormHost, base_class, put_back, take_off
from vispeft.adapters.model_host import ModelHost
from vispeft.adapters.sites import Site, View
from vispeft.errors import MergeError

__all__ = ["Merged", "MergeReport", "apply_merge", "plan_merge", "undo_merge"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of outputs after a merge, over the largest output. Merging is exact algebra carried out in double
precision; what is left is the rounding of the merged weights to the base's type, which each later layer carries on."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    merged: tuple[str, ...]
    """Paths of the layers that changed."""
    created: tuple[str, ...]
    """State-dict keys the plain model did not have before."""
    kept: dict[str, str]
    """Paths of the layers that stay adapted, with the reason (``partial=True`` only)."""
    max_error: float
    """Largest difference of outputs on noise, over the largest output."""


@dataclass
class Merged:
    """A merge that can be undone."""

    report: MergeReport
    names: tuple[str, ...]
    """The adapters that were active."""
    hosts: list[HostState] = field(default_factory=list)
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    replaced: dict[str, Tensor | None] = field(default_factory=dict)
    """The originals by state-dict key."""
    keep_original: bool = True


def plan_merge(model: nn.Module, view: View, partial: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Compute the plain tensors of every layer that active units change, without changing anything.

    Args:
        model: The adapted model.
        view: Its description.
        partial: Whether layers without a plain form may stay adapted.

    Returns:
        New tensors in double precision by path and name, and the layers that stay, with reasons.

    Raises:
        MergeError: If a layer has no plain form and `partial` is not set, or a merged tensor is not finite.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    stays: dict[str, str] = {}
    shifts: list[tuple[Site, Tensor]] = []
    sites = {site.path: site for site in view.sites if site.rows is None and site.kind == "norm"}
    for path, host in _live_hosts(model):
        reason = host.no_plain_form()
        if reason is None and isinstance(host, ShiftlessNormHost):
            shift = host.trailing_shift()
            if shift is not None:
                if sites[path].consumers:
                    shifts.append((sites[path], shift.detach().double()))
                else:
                    reason = (
                        f"a {base_class(host).__name__} has no bias, and its output is not read by linear layers alone"
                    )
        if reason is not None:
            stays[path] = reason
            continue
        try:
            new = {name: host.plain(name) for name in host.plain_names()}
        except NotImplementedError as error:
            stays[path] = str(error)
            continue
        tensors[path] = {name: tensor for name, tensor in new.items() if tensor is not None}
    if stays and not partial:
        listing = "; ".join(f"{path or '(model)'}: {reason}" for path, reason in list(stays.items())[:4])
        raise MergeError(
            f"{len(stays)} of {len(stays) + len(tensors)} adapted layers have no plain layer that does the same "
            f"({listing}). merge(partial=True) merges the others and leaves these adapted."
        )
    for site, shift in shifts:
        _fold_forward(model, site, shift, tensors)
    for path, new in tensors.items():
        for name, tensor in new.items():
            if not torch.isfinite(tensor).all():
                raise MergeError(
                    f"The merged {path}.{name} is not finite. Nothing was changed; look at the adapter's tensors "
                    "there, which training must have driven off."
                )
    return tensors, stays


def _live_hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    for path, module in model.named_modules():
        if isinstance(module, Host) and any(True for _ in module.units(nn.Module)):
            yield path, module


def _fold_forward(model: nn.Module, site: Site, shift: Tensor, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Move a shift behind a norm into the bias of the linear layers that read it: ``W (n + s) + b = W n + (b + W s)``."""
    for path in site.consumers:
        layer = model.get_submodule(path)
        new = tensors.setdefault(path, {})
        weight = new.get("weight", layer.weight.detach().double())
        bias = new.get("bias")
        if bias is None:
            bias = torch.zeros(weight.shape[0]).to(weight) if layer.bias is None else layer.bias.detach().double()
        new["bias"] = bias + weight @ shift


def apply_merge(model: nn.Module, tensors: dict[str, dict[str, Tensor]], stays: dict[str, str], merged: Merged) -> None:
    """Put plain tensors into place and take the hosts off.

    Args:
        model: The adapted model.
        tensors: What `plan_merge` computed.
        stays: Layers that stay adapted.
        merged: Filled with what undoing needs.
    """
    dtype = next(model.parameters()).dtype
    for path, new in tensors.items():
        layer = model.get_submodule(path)
        for name, tensor in new.items():
            old = layer._parameters.get(name)
            merged.originals.append((layer, name, old))
            merged.replaced[f"{path}.{name}" if path else name] = old
            layer._parameters[name] = nn.Parameter(tensor.to(dtype if old is None else old.dtype), requires_grad=False)
    hosts = [(path, module) for path, module in model.named_modules() if isinstance(module, Host)]
    for path, module in hosts:
        keeps_model = isinstance(module, ModelHost) and bool(stays)
        if path not in stays and not keeps_model:
            merged.hosts.append(take_off(module))


def undo_merge(merged: Merged) -> None:
    """Put the original tensors and the hosts back.

    Args:
        merged: What `apply_merge` filled.
    """
    for layer, name, old in reversed(merged.originals):
        layer._parameters[name] = old
    for state in reversed(merged.hosts):
        put_back(state)
