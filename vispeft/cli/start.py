"""Starting a new task from an existing adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vispeft.adapters.fitting import check_planned
from vispeft.core.families import unwrap
from vispeft.core.method import Method, method_from_dict
from vispeft.errors import ConfigError
from vispeft.storage.files import read_adapter, read_encoded
from vispeft.storage.fingerprint import check_fingerprint
from vispeft.tasks.base import AdapterTask
from vispeft.zoo.adapters import find_adapter

__all__ = ["check_source", "start_from"]


def start_from(task: AdapterTask, source: str, class_names: Sequence[str]) -> str:
    """Load the values of a saved adapter into a task's adapter.

    Args:
        task: The task, with a fresh adapter of the same method on the same backbone.
        source: Location of the saved adapter; see `find_adapter`.
        class_names: Names of the new task's classes; the saved head is kept only if they are the same.

    Raises:
        ConfigError: If the saved adapter is of another method.
        BaseMismatchError: If it was trained on another backbone.
        FileError: If it is missing or damaged.
    """
    method = task.bank.plan().method

    def check(found: dict[str, Any]) -> None:
        _check_method(method, found["method"], source)
        check_fingerprint(found["backbone"]["fingerprint"], unwrap(task.model), task.bank.view)
        check_planned(task.bank, found)

    header, units, head = read_adapter(find_adapter(source), check)
    names, word = list(header["class_names"] or []), task.head_name
    fits = {key: t.shape for key, t in task.head_tensors().items()} == {key: t.shape for key, t in head.items()}
    own, saved = task.output(), header["output"] or {}
    same_maps = _read_alike(own.get("decoder"), saved.get("decoder"))
    same_names = names == list(class_names) or (not task.ordered and sorted(names) == sorted(class_names))
    same_names = (same_names or not task.by_class) and own.get("tasks") == saved.get("tasks")
    reason = method.fresh_head()
    kept = bool(head) and fits and same_maps and same_names and reason is None
    task.take(units, head if kept else {})
    if task.head_start is not None:
        task.head_start.anew = not kept
    if kept:
        unused = "" if task.head_start is None else " It is trained already, so head_start has no effect."
        return f"Started from {source}, with its {word}.{unused}"
    if reason is not None:
        return f"Started from {source}; the {word} is a fresh one, because {reason}."
    if same_names:
        why = "another shape" if same_maps else "it read other maps"
        return f"Started from {source}; the {word} is a fresh one ({why})."
    why = f"{len(names)} classes there, {len(class_names)} here" if len(names) != len(class_names) else "other classes"
    if task.ordered and sorted(names) == sorted(class_names):
        why = "the same classes in another order"
    return f"Started from {source}; the {word} is a fresh one ({why})."


def check_source(source: str, method: type[Method]) -> None:
    """Refuse an adapter that cannot be read, or is of another method, before there is a task.

    Args:
        source: Location of the saved adapter; see `find_adapter`.
        method: Class of the method that is to train.

    Raises:
        ConfigError: If the adapter is of another method.
        FileError: If it is missing or damaged.
    """
    header, _, _ = read_encoded(find_adapter(source))
    _check_name(method, header["method"], source)


def _read_alike(own: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> bool:
    """Whether two decoders, as far as both are described, have the same kind and read the same maps."""
    return own is None or saved is None or all(own[key] == saved.get(key) for key in ("name", "taps", "levels"))


def _check_name(own: Method | type[Method], saved: Mapping[str, Any], source: str) -> None:
    if own.name != saved["name"]:
        raise ConfigError(
            f"{source} is an adapter of the method {saved['name']}, and this run trains {own.name}. "
            f"Give --method {saved['name']}, or another adapter."
        )


def _check_method(own: Method, saved: dict[str, Any], source: str) -> None:
    _check_name(own, saved, source)
    there = method_from_dict(saved)
    if own.is_like(there):
        return
    ours, theirs = own.to_dict()["fields"], there.to_dict()["fields"]
    other = [
        f"{name}: {value!r} there, {ours[name]!r} here"
        for name, value in theirs.items()
        if value != ours[name] and name not in own.training_fields
    ]
    raise ConfigError(
        f"{source} is an adapter of {own.name} with other fields ({'; '.join(other)}). Set --model.method.NAME to the "
        "same values."
    )
