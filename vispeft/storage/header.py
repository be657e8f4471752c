"""The content of ``adapter.json``: the method, the backbone, its preprocessing, and every tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from vispeft.core.method import Method
from vispeft.errors import ConfigError
from vispeft.resources import package_version
from vispeft.storage.codecs import RAW
from vispeft.storage.files import dtype_name
from vispeft.storage.form import escaped

__all__ = ["adapter_part", "backbone_part", "plain_values", "preprocessing_part", "strict_values", "tensor_part"]


def adapter_part(method: Method) -> dict[str, Any]:
    """Describe the adapter's method and the versions of the packages.

    Args:
        method: The method.
    """
    return {"vispeft": package_version(), "timm": timm.__version__, "method": method.to_dict()}


def plain_values(value: Any, name: str) -> Any:
    """Convert a note to plain JSON values: tensors and arrays to numbers, tuples to lists, keys to strings.

    A number that is not finite becomes null.

    Args:
        value: The note.
        name: Name of the note, for the error message.

    Raises:
        ConfigError: If a value cannot be converted.
    """
    try:
        return strict_values(json.loads(json.dumps(value, default=lambda item: item.tolist())))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name} cannot be written to a file ({error}); give numbers, names and lists.") from error


def strict_values(value: Any) -> Any:
    """Replace the numbers that JSON cannot hold, which are those that are not finite, by None at every depth.

    Args:
        value: Numbers, names, lists and dictionaries.
    """
    if isinstance(value, dict):
        return {key: strict_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def backbone_part(model: nn.Module, outer: nn.Module) -> dict[str, Any]:
    """Describe how the backbone was created, as far as known.

    Args:
        model: The timm model.
        outer: The object the user created: the model itself or a wrapper around it.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named = {"name": cfg.get("architecture"), "args": _jsonable(getattr(model, "_model_args", {}))}
    source = outer.__dict__.get("_vispeft_source") or model.__dict__.get("_vispeft_source") or {}
    return escaped({**named, **source})


def preprocessing_part(model: nn.Module) -> dict[str, Any]:
    """Describe the images the backbone takes: timm's pretrained configuration, with the model's own size and channels.

    Mean and standard deviation are left out where the model takes other channels than they describe.

    Args:
        model: The timm model.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    keys = ("mean", "std", "input_size", "interpolation", "crop_pct")
    found = {key: list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key] for key in keys if key in cfg}
    embed = getattr(model, "patch_embed", None)
    projection, size = getattr(embed, "proj", None), getattr(embed, "img_size", None)
    if not isinstance(projection, nn.Conv2d) or not (size or "input_size" in found):
        return found
    height, width = size or found["input_size"][1:]
    found["input_size"] = [projection.in_channels, int(height), int(width)]
    return {
        key: value for key, value in found.items() if key not in ("mean", "std") or len(value) == projection.in_channels
    }


def tensor_part(tensors: Mapping[str, Tensor], codecs: Mapping[str, str]) -> dict[str, Any]:
    """Describe the codec, dtype and shape of each tensor in the file.

    Args:
        tensors: The tensors by name in the file, before encoding.
        codecs: Names of the codecs, by tensor; omitted tensors are raw.
    """
    return {
        key: {"codec": codecs.get(key, RAW), "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for key, tensor in tensors.items()
    }


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {
        k: v
        for k, v in listed.items()
        if isinstance(v, plain) or (isinstance(v, list) and all(isinstance(item, plain) for item in v))
    }
