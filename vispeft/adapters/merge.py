"""Merging of adapters into plain timm layers, and its exact reversal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.verify import probe_images
from vispeft.core.families import base_class
from vispeft.core.generated import MakesTensors
from vispeft.core.modes import evaluating
from vispeft.core.sites import Site, View
from vispeft.errors import MergeError
from vispeft.hosts.base import Host, HostState, put_back, take_off
from vispeft.hosts.head import HeadHost
from vispeft.hosts.layers import ReadLinearHost, ShiftlessNormHost
from vispeft.hosts.model import ModelHost
from vispeft.hosts.token_merging import without_merging

__all__ = ["MergeReport", "Merged", "merge_model", "undo_merge"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed difference of outputs after a merge, over the largest output. Merging is exact algebra in double
precision; the remaining error is the rounding of merged weights to the base's dtype, propagated by later layers."""


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    merged: tuple[str, ...]
    """Paths of the changed layers."""
    created: tuple[str, ...]
    """New state-dict keys of the plain model."""
    removed: tuple[str, ...]
    """State-dict keys the plain model no longer has."""
    kept: dict[str, str]
    """Reasons by path of the layers that stay adapted (``partial=True`` only)."""
    max_error: float
    """Largest difference of outputs for a noise image, over the largest output."""


@dataclass
class Merged:
    """A merge that can be undone."""

    report: MergeReport
    hosts: list[HostState] = field(default_factory=list)
    originals: list[tuple[dict[str, Any], str, Tensor | None]] = field(default_factory=list)
    replaced: dict[str, Tensor | None] = field(default_factory=dict)
    """The originals by state-dict key."""
    keep_original: bool = True
    fingerprint: dict[str, Any] | None = None
    """The base's fingerprint, if the originals are not kept."""
    written: list[tuple[dict[str, Any], str, torch.dtype | None, float]] = field(default_factory=list)
    """Dtype and sum of the merged tensors, to detect later changes."""


Plain = dict[str, Tensor | None]
"""New tensors by state-dict name, in double precision; None for those to remove."""


def merge_model(model: nn.Module, view: View, partial: bool) -> Merged:
    """Merge the acting units into plain layers, and compare outputs before and after.

    Args:
        model: The adapted model.
        view: Its description.
        partial: Whether layers without a plain form may stay adapted.

    Returns:
        The merge, which can be undone.

    Raises:
        MergeError: If a layer has no plain form and `partial` is not set, a merged tensor is not finite, or the outputs
            differ beyond rounding; then nothing is changed.
    """
    for module in model.modules():
        if isinstance(module, MakesTensors):
            module.generated.drop()  # changes through ``tensor.data`` do not invalidate it
    probe = probe_images(model, view)
    tensors, stays = plan_merge(model, view, partial)
    with without_merging(cast(ModelHost, model).routing):  # rounding could change which tokens are merged
        return _merged(model, probe, tensors, stays)


def _merged(model: nn.Module, probe: Tensor, tensors: Plain, stays: dict[str, str]) -> Merged:
    """Install the plain tensors, and undo that where outputs for noise images differ beyond rounding."""
    before = outputs(model, probe)
    if not all(torch.isfinite(tensor).all() for tensor in before):
        raise MergeError("The adapted model's outputs are not finite, so nothing was merged; check its tensors.")
    merged = Merged(MergeReport((), (), (), {}, 0.0))
    apply_merge(model, tensors, stays, merged)
    error = difference(outputs(model, probe), before)
    if not error <= TOLERANCE[probe.dtype]:
        undo_merge(merged)
        exact = probe.dtype in (torch.float32, torch.float64)
        advice = (
            "In a method of your own: a unit's fold_weight, fold_bias or input_shift is not what its forward pass does."
            if exact
            else "Merge in float32 or better."
        )
        raise MergeError(
            f"After merging, outputs differ by {error:.1e} of the largest one; {TOLERANCE[probe.dtype]:.0e} is "
            f"rounding in {probe.dtype}. Nothing was changed. {advice}"
        )
    changed = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    created = tuple(name for name, old in merged.replaced.items() if old is None)
    removed = tuple(name for name in merged.replaced if tensors[name] is None)
    merged.report = MergeReport(changed, created, removed, stays, error)
    return merged


def plan_merge(model: nn.Module, view: View, partial: bool) -> tuple[Plain, dict[str, str]]:
    """Compute the plain tensors of every layer that acting units change, without changing the model.

    Args:
        model: The adapted model.
        view: Its description.
        partial: Whether layers without a plain form may stay adapted.

    Returns:
        The new tensors, and the layers that stay adapted with reasons.

    Raises:
        MergeError: If a layer has no plain form and `partial` is not set, or a merged tensor is not finite.
    """
    tensors: Plain = {}
    plains: dict[str, Plain] = {}
    stays: dict[str, str] = {}
    hosts = [(path, module) for path, module in model.named_modules() if isinstance(module, Host) and module.acts()]
    norms = {site.path: site for site in view.sites if site.rows is None and site.kind == "norm"}
    for path, host in hosts:
        reason = host.no_plain_form() or _set_by_others(host) or _lost_shift(host, norms.get(path))
        try:
            plain = {} if reason else host.plain_tensors()
        except NotImplementedError as error:
            reason = str(error)
        if reason:
            stays[path] = reason
        else:
            plains[path] = plain
    stays |= _lending(hosts, stays) | _read_by(hosts, stays)
    for path, plain in plains.items():
        if path not in stays:
            tensors.update({f"{path}.{name}" if path else name: tensor for name, tensor in plain.items()})
    if stays and not partial:
        listing = "; ".join(f"{path or '(model)'}: {reason}" for path, reason in list(stays.items())[:4])
        advice = "merge(partial=True) merges the others and leaves these adapted."
        if len(stays) == len(hosts):
            advice = "Nothing of this adapter merges: keep it as an adapter, which loads onto any copy of the backbone."
        raise MergeError(
            f"{len(stays)} of {len(hosts)} adapted layers have no plain layer that does the same ({listing}). {advice}"
        )
    for path, host in hosts:
        if path not in stays and isinstance(host, ShiftlessNormHost):
            _fold_forward(model, norms[path], host.trailing_shift(), tensors)
    for name, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise MergeError(
                f"The merged {name} is not finite. Nothing was changed; check the adapter's tensors there, which "
                "probably diverged in training."
            )
    return tensors, stays


