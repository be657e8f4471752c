"""From the decoders' outputs of several dense tasks to predictions, in the form of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.data.dense_targets import DenseTarget
from vispeft.errors import ConfigError

__all__ = ["as_targets", "decode", "finite_images", "resized", "target_notes"]

NEAREST = 1e-9
"""Smallest predicted depth in metres, as in the public evaluations of MTLoRA and of Vandenhende et al. (commits
333a375 and ed3d9ac)."""


def as_targets(given: Mapping[str, Any]) -> dict[str, DenseTarget]:
    """Read the targets of tasks, as a data module or an adapter's file has them.

    Args:
        given: A `DenseTarget` by task, or its fields.

    Raises:
        ConfigError: If there is none, or the fields are no target.
    """
    if not given:
        raise ConfigError("MultiTaskDense(targets={}): name at least one task, such as depth with DenseTarget(...).")
    return {task: target if isinstance(target, DenseTarget) else _read(task, target) for task, target in given.items()}


def _read(task: str, fields: Any) -> DenseTarget:
    known = {"kind", "class_names", "palette"}
    if not isinstance(fields, Mapping) or not {"kind"} <= set(fields) <= known:
        raise ConfigError(
            f"targets[{task!r}] is {fields!r}; a DenseTarget is needed, or its fields {', '.join(sorted(known))}."
        )
    palette = tuple(tuple(colour) for colour in fields.get("palette") or ())
    names = tuple(fields.get("class_names") or ())
    return DenseTarget(kind=fields["kind"], class_names=names, palette=palette)  # type: ignore[arg-type]


def target_notes(targets: Mapping[str, DenseTarget]) -> dict[str, Any]:
    """Convert targets to plain values, which `as_targets` reads.

    Args:
        targets: The targets by task.
    """
    return {
        task: {"kind": target.kind, "class_names": list(target.class_names), "palette": [*map(list, target.palette)]}
        for task, target in targets.items()
    }


def resized(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize outputs (B, K, H, W) bilinearly.

    Args:
        scores: The outputs.
        size: Height and width.
    """
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=False)


def finite_images(scores: Mapping[str, Tensor]) -> Tensor:
    """Tell for which images the outputs of all tasks are finite (B,).

    Args:
        scores: Outputs (B, K, H, W) by task.
    """
    return torch.stack([values.flatten(1).isfinite().all(1) for values in scores.values()]).all(0)


def decode(target: DenseTarget, scores: Tensor) -> Tensor:
    """Turn a decoder's outputs into predictions of the labels' form.

    Args:
        target: The target of the task.
        scores: The outputs (B, K, h, w), in float32.

    Returns:
        Class indices int64 (B, h, w); probabilities of saliency or an edge (B, 1, h, w); unit normals (B, 3, h, w);
        depth in metres, or values, (B, 1, h, w).
    """
    if target.kind == "classes":
        return scores.argmax(1)
    if target.kind in ("saliency", "edge"):
        return scores.sigmoid()
    if target.kind == "normals":
        return F.normalize(scores, dim=1, eps=1e-12)
    return scores.clamp(min=NEAREST) if target.kind == "depth" else scores
