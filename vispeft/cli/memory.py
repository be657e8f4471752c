"""``vispeft inspect CONFIG --memory``: an estimate of the memory that a training step takes, before it is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from vispeft.cli.config import ConfigCLI
from vispeft.cli.speed import QUIET, OneBatch, images_of
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError
from vispeft.resources import find_config
from vispeft.tasks.base import AdapterTask

__all__ = ["MemoryEstimate", "estimate_memory"]

FEW, MORE = 2, 4
"""Images of the two steps that are run, of batches that have them; what is kept grows in proportion to the images."""
CARDS = (8, 16, 24, 40, 80, 141)
"""Memory of common GPUs, GiB."""
CONTEXT = 0.5
"""GiB that CUDA and its libraries take beside the tensors, roughly."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a training step by what they are for."""

    parameters: int
    """Parameters and buffers of the backbone, the adapter and the task."""
    gradients: int
    """Gradients of the trained tensors."""
    optimizer: int
    """State of the optimiser."""
    constant: int
    """Kept for the backward pass whatever the batch, such as casts of frozen matrices."""
    per_image: float
    """Kept for the backward pass for each image."""
    temporary: float
    """The largest of these tensors with its gradient, for each image, which is there for a moment."""
    batch: int
    """Images of a step."""

    @property
    def fixed(self) -> int:
        """What a step takes whatever the batch."""
        return self.parameters + self.gradients + self.optimizer + self.constant

    @property
    def total(self) -> int:
        """The estimate of the peak."""
        return int(self.fixed + self.batch * (self.per_image + self.temporary))

    def largest_batch(self, gib: float) -> int:
        """Return the number of images with which a step fits, 0 for none.

        Args:
            gib: Memory of the device, GiB.
        """
        left = (gib - CONTEXT) * 2**30 - self.fixed
        return max(0, int(left // (self.per_image + self.temporary)))

    def table(self) -> Table:
        """Arrange the figures for the terminal."""
        table = Table(title=f"Memory of a training step with {self.batch} images, estimated")
        table.add_column("")
        table.add_column("MiB", justify="right")
        rows = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "kept for the backward pass": self.constant + self.batch * self.per_image,
            "of the largest layer, for a moment": self.batch * self.temporary,
            "peak": self.total,
        }
        for name, count in rows.items():
            table.add_row(name, f"{count / 2**20:,.0f}")
        return table

    def fits(self) -> str:
        """Say how many images fit into the memory of common GPUs."""
        told = ", ".join(f"{gib} GiB: {self.largest_batch(gib):,}" for gib in CARDS)
        return f"Images that fit into a step, with {CONTEXT} GiB for CUDA itself: {told}."


def estimate_memory(place: str, overrides: Sequence[str] = ()) -> MemoryEstimate:
    """Estimate the peak memory of a training step of a config, by two steps with few images on the CPU.

    Weights in memory change; nothing is written. Activations follow from the method, the image size, the precision, and
    ``memory`` and ``token_merging`` of the config, since they are counted and not computed from formulas. Compiled
    graphs keep other ones, about as many.

    Args:
        place: A config, or the name of a packaged one.
        overrides: Changes to the config.

    Raises:
        ConfigError: If it is something else, or its settings do not fit.
        DataError: If the data cannot be used.
    """
    if os.path.isdir(place):
        raise ConfigError(f"--memory estimates a training of a config, and {place} is a folder. Give its config.yaml.")
    cli = ConfigCLI(find_config(place), overrides)
    task, data = cli.model, cli.datamodule
    if isinstance(data, ImageData):
        data.fit_to(task.preprocessing)
    data.setup("fit")
    task.check_data(data)
    cli.prepare_model()
    batch = next(iter(data.train_dataloader()))
    few, more = (FEW, MORE) if images_of(batch) >= MORE else (1, 2)
    if images_of(batch) < more:
        raise ConfigError(f"--memory runs 1 and 2 images, and a batch of {place} has one. Give --data.batch_size 2.")
    precision = _on_cpu(cli.trainer_settings.get("precision"))
    counts = {}
    for number in (few, more):
        data.train_dataloader = partial(OneBatch, _cut(batch, number), 1)
        trainer = Trainer(accelerator="cpu", devices=1, precision=precision, max_epochs=1, **QUIET)
        counts[number] = _kept(task, trainer, data)
    state = [tensor for group in trainer.optimizers for held in group.state.values() for tensor in held.values()]
    (few_bytes, _), (more_bytes, more_largest) = counts[few], counts[more]
    per_image = (more_bytes - few_bytes) / (more - few)
    return MemoryEstimate(
        parameters=_bytes([*task.parameters(), *task.buffers()]),
        gradients=_bytes([p for p in task.parameters() if p.requires_grad]),
        optimizer=_bytes([tensor for tensor in state if isinstance(tensor, Tensor)]),
        constant=max(0, int(few_bytes - few * per_image)),
        per_image=per_image,
        temporary=2 * more_largest / more,
        batch=images_of(batch),
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _on_cpu(precision: Any) -> Any:
    """Return the precision with which a CPU keeps as many bytes."""
    told = "32-true" if precision is None else str(precision)
    return "bf16-mixed" if told == "16-mixed" else told


def _cut(batch: Any, number: int) -> Any:
    """Return the first images of a batch, with their targets."""
    count = images_of(batch)
    return tree_map(lambda x: x[:number] if isinstance(x, Tensor) and x.ndim and len(x) == count else x, batch)


def _kept(task: AdapterTask, trainer: Trainer, data: Any) -> tuple[int, int]:
    """Run one step; return the bytes that it keeps for its backward pass, and those of the largest tensor."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers()]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    step = task.training_step

    def counted(*args: Any, **arguments: Any) -> Any:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return step(*args, **arguments)

    task.__dict__["training_step"] = counted
    try:
        trainer.fit(task, datamodule=data)
    finally:
        del task.__dict__["training_step"]
    return sum(storages.values()), max(storages.values(), default=0)
