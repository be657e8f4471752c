"""Conversion of adapters from and to the names and shapes of the authors' public code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.adapters.attach import attach
from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import describe, unwrap
from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import ConfigError, FileError, UnknownNameError

__all__ = [
    "Source",
    "find_source",
    "list_sources",
    "load_official",
    "official_names",
    "register_source",
    "to_official",
]


@dataclass(frozen=True)
class Source:
    """A public code and the names of its tensors."""

    name: str
    """Name of the source."""
    method: Callable[[Mapping[str, Any], Mapping[str, Tensor], View], Method]
    """Builds the method from the file's metadata, its tensors and the model's view."""
    names: Callable[[Plan], dict[str, str]]
    """Maps our tensor names for a plan to the authors' names; ``{}`` in one stands for the numbers from 0 of tensors
    that are one tensor of ours, along its first axis. State that has no name there and does not train stays as the
    method starts it."""
    head: str | None = None
    """The authors' name of the classifier; None if it is timm's."""
    trailing: tuple[str, ...] = ()
    """Name endings of the tensors that have an additional last axis of length one (1x1 convolutions)."""
    ignored: tuple[str, ...] = ()
    """Parts of the names of tensors with which the public code computes nothing, or what no method here computes."""

    def ours(self, name: str, tensor: Tensor) -> Tensor:
        """Convert one of the authors' tensors to our shape."""
        return tensor.squeeze(-1) if name.endswith(self.trailing or ("\0",)) else tensor

    def theirs(self, name: str, tensor: Tensor) -> Tensor:
        """Convert one of our tensors to the authors' shape."""
        return tensor.unsqueeze(-1) if name.endswith(self.trailing or ("\0",)) else tensor


_SOURCES: dict[str, Source] = {}


def register_source(source: Source) -> None:
    """Add a public code.

    Args:
        source: The public code with its names.
    """
    _SOURCES[source.name] = source


def list_sources() -> list[str]:
    """List the public codes whose tensors can be read."""
    return sorted(_SOURCES)


def load_official(
    model: nn.Module, source: str, tensors: Mapping[str, Tensor], hyper: Mapping[str, Any] | None = None
) -> AdapterBank:
    """Attach an adapter from tensors under the names of the authors' public code.

    Args:
        model: The backbone the adapter belongs to.
        source: The public code, one of `list_sources`.
        tensors: The adapter's tensors; a classifier among them (``head.*``) becomes the adapter's classifier.
        hyper: The file's whole metadata, with JSON values decoded.

    Returns:
        The model's bank; the model's outputs equal those of the authors' model.

    Raises:
        UnknownNameError: If the source is not known.
        FileError: If tensors are missing, unknown or of the wrong shape; then the model is unchanged.
    """
    entry = find_source(source)
    tensors = {name: t for name, t in tensors.items() if not any(part in name for part in entry.ignored)}
    view = describe(unwrap(model))
    method = entry.method(hyper or {}, tensors, view)
    bank = attach(model, method, name=_free_name(model), verify=False)
    label = bank.active[-1]
    ours = {theirs: own for own, theirs in official_names(entry, bank, label).items()}
    place = f"{entry.head or view.head_path}."  # a model without a classifier gets the one in the file
    ours |= {name: f"head/{name.removeprefix(place)}" for name in tensors if name.startswith(place)}
    try:
        tensors = _joined(tensors, ours)
        unknown = [name for name in tensors if name not in ours]
        if unknown:
            raise FileError(
                f"{len(unknown)} of {len(tensors)} tensors have names that {source!r} does not use here, first "
                f"{', '.join(sorted(unknown)[:3])}; expected names like {', '.join(sorted(ours)[:3])}."
            )
        kept = {own: t for own, t in bank.state_dict(label).items() if own not in ours.values() and "head/" not in own}
        bank.load_state_dict(kept | {ours[name]: entry.ours(name, tensor) for name, tensor in tensors.items()}, label)
    except Exception:
        bank.detach(label)
        raise
    return bank


def to_official(bank: AdapterBank, source: str, grad: bool = False) -> dict[str, Tensor]:
    """Return the acting adapter's tensors under the authors' names.

    Args:
        bank: The bank; exactly one adapter must act.
        source: The public code, one of `list_sources`.
        grad: Return the gradients instead of the values.

    Returns:
        The tensors, those of the classifier under timm's names unless the source has its own.

    Raises:
        UnknownNameError: If the source is not known.
        ConfigError: If gradients are requested and there are none.
    """
    entry = find_source(source)
    label = bank.active[-1] if len(bank.active) == 1 else None
    try:
        names = official_names(entry, bank, label)
    except KeyError as error:
        method = bank.plan(label).method.name
        raise ConfigError(
            f"{source!r} has no name for {error} of a {method!r} adapter; is it the right source?"
        ) from None
    parameters, kept = bank.named_tensors(label), bank.state_dict(label)
    out: dict[str, Tensor] = {}
    for own, theirs in names.items():
        if grad and own not in parameters and own in kept:
            continue  # state that does not train
        tensor = parameters[own] if own in parameters else kept[own]
        if grad and tensor.grad is None:
            raise ConfigError(f"{theirs} has no gradient; call backward() on a loss of the adapted model first.")
        value = tensor.grad if grad else tensor
        assert value is not None
        parts = enumerate(value) if "{}" in theirs else [(0, value)]
        for index, part in parts:
            name = theirs.format(index) if "{}" in theirs else theirs
            out[name] = entry.theirs(name, part.detach().clone())
    return out


def _joined(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Put the authors' tensors that are one of ours into one, under their name with ``{}``.

    Raises:
        FileError: If their shapes differ.
    """
    found = dict(tensors)
    for name in (name for name in names if "{}" in name):
        parts: list[Tensor] = []
        while name.format(len(parts)) in found:
            parts.append(found.pop(name.format(len(parts))))
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise FileError(f"Tensors named {name.format('0, 1, ...')} are one tensor and have shapes {shapes}.")
        if parts:
            found[name] = torch.stack(parts)
    return found


def find_source(name: str) -> Source:
    """Look up a public code.

    Args:
        name: One of `list_sources`.

    Raises:
        UnknownNameError: If it is not known.
    """
    if name not in _SOURCES:
        raise UnknownNameError("source", name, _SOURCES)
    return _SOURCES[name]


def official_names(entry: Source, bank: AdapterBank, label: str | None) -> dict[str, str]:
    """Return the authors' name of each tensor of an adapter, including its classifier where the method trains it.

    Args:
        entry: The public code.
        bank: The bank.
        label: The adapter; may be None if only one acts.
    """
    names = entry.names(bank.plan(label))
    trains = bank.plan(label).method.trains_head()
    heads = [key for key in bank.named_tensors(label) if key.startswith("head/") and trains]
    place = entry.head or bank.view.head_path
    return {**names, **{key: f"{place}.{key.removeprefix('head/')}" for key in heads}}


def _free_name(model: nn.Module) -> str:
    bank = AdapterBank.of(model)
    taken = [] if bank is None else bank.names
    return next(name for name in ["default", *(f"official{i}" for i in range(len(taken) + 1))] if name not in taken)
