"""``vispeft export --format delta``: what a merged run adds to the weights of its frozen backbone, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from vispeft.cli.common import versions
from vispeft.cli.runs import write_json
from vispeft.errors import MergeError
from vispeft.interop.staging import check_free, staged
from vispeft.tasks.base import AdapterTask

__all__ = ["added", "difference_of", "export_delta"]


def difference_of(before: Tensor, after: Tensor) -> Tensor:
    """Compute what is to be added to a tensor so that another one results bit for bit; see `added`.

    Args:
        before: Of any shape.
        after: The same shape and dtype.

    Returns:
        In the dtype of both where that is exact; else in float64, which holds the difference of two narrower numbers
        exactly unless their exponents are more than 29 apart, and then rounds to the same sum.

    Raises:
        MergeError: If neither dtype gives the other tensor.
    """
    for dtype in (before.dtype, torch.float64):
        delta = after.to(dtype) - before.to(dtype)
        if torch.equal(added(before, delta), after):
            return delta
    raise MergeError("The merged weights are no sum of the frozen ones and a difference in float64; export ONNX.")


def added(before: Tensor, delta: Tensor) -> Tensor:
    """Add a difference in its own dtype, and return the sum in that of the tensor.

    Args:
        before: The frozen weight.
        delta: As from `difference_of`.
    """
    return (before.to(delta.dtype) + delta).to(before.dtype)


def export_delta(task: AdapterTask, out: Path) -> dict[str, Any]:
    """Merge a task's adapter, and write what that adds to the backbone, and the head.

    Args:
        task: The task of a finished run; its adapter is merged afterwards.
        out: The file, ending in ``.safetensors``: for each changed weight its difference under timm's name, and the
            tensors of the classifier or decoder under ``head/`` or ``decoder/``. A JSON file beside it says the rest.

    Returns:
        The content of the JSON file.

    Raises:
        ConfigError: If a file of that name exists.
        MergeError: If a layer cannot be merged, or gets or loses a tensor, so that nothing can be added.
        FileError: If the files cannot be written.
    """
    described = out.with_suffix(".json")
    check_free(out, described)
    if (reason := task.mergeable()) is not None:
        raise MergeError(f"The adapter cannot be merged: {reason}. Name one by --task.")
    before = {name: tensor.detach().cpu().clone() for name, tensor in task.bank.base_tensors()}
    report = task.bank.merge()
    if report.created or report.removed:
        names = ", ".join([*report.created, *report.removed][:3])
        raise MergeError(
            f"Merging makes or removes tensors ({names}), which no difference describes. `vispeft merge` writes the "
            "whole model."
        )
    present = task.bank.model.state_dict()
    after = {name: present[name].detach().cpu() for name in before}
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    deltas = {name: difference_of(before[name], after[name]) for name in changed}
    head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in task.head_tensors().items()}
    notes = task.bank.notes()
    info = {
        "backbone": task.backbone,
        "args": task.backbone_args,
        "method": task.bank.plan(task.bank.names[-1]).method.to_dict(),
        "added": changed,
        "head": sorted(head),
        **{key: notes.get(key) for key in ("class_names", "preprocessing", "output", "metrics")},
        "versions": versions(),
    }
    with staged(out, described) as place:
        place.write_bytes(to_bytes({**deltas, **head}, metadata={"format": "pt"}))
        write_json(place.with_name(described.name), info)
        found = load_file(place)
        wrong = [name for name in changed if not torch.equal(added(before[name], found[name]), after[name])]
        if wrong:
            raise MergeError(f"{wrong[0]} and {len(wrong) - 1} others are not what was merged; no file was left.")
    return info
