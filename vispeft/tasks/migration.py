"""Reading configs and checkpoints of earlier versions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

__all__ = ["MOVED", "rename_heads", "without_moved"]

MOVED = {
    "head_sparsity": "head_sparsity is a field of the method vqt now: set model.method.head_sparsity, or in Python "
    "VQT(head_sparsity=...)."
}
"""Settings that tasks had in earlier versions, and their present place."""


def without_moved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that have moved and are off, as every run directory of an earlier version names them.

    Args:
        settings: Settings of a task by name.
    """
    return {name: value for name, value in settings.items() if name not in MOVED or value}


def rename_heads(
    tensors: Mapping[str, Tensor], head_path: str | None, adapter: str, needed: Collection[str]
) -> dict[str, Tensor]:
    """Rename the classifier of an old checkpoint to its present name.

    In checkpoints of earlier versions, the classifier of the acting adapter had the backbone's own name,
    such as ``model.head.weight``. Now each adapter's classifier has its own name, such as
    ``model.adapter_heads.default.weight``. Tensors are renamed only where the task needs the new name and not the old.

    Args:
        tensors: Tensors of a checkpoint by state-dict name of the task; also those of its EMA.
        head_path: Path of the classifier in the backbone, such as ``head`` or ``head.fc``; None where it has none.
        adapter: The adapter that acts.
        needed: The names the task needs.

    Returns:
        The same tensors under the names of this version, in their order.
    """
    if head_path is None:
        return dict(tensors)
    old, new = f"model.{head_path}.", f"model.adapter_heads.{adapter}."
    renamed = {}
    for name, tensor in tensors.items():
        today = new + name.removeprefix(old) if name.startswith(old) else name
        renamed[today if today in needed and name not in needed else name] = tensor
    return renamed
