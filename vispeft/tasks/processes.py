"""Training in several processes: logged means over all of them, equal settings, and random numbers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from vispeft.data.base import ImageData
from vispeft.data.randomness import draw_seed
from vispeft.errors import ConfigError, TrainingError

__all__ = ["LogsTogether", "SameEverywhere", "check_processes", "collect_states", "served"]


class LogsTogether(LightningModule):
    """A module whose logged values are means over the images of all processes."""

    skips_tensors: ClassVar[bool] = False
    """Whether a training step may leave some of the trained tensors without a gradient."""

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """Log a value; metrics gather their own counts.

        Args:
            name: Its name.
            value: A number, a scalar tensor or a metric.
            args: As Lightning takes them.
            settings: As Lightning takes them.
        """
        alone = self._trainer is None or self._trainer.world_size == 1
        if not alone and not isinstance(value, (Metric, MetricCollection)):
            settings["sync_dist"] = True
            if settings.get("batch_size"):
                # Lightning divides the counts of all processes by their number and drops what is behind the point.
                settings["batch_size"] *= self._trainer.world_size
        super().log(name, value, *args, **settings)


class SameEverywhere(Callback):
    """Refuse processes that were started with different settings or data, and let each draw its own random numbers."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        """Store what has to be equal.

        Args:
            facts: Short texts by what they describe, such as the digest of the config.
        """
        self._facts = dict(facts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the facts of all processes, before the model is shared.

        Raises:
            ConfigError: If they differ.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        data, task = cast(Any, trainer).datamodule, cast(Any, pl_module)
        order = data.order_facts() if isinstance(data, ImageData) else {}
        own = {
            **self._facts,
            "torch": str(torch.__version__),
            "trained tensors": str([(name, tuple(p.shape)) for name, p in task.trainable_parameters()]),
            **{f"data: {name}": str(value) for name, value in order.items()},
        }
        found: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(found, own)
        for rank, other in enumerate(found):
            differing = [name for name in own if other.get(name) != found[0].get(name)]
            if differing:
                raise ConfigError(
                    f"Process {rank} was started with other settings or data than process 0: {', '.join(differing)} "
                    "differ. Give all processes the same config, overrides, files and versions."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each process but the first a seed of its own, so that they drop different entries."""
        if trainer.global_rank:
            torch.manual_seed(draw_seed(torch.initial_seed() % 2**31, trainer.global_rank))


def served(trainer: Trainer | None, split: str, before: int, count: int) -> Tensor:
    """Return the places in a split of the images of an evaluation batch.

    Args:
        trainer: The trainer that measures; None for a loop of one's own.
        split: validation or test.
        before: Images of the split that this process has seen in this evaluation.
        count: Images of the batch.

    Returns:
        int64 (count,).
    """
    places = torch.arange(before, before + count)
    if trainer is None or trainer.world_size == 1:
        return places
    loader = cast(Any, trainer.val_dataloaders if split == "validation" else trainer.test_dataloaders)
    return torch.tensor(list(loader.sampler))[places]


def check_processes(before: int, now: int, elastic: bool) -> None:
    """Refuse to go on with another number of processes, unless that is meant.

    Args:
        before: Number of the processes that wrote the checkpoint.
        now: Number of those there are.
        elastic: Whether another number is meant.

    Raises:
        TrainingError: If the numbers differ and that is not meant.
    """
    if before != now and not elastic:
        raise TrainingError(
            f"The checkpoint was written by {before} processes, and there are {now}. Give the same number of devices "
            f"(--trainer.devices {before}, if on one machine), or --elastic, with which those there are share the "
            "batches of the run."
        )


def collect_states(state: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    """Collect the state of each process.

    Args:
        state: That of this process: tensors and plain values.
        trainer: The trainer.

    Returns:
        All of them, in the order of the processes.
    """
    if trainer.world_size == 1:
        return [state]
    on_cpu = pytree.tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, state)
    found: list[Any] = [None] * trainer.world_size
    distributed.all_gather_object(found, on_cpu)
    return found
