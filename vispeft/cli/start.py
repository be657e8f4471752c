"""Starting a new task from an adapter that exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vispeft.core.families import unwrap
from vispeft.errors import ConfigError
from vispeft.storage.files import read_adapter
from vispeft.storage.fingerprint import check_fingerprint
from vispeft.tasks.base import AdapterTask
from vispeft.zoo.adapters import find_adapter

__all__ = ["start_from"]


def start_from(task: AdapterTask, source: str, class_names: Sequence[str]) -> str:
    """Give a task's adapter the values of a saved one.

    Args:
        task: The task, with a fresh adapter of the same method on the same backbone.
        source: Where the saved adapter is; see `find_adapter`.
        class_names: Names of the new task's classes; the saved head is kept for the same ones only.

    Returns:
        What was done, in one sentence.

    Raises:
        ConfigError: If the saved adapter is of another method.
        BaseMismatchError: If it was trained on another backbone.
        FileError: If it is missing or damaged.
    """
    folder = find_adapter(source)
    header, units, head = read_adapter(folder)
    _check_method(task.bank.plan().method.to_dict(), header["method"], source)
    check_fingerprint(header["backbone"]["fingerprint"], unwrap(task.model), task.bank.view)
    names, word = list(header["class_names"] or []), "classifier" if task.classifies else "decoder"
    fits = {key: t.shape for key, t in task.head_tensors().items()} == {key: t.shape for key, t in head.items()}
    same_maps = _read_alike(task.output().get("decoder"), (header["output"] or {}).get("decoder"))
    # A classifier whose columns are to say which features matter starts anew (public code of VQT).
    scoring = bool(getattr(task, "head_sparsity", 0))
    kept = bool(head) and fits and same_maps and names == list(class_names) and not scoring
    task.take(units, head if kept else {})
    if kept:
        return f"Started from {source}, with its {word}."
    if scoring:
        return f"Started from {source}; the {word} is a fresh one, because head_sparsity is to score its features."
    if names == list(class_names):
        why = "another shape" if same_maps else "it read other maps"
        return f"Started from {source}; the {word} is a fresh one ({why})."
    why = f"{len(names)} classes there, {len(class_names)} here" if len(names) != len(class_names) else "other classes"
    return f"Started from {source}; the {word} is a fresh one ({why})."


def _read_alike(own: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> bool:
    """Tell whether two decoders, as far as both are described, are of one kind and read the same maps."""
    return own is None or saved is None or all(own[key] == saved.get(key) for key in ("name", "taps", "levels"))


def _check_method(own: dict[str, Any], saved: dict[str, Any], source: str) -> None:
    if own["name"] != saved["name"]:
        raise ConfigError(
            f"{source} is an adapter of the method {saved['name']}, and this run trains {own['name']}. "
            f"Give --method {saved['name']}, or another adapter."
        )
    fields = {**dict.fromkeys(own["fields"]), **saved["fields"]}
    other = [
        f"{name}: {value!r} there, {own['fields'].get(name)!r} here"
        for name, value in fields.items()
        if value != own["fields"].get(name)
    ]
    if other:
        raise ConfigError(
            f"{source} is an adapter of {own['name']} with other fields ({'; '.join(other)}). Set --model.method.NAME "
            "to the same values."
        )
