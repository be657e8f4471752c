"""The form of a checkpoint: its entries and their types, checked before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.core.unit_shapes import resize_units, units_of
from vispeft.errors import FileError

__all__ = ["check_content", "check_output", "check_shapes", "check_state", "take_shapes"]

_STATE: dict[str, tuple[type, ...]] = {
    "finished": (bool,),
    "best": (dict, type(None)),
    "epochs": (int,),
    "steps": (int,),
    "seconds": (int, float),
    "processes": (int,),
    "torch": (str,),
    "backbone": (dict,),
    "logged_steps": (int,),
    "rows": (list,),
    "batches": (int,),
    "training": (dict,),
}
"""Entries of vispeft's part of a checkpoint, and their types."""
_BEST: dict[str, tuple[type, ...]] = {"file": (str,), "epoch": (int,), "score": (int, float)}
"""Entries of the best epoch, and their types."""

_MOST = 2**53
"""Largest count that is believed, and that a float holds exactly."""


def check_content(content: Any, path: Any) -> dict[str, Any]:
    """Check the entries that every reader of a checkpoint uses.

    Args:
        content: The content of the file.
        path: The file, for the message.

    Raises:
        FileError: If it is no checkpoint.
    """
    if not isinstance(content, dict) or "state_dict" not in content:
        raise FileError(f"{path} is no checkpoint: it has no state_dict.")
    if not _tensors(content["state_dict"]):
        raise FileError(f"{path} is no checkpoint: its state_dict holds other things than tensors by name.")
    _refuse_wrong(content, {"epoch": (int,)}, path, needed=False)
    average = content.get("average", {"tensors": {}, "updates": 0})
    if not isinstance(average, dict) or not _tensors(average.get("tensors")) or not _is(average.get("updates"), (int,)):
        raise FileError(f"{path} is no checkpoint: its average holds other things than tensors by name and a count.")
    return content


def check_state(state: Any, path: Any) -> dict[str, Any]:
    """Check the part of a checkpoint from which a run goes on.

    Args:
        state: That part.
        path: The file, for the message.

    Raises:
        FileError: If an entry is missing, or of another type.
    """
    if not isinstance(state, dict):
        raise FileError(f"{path} has no part from which a run can go on; it is a {type(state).__name__}.")
    _refuse_wrong(state, _STATE, path)
    _refuse_wrong(state, {"earlier": (list,), "others": (list,)}, path, needed=False)
    best = state["best"]
    if best is not None:
        _refuse_wrong(best, _BEST, path)
        if best["file"] in ("", ".", "..") or "/" in best["file"] or "\\" in best["file"]:
            raise FileError(f"{path} names {best['file']!r} as its best epoch, which is no file beside it.")
    return state


def check_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Any) -> None:
    """Check tensors before the first of them is copied.

    Args:
        tensors: Those of a checkpoint.
        own: Those of the task; names that only one of them has are left to the caller.
        path: The file, for the message.

    Raises:
        FileError: If one has another shape.
    """
    for name in sorted(tensors.keys() & own.keys()):
        if tensors[name].shape != own[name].shape:
            raise FileError(
                f"{path} holds {name} with the shape {tuple(tensors[name].shape)}, and the task has "
                f"{tuple(own[name].shape)}. Use the method and the backbone it was written with."
            )


def take_shapes(tensors: Mapping[str, Tensor], task: nn.Module, path: Any) -> None:
    """Give units whose sizes data decide those of a checkpoint, and check all tensors.

    Args:
        tensors: Those of a checkpoint.
        task: The task.
        path: The file, for the message.

    Raises:
        FileError: If one has another shape.
    """
    resize_units(units_of(task), tensors)
    check_shapes(tensors, task.state_dict(), path)


def check_output(own: Mapping[str, Any], saved: Mapping[str, Any], path: Any) -> None:
    """Refuse a file whose outputs are read in another way than a task's.

    Args:
        own: The task's note on outputs.
        saved: That of the file; one of earlier versions may be empty.
        path: Where it is, for the message.

    Raises:
        FileError: If target, or the decoder, are others.
    """
    kind, wanted = saved.get("target"), own.get("target")
    if None not in (kind, wanted) and kind != wanted:
        raise FileError(f"{path} was trained for targets of the kind {kind!r}, and the task has {wanted!r}.")
    ours, theirs = own.get("decoder"), saved.get("decoder")
    if ours is None or theirs is None:
        return
    other = [key for key in ("name", "taps", "levels") if theirs.get(key, ours[key]) != ours[key]]
    if other:
        listing = ", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in other)
        raise FileError(f"{path} was trained with another decoder than the task has: {listing}.")


def _tensors(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        for key, value in values.items()
    )


def _refuse_wrong(
    entries: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], path: Any, *, needed: bool = True
) -> None:
    for name, wanted in types.items():
        if name not in entries:
            if needed:
                raise FileError(f"{path} cannot be read: its entry {name!r} is missing.")
            continue
        if not _is(entries[name], wanted):
            raise FileError(f"{path} cannot be read: its entry {name!r} is a {type(entries[name]).__name__}.")


def _is(value: Any, wanted: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in wanted
    if not isinstance(value, wanted):
        return False
    return not isinstance(value, int) or -1 <= value < _MOST
