"""`create_model`: `timm.create_model` with local weight files, shipped backbones, and errors that name the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vispeft.backbones.hub import build_from_hub
from vispeft.backbones.request import Request, resolve
from vispeft.backbones.swin import AnySizeSwinBlock, make_any_size
from vispeft.backbones.swinv2 import AnySizeSwinV2Block
from vispeft.backbones.weights import build_from_file
from vispeft.core.arguments import check_arguments
from vispeft.errors import ConfigError

__all__ = ["create_model"]

_LOCAL = ("cache_dir", "checkpoint_path", "pretrained_cfg_overlay")
"""Arguments that contain local paths; they are not written to adapter files."""


def create_model(
    name: str,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    flexible_size: bool = False,
    **timm_args: Any,
) -> nn.Module:
    """Create a timm model with weights from a hub, a local file or the shipped backbones.

    A local file is loaded by timm itself, so position embeddings are resized and the checkpoint layouts timm knows are
    converted; every tensor of the backbone must be found. Only the classifier may differ: if `num_classes` is not the
    file's number of classes, it is newly initialised.

    Args:
        name: A name for `timm.create_model`, or ``zoo:NAME`` for a backbone of ``model_zoo/backbones``.
        pretrained: Whether to load weights. False initialises them randomly.
        num_classes: Number of outputs of the classifier; 0 for no classifier. None keeps that of the weights.
        weights: A local file with the weights: ``.safetensors``, a PyTorch file (``.pth``, ``.pt``, ``.bin``, ``.tar``;
            tensors only, pickled code is refused), or ``.npz`` for families timm converts from it.
        flexible_size: Whether the model accepts images of any size, not only the one it is built for.
        **timm_args: Further arguments of `timm.create_model`, such as ``img_size`` or ``drop_path_rate``.

    Returns:
        A plain timm model, in training mode as timm returns it.

    Raises:
        UnknownNameError: If timm or the zoo has no such model; near names are listed.
        BackboneError: If weights do not fit or are not available, or the family cannot accept images of any size.
        FileError: If the weight file is missing, damaged or altered.
        ConfigError: If an argument is of the wrong kind, or arguments contradict each other.

    Example:
        >>> model = create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10)
        >>> model.num_classes
        10
    """
    given = {"pretrained": pretrained, "num_classes": num_classes, "weights": weights, "flexible_size": flexible_size}
    check_arguments(create_model, {"name": name, **given})
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"create_model(num_classes={num_classes}): at least 1 is needed, or 0 for no classifier.")
    if weights is not None and not pretrained:
        raise ConfigError("weights= was given together with pretrained=False. Drop one: a file is there to be loaded.")
    source: dict[str, Any] = {"name": name, "args": _recorded(timm_args, num_classes, flexible_size, pretrained)}
    request = resolve(name, num_classes=num_classes, flexible_size=flexible_size, arguments=timm_args)
    file = None if weights is None else Path(weights)
    if file is not None:
        source["weights"] = file.name
    model = _load(request, file) if pretrained else request.build(pretrained=False)
    if flexible_size:
        make_any_size(model, {own.timm_block: own for own in (AnySizeSwinBlock, AnySizeSwinV2Block)})
    model.__dict__["_vispeft_source"] = source
    return model


def _load(request: Request, file: Path | None) -> nn.Module:
    """Build a model with weights from a file, the zoo or a hub."""
    if file is not None:
        return build_from_file(request, file)
    if request.shipped is not None:
        request.shipped.verify()
        return build_from_file(request, request.shipped.weights)
    return build_from_hub(request)


def _recorded(
    timm_args: Mapping[str, Any], num_classes: int | None, flexible_size: bool, pretrained: bool
) -> dict[str, Any]:
    """Return the arguments to record in adapter files, with which the same model can be created again.

    Returns:
        Arguments by name as JSON values (tuples as lists), without defaults and local paths.
    """
    asked = {key: value for key, value in timm_args.items() if key not in _LOCAL}
    if num_classes is not None:
        asked["num_classes"] = num_classes
    if flexible_size:
        asked["flexible_size"] = True
    if not pretrained:
        asked["pretrained"] = False
    kept = {}
    for key, value in asked.items():
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept
