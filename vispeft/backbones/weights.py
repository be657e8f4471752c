"""Weights in local files: every backbone tensor must be found, only the classifier may differ."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import nn

from vispeft.backbones.request import Request
from vispeft.errors import BackboneError, ConfigError, FileError, brief

__all__ = ["build_from_file", "forget_folder"]

_MARK = "patch_embed.proj.weight"
"""A tensor that every supported backbone has."""


def build_from_file(request: Request, file: Path) -> nn.Module:
    """Build a model and load a local file by timm, requiring every backbone tensor.

    timm does not report missing tensors if the number of classes differs from that of the weights. So the model is
    built with the file's number, loaded strictly, and then given another classifier.

    Args:
        request: The model; without a number of classes it keeps the file's.
        file: The weights.

    Returns:
        The model.

    Raises:
        FileError: If the file cannot be read.
        BackboneError: If it does not fit the model.
    """
    if ":" in request.architecture:
        raise BackboneError(
            f"{request.name} was asked for with weights={file.name!r}, but a name with a source brings its own "
            "weights. Give the name of the architecture, without hf-hub: or local-dir:."
        )
    if not os.path.isfile(file):
        found = "it is a directory" if os.path.isdir(file) else "there is no such file"
        raise FileError(f"weights={str(file)!r} was given for {request.name}, but {found}.")
    if file.suffix == ".npz":
        return _build_from_npz(request, file)

    # `local-dir` and `hf-hub` names are refused above, so timm knows this architecture.
    described = timm.get_pretrained_cfg(request.architecture)
    found_classes = _classes_in(file, described.classifier if described else None)
    # If no classifier is found by name, the file has none, or timm converts it from another layout.
    counts = [found_classes] if found_classes is not None else [0, described.num_classes if described else 1000]
    failure: Exception | None = None
    for count in counts:
        entries = {**request.overlay, "file": str(file), "custom_load": False, "num_classes": count}
        try:
            model = replace(request, num_classes=count, overlay=entries).build(pretrained=True)
        except ConfigError:
            raise  # an argument is wrong, and not the file
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            failure = failure or error
            continue
        forget_folder(model, file)
        if request.num_classes is not None and request.num_classes != count:
            _renew_classifier(model, request.num_classes)
        return model
    raise BackboneError(
        f"{file.name} was asked to be loaded into {request.name}, but its tensors do not fit: {brief(failure)} "
        f"{_names_in(file)} Give the file that belongs to this architecture, or the constructor arguments it was made "
        "with (such as img_size, patch_size, embed_dim, global_pool)."
    ) from failure


def _names_in(file: Path) -> str:
    """Describe the names of the tensors in a file that does not fit, and a prefix that a training module gave them."""
    names = list(_shapes_in(file))
    marks = [name.removesuffix(_MARK) for name in names if name.endswith(f".{_MARK}")]
    told = f"Its tensors are called like {', '.join(names[:3])}."
    if len(marks) != 1:
        return told
    return (
        f"{told} They stand behind the prefix {marks[0]!r}, as a training module writes them; write a file without it: "
        f"{{k.removeprefix({marks[0]!r}): v for k, v in tensors.items() if k.startswith({marks[0]!r})}}."
    )


def _build_from_npz(request: Request, file: Path) -> nn.Module:
    """Build a model and convert the original JAX weights of its family by timm.

    Args:
        request: The model.
        file: The ``.npz`` file.

    Returns:
        The model.

    Raises:
        BackboneError: If the file does not fit, or timm has no conversion for the family.
    """
    entries = {**request.overlay, "file": str(file), "custom_load": True}
    try:
        model = replace(request, overlay=entries).build(pretrained=True)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise BackboneError(
            f"{file.name} was asked to be loaded into {request.name}, but timm could not convert it: {brief(error)} An "
            ".npz file must be the original release of this architecture; other weights go into a .safetensors file."
        ) from error
    forget_folder(model, file)
    return model


def forget_folder(model: nn.Module, file: Path) -> None:
    """Remove the local folder of the weight file from timm's pretrained configuration.

    Args:
        model: The loaded model.
        file: The weight file.
    """
    described = getattr(model, "pretrained_cfg", None)
    if isinstance(described, dict):
        described["file"] = file.name


def _renew_classifier(model: nn.Module, num_classes: int) -> None:
    """Replace a model's classifier by a new one, initialised as timm does in its transformers.

    Args:
        model: A timm model; changed in place.
        num_classes: Number of outputs; 0 for no classifier.
    """
    model.reset_classifier(num_classes)  # type: ignore[operator]
    if isinstance(getattr(model, "_model_args", None), dict):
        model._model_args = {**model._model_args, "num_classes": num_classes}  # type: ignore[dict-item,assignment]
    classifier = model.get_classifier()  # type: ignore[operator]
    for part in classifier if isinstance(classifier, tuple) else (classifier,):
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _classes_in(file: Path, classifier: str | tuple[str, ...] | None) -> int | None:
    """Read the number of classes of a file's classifier.

    Args:
        file: A ``.safetensors`` or PyTorch file.
        classifier: timm's name, or names, for the classifier of this architecture.

    Returns:
        The number of classes; None if no classifier is found.

    Raises:
        FileError: If the file cannot be read, or contains objects other than tensors.
    """
    own = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    keys = [f"{part}.weight" for part in dict.fromkeys((*own, "head", "head.fc"))]
    shapes = _shapes_in(file)
    for key in keys:
        # The classifier's weight has at least two axes (it may be a 1 x 1 convolution); a norm `head.norm` has one.
        if len(shapes.get(key, ())) >= 2:
            return shapes[key][0]
    return None


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors of a file.

    Args:
        file: A ``.safetensors`` or PyTorch file.

    Returns:
        Shapes by the names that timm uses.

    Raises:
        FileError: If the file cannot be read, or contains objects other than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        tensors = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # the readers of safetensors, pickle and zip files share no base class of errors
        raise FileError(
            f"The weights in {file.name} cannot be read: {brief(error)} The file must be a whole .safetensors, a "
            "PyTorch file that holds tensors only, or .npz."
        ) from error
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not shapes:
        raise FileError(f"{file.name} holds no tensors under the names timm looks at (state_dict, model, or none).")
    return shapes
