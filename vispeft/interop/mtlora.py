"""Tensor names in the public MTLoRA code (scale-lab/MTLoRA at 333a375; facts only).

The tensors of the backbone that train have their names in the public backbone, where patch merging ends a stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from vispeft.core.method import Method, PlanItem
from vispeft.core.plan import Plan
from vispeft.core.sites import View
from vispeft.errors import FileError
from vispeft.interop.official import Source, register_source
from vispeft.methods.mtlora import MTLoRA

_SHARED = {"A": "lora_shared_A", "B": "lora_shared_B", "multiplier": "lora_shared_scale"}
_TASK = {"A": "lora_tasks_A", "B": "lora_tasks_B", "multiplier": "lora_task_scale"}
_NORM = re.compile(r"(?<!lora_)norm\d?\.weight$")
_MERGING = re.compile(r"layers\.(\d+)\.downsample")


def _official(path: str) -> str:
    """Return the public code's path of a module: patch merging ends a stage there, while timm's starts the next one."""
    return _MERGING.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample", path)


def _names(plan: Plan) -> dict[str, str]:
    return {f"{item.key}.{tensor}": _name(item, tensor) for item in plan for tensor in item.shapes()}


def _name(item: PlanItem, tensor: str) -> str:
    path = _official(item.site.path)
    if item.unit == "lora":
        return f"{path}.{_SHARED[tensor]}"
    if item.unit == "task":
        return f"{path}.{_TASK[tensor]}.{item.task}"
    return f"{path}.lora_norm.{tensor}" if item.unit == "sum" else f"{path}.{tensor}"


def _method(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], view: View) -> Method:
    tasks = tuple(dict.fromkeys(name.rpartition(".")[2] for name in tensors if ".lora_tasks_A." in name))
    tasks = tuple(task for task in metadata.get("tasks", tasks) if task in tasks)
    if not tasks:
        raise FileError("MTLoRA's tensors hold 'lora_tasks_A' of each task; there are none.")
    stages = range(len(view.map_ends))
    ranks = {task: tuple(_rank(tensors, view, stage, f"lora_tasks_A.{task}") for stage in stages) for task in tasks}
    scale = metadata.get("scale", 4.0)
    per_stage = metadata.get("task_scale_per_stage") or [dict.fromkeys(tasks, scale)] * len(stages)
    return MTLoRA(
        tasks=tasks,
        rank=tuple(_rank(tensors, view, stage, "lora_shared_A") for stage in stages),
        task_rank=ranks,
        scale=tuple(metadata.get("shared_scale_per_stage") or [scale] * len(stages)),
        task_scale={task: tuple(own[task] for own in per_stage) for task in tasks},
        trainable_scale_shared=any(name.endswith(".lora_shared_scale") for name in tensors),
        trainable_scale_per_task=any(".lora_task_scale." in name for name in tensors),
        mode=metadata.get("shared_mode", "matrix"),
        dropout=metadata.get("lora_dropout", 0.05),
        plus=any(name.endswith("downsample.reduction.lora_shared_A") for name in tensors),
        train_patch_embed="patch_embed.proj.weight" in tensors,
        train_norms=any(_NORM.search(name) and not name.startswith("patch_embed.") for name in tensors),
        train_rel_pos=any(name.endswith("relative_position_bias_table") for name in tensors),
        train_merging=any(name.endswith("downsample.reduction.weight") for name in tensors),
    )


def _rank(tensors: Mapping[str, Tensor], view: View, stage: int, ending: str) -> int:
    """Read the rank of a stage's terms out of the shape of one of them."""
    found = list(_of_stage(tensors, view, stage, ending))
    if not found:
        raise FileError(f"MTLoRA's tensors hold no {ending!r} of stage {stage}.")
    return found[0].shape[0]


def _of_stage(tensors: Mapping[str, Tensor], view: View, stage: int, ending: str) -> Iterator[Tensor]:
    blocks = [_official(site.path) for site in view.at("block") if site.stage == stage]
    for name, tensor in tensors.items():
        if name.endswith(ending) and any(name.startswith(f"{block}.") for block in blocks):
            yield tensor


register_source(Source("mtlora", _method, _names))
