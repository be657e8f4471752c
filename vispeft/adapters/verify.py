"""The check that every trainable tensor gets a gradient."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.entry import UnitTensor
from vispeft.core.route import Route, Routing
from vispeft.core.sites import View
from vispeft.errors import VerificationError
from vispeft.hosts.model import UNITS

__all__ = ["Probe", "find_dead", "probe_images"]

logger = logging.getLogger(__name__)

SMALL = {torch.float64: 1e-12, torch.float32: 1e-6}
"""A gradient below this share of the largest one in its block may be the rounding error of a gradient that is zero in
exact arithmetic. It is computed again in another precision; on devices without float64, such as Apple's, zeros alone
count as none, since any other limit would refuse deep ladders and still take some rounding errors for gradients."""
SAME = 2.0**-18
"""Least share of a gradient computed in float32 that is left in float64, for it to be no rounding error. Errors shrink
by 2^-29, the ratio of the two precisions; a gradient that is small since the network is deep, or since a layer scale
comes behind it, stays as it is."""


def probe_images(model: nn.Module, view: View, batch: int = 1) -> Tensor:
    """Create noise images that a model accepts.

    Args:
        model: The timm model.
        view: Its description.
        batch: Number of images.

    Returns:
        (batch, channels, height, width), in the model's dtype and on its device, the same on every call.
    """
    reference = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    # The current size: set_input_size may have changed it since the model was described.
    size = getattr(cast(Any, model).patch_embed, "img_size", None) or view.img_size
    images = torch.randn(batch, view.in_chans, *size, generator=generator)
    return images.to(device=reference.device, dtype=reference.dtype)


@dataclass(frozen=True)
class Probe:
    """A model whose gradients are checked."""

    model: nn.Module
    """The timm model."""
    outer: nn.Module
    """The module to run: the model itself, or a wrapper around it."""
    view: View
    """Its description."""
    routing: Routing
    """Its routing."""


def find_dead(
    probe: Probe, routes: Sequence[Route], entries: list[UnitTensor], blocks: Mapping[str, int | None]
) -> None:
    """Run a forward and backward pass under each route, and raise for tensors without a gradient under all of them.

    Every unit is perturbed first: the first factor of LoRA, for example, gets no gradient while the second one is zero.
    Values, gradients, modes and random state are restored.

    Args:
        probe: The model.
        routes: The routes of one adapter, one for each of its tasks.
        entries: The adapter's tensors.
        blocks: Block index of each unit.

    Raises:
        VerificationError: If a tensor gets no gradient, or only one of rounding-error size.
    """
    if not entries:
        return
    dead = _dead_in_all_draws(probe, routes, entries, blocks, _filled_heads(probe.outer))
    if not dead:
        return
    # A randomly initialised SwinV2 has zero norm weights after its branches, which block all gradients.
    named = probe.outer.named_parameters()
    own = {id(entry.tensor) for entry in entries}
    zeros = {name: torch.ones_like(t) for name, t in named if id(t) not in own and not t.requires_grad and not t.any()}
    filled = {**zeros, **_filled_heads(probe.outer)}
    still = _dead_in_all_draws(probe, routes, entries, blocks, filled) if zeros else dead
    if not still:
        logger.warning(
            "%d of %d trainable tensors get no gradient while base tensors are all zero (%s). This happens in a model "
            "without pretrained weights; with such a base these tensors will not train.",
            len(dead),
            len(entries),
            ", ".join(list(zeros)[:3]),
        )
        return
    raise VerificationError(
        f"{len(still)} of {len(entries)} trainable tensors get no gradient: {', '.join(still[:6])}"
        f"{', ...' if len(still) > 6 else ''}. The model does not use the units there, or a unit's own "
        "forward pass leaves these tensors out; choose other roles, or pass verify=False if this is intended."
    )


def _filled_heads(model: nn.Module) -> dict[str, Tensor]:
    """Create values for classifiers initialised to zero, as in many recipes, since these block all gradients."""
    generator = torch.Generator().manual_seed(2)
    heads = [(name, t) for name, t in _outside_units(model) if t.requires_grad and t.ndim > 1]
    return {name: torch.randn(t.shape, generator=generator).to(t) for name, t in heads if not t.any()}


def _outside_units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters that belong to no unit, without walking through the units of many adapters."""
    yield from ((f"{path}{name}", tensor) for name, tensor in module._parameters.items() if tensor is not None)
    for name, child in module.named_children():
        if name != UNITS:
            yield from _outside_units(child, f"{path}{name}.")


