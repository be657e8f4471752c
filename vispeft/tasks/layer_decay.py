"""Layer-wise learning rate decay, from the last layer to the first."""

from __future__ import annotations

from typing import Any, cast

from timm.models import group_parameters
from torch import nn

__all__ = ["decay_by_layer"]


def decay_by_layer(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Split optimiser groups so that each layer learns more slowly than the one after it, as timm numbers layers.

    Args:
        model: The adapted timm model.
        groups: Groups made by `AdapterBank.parameter_groups`.
        decay: Learning rate of a layer over that of the next one; the last one, with the classifier, has the full rate.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``.
    """
    numbers = cast(Any, group_parameters(model, cast(Any, model).group_matcher(coarse=False), reverse=True))
    layers = {id(parameter): numbers[name] for name, parameter in model.named_parameters()}
    last = max(layers.values())
    split: dict[tuple[str, int], dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            layer = layers[id(parameter)]
            name = f"{group['name']} layer {layer}"
            fresh = {**group, "params": [], "lr": group["lr"] * decay ** (last - layer), "name": name}
            split.setdefault((group["name"], layer), fresh)["params"].append(parameter)
    return list(split.values())
