"""Changes of saved adapters whose digests are right again, as a hostile writer would make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vispeft.adapters.bank import AdapterBank
from vispeft.storage.files import _digest


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of ``adapter.json`` in place, and correct its digest."""
    path = folder / "adapter.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    change(header)
    header["digest"] = ""
    header["digest"] = _digest(header)
    path.write_text(json.dumps(header), encoding="utf-8")


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of one file in place, and correct its sha256."""
    tensors = load_file(folder / name)
    change(tensors)
    content = save(tensors)
    (folder / name).write_bytes(content)
    edit(folder, lambda header: header["files"].update({name: hashlib.sha256(content).hexdigest()}))


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that puts a value at a place such as ``method.fields.rank``."""

    def change(header: dict[str, Any]) -> None:
        *parents, leaf = place.split("/")
        inside: Any = header
        for key in parents:
            inside = inside[int(key) if isinstance(inside, list) else key]
        if value is ...:
            del inside[leaf]
        else:
            inside[int(leaf) if isinstance(inside, list) else leaf] = value

    return change


def state_of(model: Any) -> dict[str, Any]:
    """Describe all of a model that a load may change: tensors, flags, modes, classes, route, and the random state."""

    bank = AdapterBank.of(model)
    return {
        "tensors": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "flags": {name: tensor.requires_grad for name, tensor in model.named_parameters()},
        "modules": {path: (type(module), module.training, id(module)) for path, module in model.named_modules()},
        "classes": model.num_classes,
        "bank": None if bank is None else (bank.names, bank.active, bank.task, bank.frozen, bank.notes(bank.names[0])),
        "random": torch.random.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Compare two results of `state_of`."""

    plain = ("flags", "modules", "classes", "bank")
    return (
        all(before[key] == after[key] for key in plain)
        and torch.equal(before["random"], after["random"])
        and list(before["tensors"]) == list(after["tensors"])
        and all(torch.equal(tensor, after["tensors"][key]) for key, tensor in before["tensors"].items())
    )
