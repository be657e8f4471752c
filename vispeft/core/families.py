"""The supported model families: the timm classes of each and the function that describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from vispeft.core.providers import fill
from vispeft.core.sites import View
from vispeft.errors import BackboneError

__all__ = [
    "Family",
    "base_class",
    "block_host",
    "check_class",
    "describe",
    "family_of",
    "frozen_tensor",
    "parameter_sizes",
    "register_family",
    "supported_names",
    "unwrap",
]


@dataclass(frozen=True)
class Family:
    """One timm family."""

    name: str
    """Name of the family."""
    classes: tuple[type[nn.Module], ...]
    """The model classes it covers, exactly: a subclass is a different model and is not covered."""
    describe: Callable[[nn.Module], View]
    """Makes the view of one model."""
    host: type[Any]
    """The host of the whole model, with the family's own forward pass."""
    examples: str
    """Names of example timm models, for error messages."""
    hosts: Mapping[type[nn.Module], type[Any]] = field(default_factory=dict)
    """Hosts of the family's blocks, attention modules and MLPs, by timm class."""
    reading_hosts: Mapping[type[nn.Module], type[Any]] = field(default_factory=dict)
    """Hosts of attention modules that keep their projection's biases and read its weight, by timm class."""


_FAMILIES: list[Family] = []


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before vispeft adapted it."""
    return getattr(type(module), "replaces", type(module))


def frozen_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a tensor of the base without units: a parameter, or what PyTorch's pruning leaves of one.

    Args:
        module: The module, with adapters or without.
        name: The name of the tensor.
    """
    held = module._parameters if name in module._parameters else module.__dict__
    return cast("Tensor | None", held.get(name))


def register_family(family: Family) -> None:
    """Add a family. Each family's file in ``vispeft/backbones`` calls this once.

    Args:
        family: The family.
    """
    fill("families")  # first, so that a family of another package can replace a built-in one
    _FAMILIES[:] = [known for known in _FAMILIES if known.name != family.name] + [family]


def supported_names(module: str) -> tuple[bool, str]:
    """Say which timm models can be adapted.

    Args:
        module: A module of timm, such as ``timm.models.convnext``.

    Returns:
        Whether one of its classes is of a family, and the example names of all families.
    """
    fill("families")
    examples = "; ".join(family.examples for family in _FAMILIES if "features_only" not in family.examples)
    return any(cls.__module__ == module for family in _FAMILIES for cls in family.classes), examples


def unwrap(model: nn.Module) -> nn.Module:
    """Find the timm model inside a wrapper.

    Args:
        model: A timm model, a ``features_only`` wrapper around one, or a compiled one.

    Returns:
        The timm model itself.
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    inner = getattr(model, "model", None)
    if is_feature_getter(model) and isinstance(inner, nn.Module):
        return inner
    return model


def family_of(model: nn.Module) -> Family:
    """Find the family of a timm model.

    Raises:
        BackboneError: If no family covers the model's class.
    """
    fill("families")
    cls = base_class(model)
    for family in _FAMILIES:
        if cls in family.classes:
            return family
    known = "; ".join(f"{', '.join(c.__name__ for c in family.classes)} ({family.examples})" for family in _FAMILIES)
    raise BackboneError(
        f"An adapter was to be attached to a {cls.__module__}.{cls.__name__}, which vispeft does not support. "
        f"Supported: {known}. To add a family, write its view in one file of vispeft/backbones and register it "
        "(CONTRIBUTING.md)."
    )


def block_host(module: nn.Module) -> type[Any] | None:
    """Look up the host of a block, an attention module or an MLP.

    Args:
        module: timm's module.

    Returns:
        The family's host for its class; None if there is none.
    """
    base = base_class(module)
    for family in _FAMILIES:
        if base in family.reading_hosts and getattr(module, "q_bias", None) is not None:
            return family.reading_hosts[base]
        if base in family.hosts:
            return family.hosts[base]
    return None


def describe(model: nn.Module) -> View:
    """Describe a model: its sites, widths, stages, tokens and layout.

    Args:
        model: A timm model, or a wrapper around one.

    Returns:
        The view. For a ``features_only`` wrapper, it omits everything after the last feature.

    Raises:
        BackboneError: If the model, a block or an attention class is not supported.
    """
    inner = unwrap(model)
    view = family_of(inner).describe(inner)
    if not is_feature_getter(model):
        return view
    unused = {"fc_norm", "attn_pool", "head"} | (set() if getattr(model, "norm", False) else {"final_norm"})
    sites = tuple(site for site in view.sites if site.role not in unused)
    reason = "a model wrapped for its features does not use it"
    not_here = {**view.not_here, **dict.fromkeys(unused, reason)}
    return replace(view, sites=sites, head_path=None, head_drop_paths=(), not_here=not_here)


def is_feature_getter(model: nn.Module) -> bool:
    """Return whether a model is timm's wrapper that returns intermediate features."""
    return type(model).__name__ == "FeatureGetterNet"


def check_class(path: str, module: nn.Module, supported: Iterable[type[nn.Module]]) -> None:
    """Raise if a part of a model is not exactly of a supported class, however similar it looks.

    Args:
        path: Path of the part.
        module: The part.
        supported: Classes whose forward pass the view describes.

    Raises:
        BackboneError: If the part is of another class.
    """
    cls, classes = base_class(module), tuple(supported)
    if cls not in classes:
        raise BackboneError(
            f"{path} is a {cls.__name__}, whose forward pass vispeft does not support. Supported there: "
            f"{', '.join(c.__name__ for c in classes)}. To add it, extend the family's file in vispeft/backbones."
        )


def parameter_sizes(model: nn.Module, head: str | None) -> dict[str, dict[str, int]]:
    """List a model's parameter sizes by owning module, without units and classifiers.

    Args:
        model: The timm model, adapted or not.
        head: Path of the classifier.

    Returns:
        Sizes by path and name, in the order of the modules.
    """
    sizes: dict[str, dict[str, int]] = {}

    def walk(module: nn.Module, path: str) -> None:
        own = {name: tensor.numel() for name, tensor in module._parameters.items() if tensor is not None}
        if own:
            sizes[path] = own
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if name not in ("adapters", "adapter_heads") and below != head:
                walk(child, below)

    walk(model, "")
    return sizes