def _lending(hosts: list[tuple[str, Host]], stays: dict[str, str]) -> dict[str, str]:
    """Find layers that must stay adapted since other such layers use their tensors."""
    lenders = {id(unit.lender) for path, host in hosts if path in stays for unit in host.acting.units()}
    return {
        path: "layers that stay adapted use its tensors"
        for path, host in hosts
        if path not in stays and any(id(unit) in lenders for unit in host.acting.units())
    }


def _read_by(hosts: list[tuple[str, Host]], stays: dict[str, str]) -> dict[str, str]:
    """Find projections that must stay adapted since the attention module with their biases does."""
    return {
        path: "the attention that holds its biases stays adapted"
        for path, host in hosts
        if isinstance(host, ReadLinearHost) and path not in stays and path.rpartition(".")[0] in stays
    }


def _set_by_others(host: Host) -> str | None:
    """Return why a merged tensor would be overwritten; None if it would not."""
    names = [name for name in ("weight", "bias") if isinstance(host.__dict__.get(name), Tensor)]
    if not names:
        return None
    return f"PyTorch sets its {names[0]} on every call; call torch.nn.utils.prune.remove (or remove_weight_norm) first"


def _lost_shift(host: Host, site: Site | None) -> str | None:
    """Return why a shift after a norm without a bias cannot be merged; None if it can."""
    if not isinstance(host, ShiftlessNormHost) or host.trailing_shift() is None:
        return None
    if site is not None and site.consumers:
        return None
    return f"a {base_class(host).__name__} has no bias, and its output is not read by linear layers alone"


def _fold_forward(model: nn.Module, site: Site, shift: Tensor | None, tensors: Plain) -> None:
    """Move a shift after a norm into the biases of its readers: ``W (n + s) + b = W n + (b + W s)``."""
    if shift is None:
        return
    for path in site.consumers:
        layer = cast(nn.Linear, model.get_submodule(path))
        weight = tensors.get(f"{path}.weight")
        if weight is None:
            weight = layer.weight.detach().double()
        bias = tensors.get(f"{path}.bias")
        if bias is None:
            bias = torch.zeros(weight.shape[0]).to(weight) if layer.bias is None else layer.bias.detach().double()
        tensors[f"{path}.bias"] = bias + weight @ shift.detach().double()


def apply_merge(model: nn.Module, tensors: Plain, stays: dict[str, str], merged: Merged) -> None:
    """Install the plain tensors and remove the hosts.

    Args:
        model: The adapted model.
        tensors: The tensors from `plan_merge`.
        stays: Layers that stay adapted.
        merged: Filled with the state that `undo_merge` needs.
    """
    dtype = next(model.parameters()).dtype
    for full, tensor in tensors.items():
        path, _, name = full.rpartition(".")
        layer = model.get_submodule(path)
        store = layer._buffers if name in layer._buffers else layer._parameters
        old = store.get(name)
        merged.originals.append((store, name, old))
        if name not in layer._non_persistent_buffers_set:
            merged.replaced[full] = old
        kind = dtype if old is None else old.dtype
        new = None if tensor is None else nn.Parameter(tensor.to(kind), requires_grad=False)
        store[name] = new
        merged.written.append((store, name, *_trace(new)))
    for path, module in list(model.named_modules()):
        stays_host = path in stays or isinstance(module, HeadHost) or (isinstance(module, ModelHost) and bool(stays))
        if isinstance(module, Host) and not stays_host:
            merged.hosts.append(take_off(module))


def undo_merge(merged: Merged) -> None:
    """Restore the original tensors and the hosts.

    Args:
        merged: The merge, as filled by `apply_merge`.
    """
    for store, name, dtype, total in merged.written:
        found = _trace(store.get(name))
        # A model cast to another dtype in between is still the merged one.
        if found[0] == dtype and found[1] != total:
            raise MergeError(
                f"The merged {name} was changed since, so undoing the merge would mix two models. Create the backbone "
                "again and load the adapter."
            )
    for store, name, old in reversed(merged.originals):
        new = store.get(name)
        if old is not None and new is not None:
            old.data = old.data.to(device=new.device, dtype=new.dtype)  # the model may have been moved since
        store[name] = old
    for state in reversed(merged.hosts):
        put_back(state)


def _trace(tensor: Tensor | None) -> tuple[torch.dtype | None, float]:
    return (None, 0.0) if tensor is None else (tensor.dtype, float(tensor.detach().double().sum()))


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a model in evaluation mode and return all of its outputs, features included, in double precision.

    Args:
        model: The model; its mode is restored.
        images: (B, C, H, W).
    """
    with evaluating(model), torch.no_grad():
        result = model(images)
        out = [result] if isinstance(result, Tensor) else list(result)
        if hasattr(model, "forward_features"):
            out.append(cast(Any, model).forward_features(images))
    return [tensor.double() for tensor in out]


def difference(after: list[Tensor], before: list[Tensor]) -> float:
    """Compute the largest difference of any output, relative to that output's largest entry."""
    pairs = zip(after, before, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)
