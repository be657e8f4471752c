"""A call of `create_model` in timm's terms: architecture, constructor arguments, pretrained configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from vispeft.core.families import supported_names
from vispeft.errors import BackboneError, ConfigError, FileError, UnknownNameError, brief
from vispeft.zoo.backbones import ZooBackbone, read_zoo_backbone

__all__ = ["Request", "resolve"]

_DYNAMIC = {"dynamic_img_size": True}
# The mask is computed in each forward pass, the window size stays fixed, and feature maps smaller than a window are
# padded, as in the original Swin code and mmsegmentation. `set_input_size` would change the window.
_WINDOWED = {"strict_img_size": False, "always_partition": True}
_FLEXIBLE: dict[str, dict[str, bool]] = {
    "timm.models.beit": _DYNAMIC,
    "timm.models.deit": _DYNAMIC,
    "timm.models.eva": _DYNAMIC,
    "timm.models.swin_transformer": _WINDOWED,
    "timm.models.swin_transformer_v2": _WINDOWED,
    "timm.models.vision_transformer": _DYNAMIC,
}
"""By timm module, the constructor arguments with which its models accept images of any size."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model for timm to build."""

    name: str
    """The name the user gave, for error messages."""
    architecture: str
    """A name for timm, with or without a pretrained tag or a source."""
    num_classes: int | None
    """Number of outputs of the classifier; 0 for no classifier, None for that of the weights."""
    arguments: Mapping[str, Any]
    """Further arguments of `timm.create_model`."""
    overlay: Mapping[str, Any]
    """Entries that override timm's pretrained configuration."""
    shipped: ZooBackbone | None = None
    """The zoo's backbone, for ``zoo:NAME``."""

    def build(self, *, pretrained: bool) -> nn.Module:
        """Build the model by timm.

        Args:
            pretrained: Whether timm also loads weights.

        Returns:
            The model.

        Raises:
            ConfigError: If the model does not accept a given argument, or cannot be made with its value.
        """
        given = dict(self.arguments)
        if self.num_classes is not None:
            given["num_classes"] = self.num_classes
        try:
            return timm.create_model(
                self.architecture, pretrained=pretrained, pretrained_cfg_overlay=dict(self.overlay) or None, **given
            )
        except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
            unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[2] not in given:
                if pretrained or not given:  # the weights may be the cause
                    raise
                told = ", ".join(f"{name}={value!r}" for name, value in given.items())
                raise ConfigError(
                    f"timm cannot make {self.architecture} with {told}: {brief(error)} Correct these arguments."
                ) from error
            raise ConfigError(
                f"{self.architecture} was asked for with {unknown[2]}={given[unknown[2]]!r}, but timm's {unknown[1]} "
                "takes no such argument. Drop it, or correct its name after timm's documentation of that class."
            ) from error


def resolve(
    name: str,
    *,
    num_classes: int | None = None,
    flexible_size: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Request:
    """Translate a call of `create_model` into timm's terms, without building or loading anything.

    Args:
        name: A name for `timm.create_model`, or ``zoo:NAME``.
        num_classes: Number of outputs of the classifier; None keeps that of the weights.
        flexible_size: Whether the model accepts images of any size.
        arguments: Further arguments of `timm.create_model`; they override those of the zoo and of `flexible_size`.

    Returns:
        The request.

    Raises:
        UnknownNameError: If timm or the zoo has no such model; near names are listed.
        BackboneError: If the family cannot accept images of any size.
        FileError: If the description of a shipped backbone, or of a local folder, is missing or damaged.
    """
    given = dict(arguments or {})
    overlay = dict(given.pop("pretrained_cfg_overlay", None) or {})
    architecture, shipped = name, None
    if name.startswith("zoo:"):
        shipped = read_zoo_backbone(name.removeprefix("zoo:"))
        architecture = shipped.architecture
        given, overlay = {**shipped.args, **given}, {**shipped.overlay, **overlay}
    else:
        _check_name(name)
    if flexible_size:
        given = {**_flexible_arguments(name, architecture), **given}
    return Request(
        name=name,
        architecture=architecture,
        num_classes=num_classes,
        arguments=given,
        overlay=overlay,
        shipped=shipped,
    )


def _check_name(name: str) -> None:
    """Raise on a name timm does not know.

    Args:
        name: An architecture, with or without a pretrained tag, or a name with a source such as ``hf-hub:``.

    Raises:
        UnknownNameError: If there is no such architecture, or it has no such tag.
        FileError: If the folder of a ``local-dir:`` name has no config.json.
    """
    if ":" in name:
        place, _, path = name.partition(":")
        if place not in ("hf-hub", "hf_hub", "local-dir"):
            raise UnknownNameError("source of a model", f"{place}:", ["zoo:", "hf-hub:", "local-dir:"])
        if place == "local-dir" and not os.path.isfile(Path(path) / "config.json"):
            raise FileError(f"{name} was asked for, but there is no config.json in {path}.")
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = "Names are listed by timm.list_models('*vit*'); a shipped backbone is asked for as zoo:NAME."
        raise UnknownNameError("backbone", name, timm.list_models(), hint)
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UnknownNameError(f"pretrained tag of {architecture}", tag, tags)


def _flexible_arguments(name: str, architecture: str) -> dict[str, bool]:
    """Return the constructor arguments with which a family accepts images of any size.

    Args:
        name: The name the user gave, for the error message.
        architecture: A name for timm.

    Returns:
        The arguments.

    Raises:
        BackboneError: If the family cannot, or only a hub knows the architecture.
    """
    if ":" in architecture:
        raise BackboneError(
            f"{name} was asked for with flexible_size=True, but its family is known only once it is loaded. Give the "
            "argument of its class instead: dynamic_img_size=True for a ViT, strict_img_size=False and "
            "always_partition=True for a Swin."
        )
    module = timm.models.model_entrypoint(architecture.partition(".")[0]).__module__
    known, supported = supported_names(module)
    if module not in _FLEXIBLE and not known:
        raise BackboneError(
            f"{name} was asked for, and models of {module} are not supported: no adapter can act in them, whatever "
            f"their size. Supported are {supported}. Choose one of these."
        )
    if module not in _FLEXIBLE:
        families = ", ".join(sorted(m.removeprefix("timm.models.") for m in _FLEXIBLE))
        raise BackboneError(
            f"{name} was asked for with flexible_size=True, but models of {module} have no stated way to take images "
            f"of any size; {families} have. Give the size with img_size=, or take another backbone."
        )
    return _FLEXIBLE[module]
