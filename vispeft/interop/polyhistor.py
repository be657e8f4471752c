"""Tensor names in the public code of Polyhistor-Lite, as read in its text (facts only; it was found without a licence).

The names of the form with one network per block are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method, PlanItem
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.blocks import hyper_of
from vispeft.interop.official import Source, register_source
from vispeft.methods.polyhistor import Polyhistor

_NETWORK = {
    "hidden": "task_hypernet.task_embeding_generator.0",
    "embed": "task_hypernet.task_embeding_generator.2",
    "norm": "LayerNorm",
    "to_down": "down_sampler_hyper_net.weight_generator.0",
    "to_down_bias": "down_sampler_hyper_net.bias_generator.0",
    "to_up": "up_sampler_hyper_net.weight_generator.0",
    "to_up_bias": "up_sampler_hyper_net.bias_generator.0",
    "to_norm_weight": "post_layernorm_hypernet.weight_generator",
    "to_norm_bias": "post_layernorm_hypernet.bias_generator",
}
_OF_LAYERS = {
    "code": "layer_id_embeddings",
    "kernel": "scaleup_kronkernel",
    "bias_kernel": "coef_bias",
    "norm_kernel": "coef_lna",
}
_AXES = {"scaleup_kronkernel": 3, "coef_bias": 2, "coef_lna": 2}
"""Axes of the kernels, which the authors keep flat."""
_TASKS = "task_embedding_controller.task_to_embeddings."
_ACTIVATIONS = {"silu": "swish"}


def _names(plan: Plan) -> dict[str, str]:
    return {f"{item.key}.{tensor}": _name(item, tensor) for item in plan for tensor in item.shapes()}


def _name(item: PlanItem, tensor: str) -> str:
    if item.unit == "polyhistor_task":
        return f"{_TASKS}{item.task}.weight"
    if tensor in _OF_LAYERS:
        return f"adapter_hypernet.{_OF_LAYERS[tensor]}.{item.site.block}.weight"
    layer, _, part = tensor.rpartition(".")
    return f"adapter_hypernet.{_NETWORK[layer]}.{part}"


class _PolyhistorSource(Source):
    def ours(self, name: str, tensor: Tensor) -> Tensor:
        """Give kernels their axes."""
        axes = next((count for part, count in _AXES.items() if f".{part}." in name), None)
        if axes is None:
            return tensor
        scale = round(tensor.numel() ** (1 / axes))
        return tensor.reshape((scale,) * axes) if scale**axes == tensor.numel() else tensor

    def theirs(self, name: str, tensor: Tensor) -> Tensor:
        """Flatten kernels."""
        return tensor.flatten() if any(f".{part}." in name for part in _AXES) else tensor


def _method(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    hyper = hyper_of(metadata, "polyhistor", "reduction_factor", "low_rank_rank", "kernel_front")
    tasks = [name.removeprefix(_TASKS).removesuffix(".weight") for name in tensors if name.startswith(_TASKS)]
    rank, activation = hyper["low_rank_rank"], hyper.get("non_linearity", "swish")
    if rank is not None and rank >= 0:
        raise FileError(f"low_rank_rank={rank}: a negative one, which divides the width, or null is supported.")
    first = next((t for name, t in tensors.items() if name.endswith(f"{_NETWORK['hidden']}.weight")), None)
    embed = next((t for name, t in tensors.items() if name.endswith(f"{_NETWORK['embed']}.weight")), None)
    if not tasks or first is None or embed is None:
        raise FileError(f"A task embedding ({_TASKS}*.weight) and the embedding network of 'polyhistor' are needed.")
    return Polyhistor(
        tasks=tuple(hyper.get("tasks", tasks)),
        lite=True,
        reduction=hyper["reduction_factor"],
        rank_divisor=None if rank is None else -rank,
        task_dim=first.shape[1] // 2,
        hidden_dim=first.shape[0],
        embed_dim=embed.shape[0],
        kernel_front=hyper["kernel_front"],
        post_norm=hyper.get("layer_norm_after", True),
        activation=_ACTIVATIONS.get(activation, activation),
    )


register_source(_PolyhistorSource("polyhistor", _method, _names))
