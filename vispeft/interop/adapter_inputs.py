"""Adapters as inputs of one exported backbone: low-rank terms, scales and shifts, and the classifier.

The exported graph is the plain backbone with a low-rank term, and a scale and a shift, at each place where one of its
adapters acts. Their tensors are inputs of the graph, padded to one shape, so that any number of adapters shares one
file of the backbone. Zeros in a padded factor add nothing, and a scale of one with a shift of zero changes nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import base_class
from vispeft.errors import ConfigError, ExportError, FileError, SiteError, counted
from vispeft.interop.staging import staged

__all__ = ["AdapterInputs", "BackboneWithInputs", "InputLayout", "adapter_inputs", "read_inputs", "write_inputs"]

A, B, SCALE, SHIFT = "lora_a", "lora_b", "scale", "shift"
"""Names of the inputs of a place behind its path: two factors, a scale and a shift of the output."""
HEAD_WEIGHT, HEAD_BIAS = "classifier.weight", "classifier.bias"
"""Names of the inputs of the classifier."""
KINDS = ("delta", "affine", "depth", "shared")
"""Kinds of units that have a form as inputs; stochastic depth does nothing in evaluation, and shared tensors are in the
factors of the units that use them."""


@dataclass(frozen=True)
class InputLayout:
    """The inputs of an exported backbone besides the images."""

    rank: int
    """Rank to which the low-rank terms of each layer are padded."""
    classes: int
    """Outputs to which classifiers are padded."""
    features: int
    """Inputs of the classifier."""
    low_rank: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layers with a low-rank term: outputs and inputs by path."""
    affine: dict[str, int] = field(default_factory=dict)
    """Layers with a scale and a shift: channels by path."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each input by name, in the order of the graph."""
        found: dict[str, tuple[int, ...]] = {}
        for path, (rows, columns) in self.low_rank.items():
            found |= {f"{path}.{A}": (self.rank, columns), f"{path}.{B}": (rows, self.rank)}
        for path, channels in self.affine.items():
            found |= {f"{path}.{SCALE}": (channels,), f"{path}.{SHIFT}": (channels,)}
        return {**found, HEAD_WEIGHT: (self.classes, self.features), HEAD_BIAS: (self.classes,)}

    def neutral(self) -> dict[str, Tensor]:
        """Make the inputs of the plain backbone, with a classifier of zeros."""
        return {
            name: torch.ones(shape) if name.endswith(f".{SCALE}") else torch.zeros(shape)
            for name, shape in self.shapes().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputLayout:
        """Read what `to_dict` gave.

        Args:
            values: The plain values.
        """
        sizes = {path: (int(rows), int(columns)) for path, (rows, columns) in values["low_rank"].items()}
        return cls(values["rank"], values["classes"], values["features"], sizes, dict(values["affine"]))


@dataclass(frozen=True)
class AdapterInputs:
    """The terms of one adapter before they are padded."""

    name: str
    """Its name, for messages."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """Factors (rank, inputs) and (outputs, rank) of each layer, the multiplier in the second."""
    affine: dict[str, tuple[Tensor, Tensor]]
    """Scale and shift of each layer."""
    weight: Tensor
    """Weight of the classifier, (classes, features)."""
    bias: Tensor
    """Its bias, (classes,)."""
    class_names: tuple[str, ...]
    """Names of the classes; empty where they have none."""

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max((a.shape[0] for a, _ in self.factors.values()), default=0)

    @staticmethod
    def layout(adapters: Sequence[AdapterInputs], rank: int | None = None, classes: int | None = None) -> InputLayout:
        """Choose inputs that all adapters fit into.

        Args:
            adapters: The adapters, at least one.
            rank: Rank of the inputs; None for the largest of the adapters.
            classes: Outputs of the classifier; None for the most of the adapters.

        Raises:
            ConfigError: If an adapter does not fit, or their features differ.
        """
        widths = {adapter.weight.shape[1] for adapter in adapters}
        if len(widths) > 1:
            raise ConfigError(f"The classifiers read {sorted(widths)} features; one graph has one number of them.")
        layout = InputLayout(
            max(adapter.rank for adapter in adapters) if rank is None else rank,
            max(len(adapter.weight) for adapter in adapters) if classes is None else classes,
            widths.pop(),
            {p: (len(b), a.shape[1]) for adapter in adapters for p, (a, b) in adapter.factors.items()},
            {p: len(scale) for adapter in adapters for p, (scale, _) in adapter.affine.items()},
        )
        for adapter in adapters:
            adapter.padded(layout)
        return layout

    def padded(self, layout: InputLayout) -> dict[str, Tensor]:
        """Make the inputs of a graph.

        Args:
            layout: The inputs of the graph.

        Returns:
            Tensors by name, float32.

        Raises:
            ConfigError: If the adapter acts where the graph has no inputs, or has a larger rank or more classes.
        """
        beyond = [path for path in self.factors if path not in layout.low_rank]
        beyond += [path for path in self.affine if path not in layout.affine]
        if beyond:
            raise ConfigError(
                f"Adapter {self.name!r} acts at {beyond[0]}, where the exported backbone has no inputs. Export the "
                "backbone again, together with this adapter."
            )
        for what, own, room in (("rank", self.rank, layout.rank), ("classes", len(self.weight), layout.classes)):
            if own > room:
                raise ConfigError(
                    f"Adapter {self.name!r} has {what} {own}, and the inputs of the exported backbone have room for "
                    f"{room}. Export it with --{what} {own} or more."
                )
        made = layout.neutral()
        for path, (a, b) in self.factors.items():
            made[f"{path}.{A}"][: len(a)], made[f"{path}.{B}"][:, : len(a)] = a, b
        for path, (scale, shift) in self.affine.items():
            made[f"{path}.{SCALE}"], made[f"{path}.{SHIFT}"] = scale.clone(), shift.clone()
        made[HEAD_WEIGHT][: len(self.weight)], made[HEAD_BIAS][: len(self.bias)] = self.weight, self.bias
        return made


@torch.no_grad()
def adapter_inputs(bank: AdapterBank, name: str | None = None) -> AdapterInputs:
    """Express an adapter by low-rank terms, scales and shifts.

    Args:
        bank: The bank of its model.
        name: The adapter; None where only one acts.

    Raises:
        SiteError: If the method changes the backbone in another way.
        ConfigError: If the adapter has tasks, or no linear classifier.
    """
    plan, units, label = bank.plan(name), bank.units(name), name or bank.active[0]
    method = plan.method.name
    if bank.tasks(name):
        raise ConfigError(f"Adapter {label!r} has tasks, each with terms of its own; adapters as inputs have one.")
    head = bank.head(name)
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"Adapter {label!r} has {'no classifier' if head is None else f'a {type(head).__name__} as classifier'}; "
            "as inputs of a graph it is one linear layer."
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    affine: dict[str, tuple[Tensor, Tensor]] = {}
    for item in plan.items:
        unit: Any = units[item.key]
        path, layer = item.site.path, bank.model.get_submodule(item.site.path)
        convolved = unit.kind == "delta" and issubclass(base_class(layer), nn.Conv2d)
        if unit.kind not in KINDS or item.site.reads_weight or convolved:
            raise SiteError(
                f"Adapter {label!r} ({method}) has a unit of kind {unit.kind!r} at {path or 'the model'} "
                f"({item.site.role}). As inputs of a graph there are low-rank terms of linear layers, such as LoRA's, "
                "and scales and shifts, as SSF's. Export this adapter merged, or in a file of its own."
            )
        if unit.kind == "delta":
            rows = int(cast(Any, layer).out_features)
            for branch in unit.branches():
                gain = 1.0 if unit.gain is None else float(unit.gain)
                a = branch.a.detach().float()
                b = functional.pad(
                    branch.b.detach().float() * branch.scale * gain, (0, 0, branch.start, rows - branch.stop)
                )
                before = factors.get(path)
                factors[path] = (a, b) if before is None else (torch.cat([before[0], a]), torch.cat([before[1], b], 1))
        elif unit.kind == "affine":
            gain = 1.0 if unit.gain is None else float(unit.gain)
            scale, shift = 1 + gain * (unit.scale.detach().float() - 1), gain * unit.shift.detach().float()
            before = affine.get(path)
            affine[path] = (scale, shift) if before is None else (scale * before[0], scale * before[1] + shift)
    weight = head.weight.detach().float().clone()
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().float().clone()
    names = tuple(bank.notes(name).get("class_names") or ())
    return AdapterInputs(label, factors, affine, weight, bias, names)


class _Place(nn.Module):
    """A layer with the terms that were given for this pass."""

    def __init__(self, layer: nn.Module, path: str, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.path = layer, path
        object.__setattr__(self, "given", _Given(given))

    def forward(self, x: Tensor) -> Tensor:
        given: dict[str, Tensor] = self.__dict__["given"].tensors
        out: Tensor = self.layer(x)
        a = given.get(f"{self.path}.{A}")
        if a is not None:
            out = out + functional.linear(functional.linear(x, a), given[f"{self.path}.{B}"])
        scale = given.get(f"{self.path}.{SCALE}")
        if scale is None:
            return out
        wide = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        return out * scale.view(wide) + given[f"{self.path}.{SHIFT}"].view(wide)


class _Given:
    """The tensors of the present pass; no container of modules or tensors, so that a trace sees no attribute change."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


class BackboneWithInputs(nn.Module):
    """A plain backbone whose adapter is an argument: images and the tensors of `InputLayout` in, scores out."""

    def __init__(self, model: nn.Module, layout: InputLayout) -> None:
        """Copy a backbone, without its adapters.

        Args:
            model: A timm model with adapters; it is left as it is.
            layout: The inputs.
        """
        super().__init__()
        plain = copy.deepcopy(model).float().eval().requires_grad_(False)
        bank = AdapterBank.of(plain)
        view = None if bank is None else bank.view
        for name in [] if bank is None else bank.names:
            cast(AdapterBank, bank).detach(name)
        head = "head" if view is None else view.head_path
        if head is None:
            raise ConfigError("The backbone has no classifier; create it with num_classes.")
        self.given: dict[str, Tensor] = {}
        for path in {**layout.low_rank, **layout.affine}:
            _put(plain, path, _Place(plain.get_submodule(path), path, self.given))
        _put(plain, head, nn.Identity())
        self.model = plain
        self.eval()

    def forward(self, images: Tensor, adapter: dict[str, Tensor]) -> Tensor:
        """Compute scores (B, classes).

        Args:
            images: (B, 3, H, W).
            adapter: The tensors of the layout.
        """
        self.given.update(adapter)
        try:
            features = self.model(images)
        finally:
            self.given.clear()
        return functional.linear(features, adapter[HEAD_WEIGHT], adapter[HEAD_BIAS])


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module below a model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def write_inputs(path: str | Path, adapter: AdapterInputs, layout: InputLayout, notes: Mapping[str, Any]) -> Path:
    """Write the inputs of one adapter as a safetensors file, whose tensors have the names of the graph's inputs.

    Args:
        path: The file; it must not exist.
        adapter: The adapter.
        layout: The inputs of the graph.
        notes: Further values for the metadata, each as JSON.

    Raises:
        ConfigError: If the file exists, or the adapter does not fit.
        FileError: If it cannot be written.
    """
    kept = {**notes, "class_names": list(adapter.class_names), "classes": len(adapter.weight)}
    with staged(Path(path)) as place:
        tensors = {name: tensor.contiguous() for name, tensor in adapter.padded(layout).items()}
        save_file(tensors, place, {key: json.dumps(value) for key, value in kept.items()})
    return Path(path)


def read_inputs(path: str | Path, layout: InputLayout | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_inputs` wrote, for ``session.run(None, {"images": images, **inputs})``.

    Args:
        path: The file.
        layout: The inputs of the graph, to compare names and shapes with.

    Returns:
        numpy arrays by name, and the metadata.

    Raises:
        FileError: If the file cannot be read, or does not fit the graph.
    """
    try:
        with safe_open(path, "np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            notes = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise FileError(f"{path} cannot be read as the inputs of an adapter: {error}.") from error
    if layout is not None:
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        wanted = layout.shapes()
        other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if other:
            raise FileError(
                f"{path} does not fit the exported backbone: {counted(len(other), 'input')} differ, first {other[0]}, "
                f"{found.get(other[0])} in the file and {wanted.get(other[0])} in the graph."
            )
    return arrays, notes


def largest_difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Return the largest difference over the largest wanted output.

    Raises:
        ExportError: If a value is not finite.
    """
    pairs = list(zip(found, wanted, strict=True))
    worst = max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)) for a, b in pairs
    )
    if not worst < float("inf"):
        raise ExportError("The exported backbone gives values that are not finite. No file was left.")
    return worst
