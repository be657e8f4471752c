"""The processes of a training: which one this is, how the others are started, and what they leave to the first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from vispeft.errors import ConfigError
from vispeft.tasks.sharding import ShardedStrategy

__all__ = ["OWN", "STRATEGIES", "Team", "leave_group", "make_strategy", "started", "watch_parent"]

STRATEGIES = ("auto", "ddp", "ddp_bf16", "fsdp2")
"""Ways to train in several processes: ``ddp_bf16`` exchanges gradients in bfloat16, ``fsdp2`` shards frozen weights."""
OWN = ("ddp_bf16", "fsdp2")
"""Those that Lightning does not know by these names."""
RUN = "VISPEFT_RUN_DIRECTORY"
"""Variable by which the first process tells those it starts which run directory it has made."""
_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that Lightning sets when it starts processes."""
_begun: list[Path] = []
"""Run directories of the trainings of this process."""
_LOOK = 2.0
"""Seconds between two looks at whether the first process still lives."""


@dataclass(frozen=True)
class Team:
    """The processes that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    processes: int = 1
    """How many there are."""
    local: bool = True
    """Whether the first process starts all others."""
    shards: bool = False
    """Whether each has a part of the frozen weights."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Team:
        """Read the section ``trainer`` of a config, and the environment of this process.

        Args:
            settings: The section, as it was read.

        Raises:
            ConfigError: If the strategy is no one of `STRATEGIES`.
        """
        kept = {key: settings[key] for key in ("accelerator", "devices", "num_nodes") if settings.get(key) is not None}
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(**kept, **quiet, enable_model_summary=False)
        if trainer.world_size == 1:
            return cls()
        name = settings.get("strategy") or "auto"
        if name not in STRATEGIES:
            raise ConfigError(
                f"trainer.strategy is {name}, with {trainer.world_size} processes. Choose {', '.join(STRATEGIES)}: "
                "adapters are small, so each process has the frozen backbone (ddp), or a part of it (fsdp2)."
            )
        strategy: Any = trainer.strategy
        outside = bool(strategy.cluster_environment.creates_processes_externally)
        by_us = RUN in os.environ
        local = by_us or not (outside or trainer.num_nodes > 1)
        return cls(trainer.global_rank, trainer.world_size, local, name == "fsdp2")

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def place(self, out: str | Path | None) -> str | Path | None:
        """Return the run directory asked for, or the one that the first process has made.

        Args:
            out: What the command names; None for the next number.

        Raises:
            ConfigError: If processes that were not started here do not know it.
        """
        if self.rank and RUN in os.environ:
            return os.environ[RUN]
        if self.processes > 1 and not self.local and out is None:
            raise ConfigError(
                f"{self.processes} processes were started from outside (torchrun, SLURM, or one command per node), and "
                "each would make a run directory of its own. Name one that all of them see: --out DIR."
            )
        return out


@contextmanager
def started(place: Path, trainer: Trainer) -> Iterator[None]:
    """Tell processes that a trainer starts the run directory, and end them with this one.

    Args:
        place: The directory.
        trainer: The trainer, whose `fit` is called inside.
    """
    if trainer.world_size > 1 and _begun:
        raise ConfigError(
            "This script begins a second training in several processes. Each of them runs the script from its start, "
            "and could not tell one training from the other. Begin one training in a script."
        )
    _begun.append(place)
    before = {name: os.environ.get(name) for name in (RUN, *_LAUNCHED)}
    os.environ[RUN] = os.path.abspath(place)
    try:
        yield
    except BaseException:
        launcher: Any = trainer.strategy.launcher
        if hasattr(launcher, "kill"):
            launcher.kill(15)
        raise
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_strategy(settings: Mapping[str, Any], search: bool) -> DDPStrategy:
    """Create the strategy of a training in several processes.

    Args:
        settings: The section ``trainer``.
        search: Whether a step may leave trained tensors without a gradient, which are then searched for in each.
    """
    options: dict[str, Any] = {"find_unused_parameters": search, "gradient_as_bucket_view": True}
    if settings.get("strategy") == "fsdp2":
        return ShardedStrategy(**options)
    if settings.get("strategy") == "ddp_bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        options["ddp_comm_hook"] = bf16_compress_hook
    return DDPStrategy(**options)


def leave_group() -> None:
    """Leave the group of processes once all have trained, so that the first one can go on alone."""
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_backend() == "nccl":
            distributed.barrier(device_ids=[torch.cuda.current_device()])
        else:
            distributed.barrier()
        distributed.destroy_process_group()


def watch_parent() -> None:
    """End this process, which the first one has started, soon after that one has ended, however it did."""
    if RUN not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
