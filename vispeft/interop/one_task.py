"""One task of an adapter with tasks, as an adapter without tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from vispeft.adapters.bank import AdapterBank
from vispeft.core.method import Method
from vispeft.errors import ConfigError, UnknownNameError
from vispeft.methods.polyhistor import HyperAdapter, Polyhistor

__all__ = ["export_task"]


def export_task(bank: AdapterBank, task: str, name: str | None = None, new: str | None = None) -> str:
    """Add a plain adapter with the outputs of another adapter for one of its tasks, such as for deployment.

    `Polyhistor` becomes an `Adapter` with the tensors generated for the task, and per-task copies of any other method
    become that method with the tensors of this copy. The new adapter gets copies of the classifier and of the notes.
    The route stays as it was.

    Args:
        bank: The bank of the model.
        task: The task.
        name: The adapter with tasks; may be left out where only one acts.
        new: Name of the new adapter; by default the name of the other one, an underscore and the task.

    Returns:
        The name of the new adapter, for `AdapterBank.save`.

    Raises:
        UnknownNameError: If the adapter has no such task.
        ConfigError: If the method has no plain form, or none on this backbone.

    Example:
        >>> bank.save("depth_adapter", export_task(bank, "depth"))
    """
    method, tasks = bank.plan(name).method, bank.tasks(name)
    if task not in tasks:
        raise UnknownNameError("task to export", task, tasks)
    label = name if name is not None else bank.active[0]
    plain, tensors = _plain(bank, method, label, task)
    label_new = new or f"{label}_{task}"
    acting, present = bank.active, bank.task
    bank.add(plain, label_new, verify=False)
    try:
        _fill(bank, label_new, tensors)
        bank.put_head(label_new, copy.deepcopy(bank.head(label)))
        bank.annotate(label_new, **bank.notes(label))
    except BaseException:
        bank.detach(label_new)
        raise
    finally:
        bank.set_active(acting, task=present)
    return label_new


@torch.no_grad()
def _plain(bank: AdapterBank, method: Method, label: str, task: str) -> tuple[Method, dict[str, Tensor]]:
    """Return the plain method and its tensors by their names in files."""
    if isinstance(method, Polyhistor):
        found: dict[str, Tensor] = {}
        for key, unit in bank.units(label).items():
            if isinstance(unit, HyperAdapter):
                site, _, own = key.rpartition("/")
                place = f"{site}/{own.replace('polyhistor', 'adapter')}"
                made = unit.weights(task)._asdict()
                found |= {f"{place}.{name}": tensor for name, tensor in made.items() if tensor is not None}
        return method.plain(), found
    if method.multi_task:
        raise ConfigError(
            f"export_task(task={task!r}): {type(method).__name__} has no plain adapter of one task. Save the whole "
            "adapter, and choose the task with using(task=...)."
        )
    found = {}
    for key, tensor in bank.state_dict(label).items():
        site, _, rest = key.rpartition("/")
        unit, _, name = rest.partition(".")
        if unit.endswith(f"@{task}"):
            found[f"{site}/{unit.removesuffix(f'@{task}')}.{name}"] = tensor
    return method, found


def _fill(bank: AdapterBank, label: str, tensors: Mapping[str, Tensor]) -> None:
    wanted = {key: tuple(t.shape) for key, t in bank.state_dict(label).items() if not key.startswith("head/")}
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    if wanted != found:
        odd = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))[0]
        raise ConfigError(
            f"export_task: {odd} of the plain adapter has shape {wanted.get(odd)}, and that generated for the task "
            f"{found.get(odd)}. With lite, choose a reduction that divides the width of the first stage."
        )
    bank.load_state_dict(tensors, label)