def _dead_in_all_draws(
    probe: Probe,
    routes: Sequence[Route],
    entries: list[UnitTensor],
    blocks: Mapping[str, int | None],
    replaced: dict[str, Tensor],
) -> list[str]:
    """List the tensors that get no gradient in any of `DRAWS` draws; the first draw nearly always suffices."""
    dead = [str(entry) for entry in entries]
    for draw in range(DRAWS):
        for route in routes:
            with probe.routing.using(route):
                found = set(_dead_tensors(probe, entries, blocks, replaced, draw))
            dead = [name for name in dead if name in found]
        if not dead:
            break
    return dead


DRAWS = 12
"""Number of draws: for some random signs a narrow layer before a ReLU outputs only zeros, which is no fault."""


def _dead_tensors(
    probe: Probe,
    entries: list[UnitTensor],
    blocks: Mapping[str, int | None],
    replaced: dict[str, Tensor],
    draw: int,
) -> list[str]:
    """List the tensors that get no gradient, with some tensors of the base replaced."""
    named = {str(entry): entry for entry in entries}
    reference = next(probe.model.parameters())
    double, alone = reference.dtype == torch.float64, not _has_float64(reference.device)
    own, other = (torch.float64, torch.float32) if double else (torch.float32, torch.float64)
    with _state_restored(probe.outer, entries):
        _perturb(entries, draw)
        sizes = _gradient_sizes(probe, named, replaced, draw, own)
        least = 0.0 if alone else SMALL[own]
        largest: dict[int | None, float] = defaultdict(float)
        for name, entry in named.items():
            largest[blocks[entry.key]] = max(largest[blocks[entry.key]], sizes[name])
        small = {
            name: entry
            for name, entry in named.items()
            if entry.name not in entry.unit.zero_gradient and not sizes[name] > least * largest[blocks[entry.key]]
        }
        if alone or not any(sizes[name] > 0 for name in small):
            return list(small)
        again = _gradient_sizes(probe, small, replaced, draw, other)
    narrow, wide = (again, sizes) if double else (sizes, again)
    return [name for name in small if not (sizes[name] > 0 and wide[name] > SAME * narrow[name])]


def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


@torch.no_grad()
def _perturb(entries: list[UnitTensor], draw: int) -> None:
    """Move tensors away from their values; from the second draw on, with other signs."""
    generator = torch.Generator().manual_seed(1 + draw)
    for tensor in (entry.tensor for entry in entries):
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        if draw:
            tensor.mul_(torch.where(noise > 0, 1.0, -1.0))
        tensor.add_(noise * (0.02 + 0.1 * tensor.std(correction=0)))


def _gradient_sizes(
    probe: Probe, entries: Mapping[str, UnitTensor], replaced: dict[str, Tensor], draw: int, dtype: torch.dtype
) -> dict[str, float]:
    """Compute the largest entry of each tensor's gradient, with the model in a precision; 0 for no gradient."""
    generator = torch.Generator().manual_seed(1000 + draw)
    out = _run(probe.outer, probe_images(probe.model, probe.view), replaced, dtype)
    maps = [out] if isinstance(out, Tensor) else list(out)
    weights = [torch.randn(m.shape, generator=generator).to(m.device) for m in maps]
    loss = torch.stack([(m.to(dtype) * weight).sum() for m, weight in zip(maps, weights, strict=True)]).sum()
    gradients: Sequence[Tensor | None] = [None] * len(entries)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, [entry.tensor for entry in entries.values()], allow_unused=True)
    return {
        name: 0.0 if gradient is None else float(gradient.abs().max())
        for name, gradient in zip(entries, gradients, strict=True)
    }


def _run(model: nn.Module, images: Tensor, base: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Run a model in a precision, with some tensors replaced."""
    if images.dtype == dtype:
        return torch.func.functional_call(model, base, (images,)) if base else model(images)
    tensors = {
        name: t.to(dtype) if t.is_floating_point() else t for name, t in {**dict(_tensors(model)), **base}.items()
    }
    return torch.func.functional_call(model, tensors, (images.to(dtype),))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def _state_restored(model: nn.Module, entries: list[UnitTensor]) -> Iterator[None]:
    """Restore values, ``requires_grad`` flags, modes, unit buffers and random state on exit."""
    tensors = [entry.tensor for entry in entries]
    values = [tensor.detach().clone() for tensor in tensors]
    switches = [tensor.requires_grad for tensor in tensors]
    train = [module for module in model.modules() if module.training]
    # In evaluation mode only a unit could write into a buffer.
    buffers = [(b, b.detach().clone()) for unit in {e.unit: None for e in entries} for b in unit.buffers()]
    random = torch.get_rng_state()
    if train:
        model.eval()
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)  # a schedule may have turned some off
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value, switch in zip(tensors, values, switches, strict=True):
                tensor.copy_(value).requires_grad_(switch)
            for buffer, value in buffers:
                buffer.copy_(value)
        for module in train:
            module.training = True
