"""The step of a training that met a value that is not finite: what it started from, kept for ``vispeft replay``."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vispeft.errors import FileError
from vispeft.storage.disk import read_regular, write_atomically
from vispeft.tasks.state import generator_states, packed

__all__ = ["FAILURE", "Failure", "StepStart", "keep_failure", "put_back", "read_failures"]

FAILURE = "failure.pt"
"""File of a kept step in its run directory."""
_KEYS = {"told": str, "step": int, "epoch": int, "index": int, "precision": str, "tensors": dict, "random": dict}


@dataclass(frozen=True)
class StepStart:
    """What a step starts from, besides the weights."""

    batch: Any
    index: int
    """Number of the batch in its epoch."""
    random: dict[str, Any]
    """States of all generators, as `generator_states` takes them."""

    @classmethod
    def now(cls, batch: Any, index: int) -> StepStart:
        """Note the start of a step.

        Args:
            batch: Its batch.
            index: Number of the batch in its epoch.
        """
        return cls(batch, index, generator_states())


@dataclass(frozen=True)
class Failure:
    """A kept step."""

    told: str
    """What was found, and in which step."""
    step: int
    epoch: int
    index: int
    precision: str
    """The trainer's."""
    tensors: dict[str, Tensor]
    """The tensors that training changes, by state-dict name, as they were found."""
    random: dict[str, Any]
    batch: Any


def keep_failure(folder: Path, task: Any, trainer: Trainer, start: StepStart, told: str) -> Path:
    """Write what is needed to run a step again.

    Args:
        folder: The run directory.
        task: The task.
        trainer: Its trainer.
        start: What the step started from.
        told: What was found.

    Returns:
        The file.

    Raises:
        FileError: If it cannot be written.
    """
    content = {
        "told": told,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "index": start.index,
        "precision": str(trainer.precision),
        "tensors": changed_tensors(task),
        "random": packed(start.random),
        "batch": _on_cpu(start.batch),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # Of several processes each keeps its own batch: after an exchange of gradients all of them find the same fault.
    path = folder / (FAILURE if trainer.global_rank == 0 else f"failure-{trainer.global_rank}.pt")
    write_atomically({path: buffer.getvalue()})
    return path


def changed_tensors(task: Any) -> dict[str, Tensor]:
    """Collect the tensors that training changes.

    Args:
        task: The task.
    """
    found = {**dict(task.trainable_parameters()), **dict(task.named_buffers())}
    return {name: _on_cpu(tensor.detach()) for name, tensor in found.items()}


def read_failures(run: Path) -> list[Failure]:
    """Read the kept step of a run, as each of its processes kept it.

    Args:
        run: The run directory.

    Raises:
        FileError: If there is none, or one cannot be read.
    """
    paths = sorted(path for path in run.glob("failure*.pt") if path.is_file())
    if not paths:
        raise FileError(
            f"{run} has no {FAILURE}: no step of it has met a value that is not finite, or an earlier version ran it."
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> Failure:
    try:
        content = torch.load(io.BytesIO(read_regular(path)), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser may raise anything for bytes that are no such file
        raise FileError(f"{path} cannot be read: {str(error).splitlines()[0] or type(error).__name__}") from error
    wrong = not isinstance(content, dict) or {*_KEYS, "batch"} != content.keys()
    if wrong or any(not isinstance(content[key], kind) for key, kind in _KEYS.items()):
        raise FileError(f"{path} cannot be read: it has other entries than a kept step.")
    return Failure(**content)


def _on_cpu(values: Any) -> Any:
    return pytree.tree_map(lambda value: value.detach().cpu().clone() if isinstance(value, Tensor) else value, values)


def put_back(task: nn.Module, failure: Failure) -> None:
    """Load the tensors of a kept step into its task.

    Args:
        task: The task.
        failure: The step.

    Raises:
        FileError: If a tensor is unknown, or of another shape.
    """
    own = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    for name, tensor in failure.tensors.items():
        if name in own and own[name].shape == tensor.shape:
            own[name].data.copy_(tensor)
        elif name.endswith(".gain"):  # there only while a schedule, or a weight, multiplies a contribution
            task.get_submodule(name.rpartition(".")[0]).gain = tensor
        else:
            raise FileError(f"The kept step has {name} with the shape {tuple(tensor.shape)}, and the task has not.")
