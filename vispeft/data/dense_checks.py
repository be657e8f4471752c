"""Checks of the labels of a dense task and of the outputs they are compared with, for losses and metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.errors import DataError

__all__ = ["check_batch"]

FINITE = torch.finfo(torch.float32).max
RANGES: dict[str, tuple[float, float, str]] = {
    "saliency": (0, 1, "0 and 1"),
    "edge": (0, 1, "0 and 1"),
    "normals": (-1.01, 1.01, "unit vectors, whose values lie between -1 and 1"),  # some room for rounded vectors
    "depth": (torch.finfo(torch.float32).tiny, FINITE, "metres above 0"),
    "values": (-FINITE, FINITE, "finite numbers"),
}
"""Smallest and largest label of each kind with a fixed range, and its description."""


def check_batch(target: DenseTarget, name: str, outputs: Tensor, labels: Tensor) -> None:
    """Refuse outputs and labels that do not have the form of a task.

    Reading the labels' range waits for the device once.

    Args:
        target: Description of the task.
        name: Name of the task, for the message.
        outputs: Scores or values of a decoder (B, channels, h, w).
        labels: Labels of the batch in the form that `DenseTarget` describes.

    Raises:
        DataError: If a shape, a type or a value does not fit.
    """
    if outputs.ndim != 4 or outputs.shape[1] != target.channels or not outputs.is_floating_point():
        raise DataError(
            f"Outputs of the task {name!r} ({target.kind}) have the shape {tuple(outputs.shape)} and the type "
            f"{_type(outputs)}; floating-point numbers (B, {target.channels}, h, w) are needed."
        )
    images, channels, *size = outputs.shape
    wanted = (images, *size) if target.kind == "classes" else (images, channels, *size)
    if tuple(labels.shape) != wanted:
        raise DataError(
            f"Labels of the task {name!r} ({target.kind}) have the shape {tuple(labels.shape)} and outputs the shape "
            f"{tuple(outputs.shape)}; with such outputs labels of {wanted} are needed. Resize outputs to the labels' "
            "size first."
        )
    if labels.dtype != torch.int64 if target.kind == "classes" else not labels.is_floating_point():
        needed = "int64 class indices" if target.kind == "classes" else "float32 numbers"
        raise DataError(f"Labels of the task {name!r} ({target.kind}) are {_type(labels)}; {needed} are needed.")
    _check_range(target, name, labels)


def _check_range(target: DenseTarget, name: str, labels: Tensor) -> None:
    last = len(target.class_names) - 1
    low, high, wanted = RANGES.get(target.kind, (0, last, f"class indices from 0 to {last}"))
    # NaN is in no range, so the comparison is the positive one.
    wrong = (labels != IGNORE) & ~((labels >= low) & (labels <= high))
    if bool(wrong.any()):
        raise DataError(
            f"Labels of the task {name!r} ({target.kind}) hold {labels[wrong][0].item():g}, among "
            f"{int(wrong.sum()):,} such values; {wanted} are possible, and {IGNORE} for pixels without a label."
        )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
