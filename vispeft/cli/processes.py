"""The processes of a training: which one this is, how the others are started, and what they leave to the first."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed

from vispeft.cli.stopping import Stopped, command_to_go_on
from vispeft.errors import ConfigError, TrainingError, VispeftError, brief, counted
from vispeft.tasks.sharding import ShardedStrategy

__all__ = ["OWN", "STRATEGIES", "Team", "following", "leave_group", "make_strategy", "started", "watch_parent"]

STRATEGIES = ("auto", "ddp", "ddp_bf16", "fsdp2")
"""Ways to train in several processes: ``ddp_bf16`` exchanges gradients in bfloat16, ``fsdp2`` shards frozen weights."""
OWN = ("ddp_bf16", "fsdp2")
"""Those that Lightning does not know by these names."""
RUN = "VISPEFT_RUN_DIRECTORY"
"""Variable by which the first process tells those it starts which run directory it has made."""
_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that Lightning sets when it starts processes."""
FIRST = "VISPEFT_FIRST_PROCESS"
"""Variable by which it tells them its process id."""
_begun: list[Path] = []
"""Run directories of the trainings of this process."""
_LOOK = 2.0
"""Seconds between two looks at whether the first process still lives."""
_REAPED = 30.0
"""Seconds within which a process is seen to have ended whose connections were closed: Python takes some to leave."""
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out")
"""Words in the errors of an exchange with a process that has ended."""


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
            ConfigError: If there are fewer devices, or the strategy is no one of `STRATEGIES`.
        """
        kept = {key: settings[key] for key in ("accelerator", "devices", "num_nodes") if settings.get(key) is not None}
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        try:
            trainer = Trainer(**kept, **quiet, enable_model_summary=False)
        except MisconfigurationException as error:
            raise ConfigError(
                f"trainer.devices is {kept.get('devices', 'auto')} with trainer.accelerator "
                f"{kept.get('accelerator', 'auto')}, and this machine has {_there_are()}. Ask for those, or train on "
                f"the processor: --trainer.accelerator cpu. ({brief(error)})"
            ) from error
        name = settings.get("strategy") or "auto"
        if name not in STRATEGIES:
            raise ConfigError(
                f"trainer.strategy is {name}, with {counted(trainer.world_size, 'process', 'processes')}. Choose "
                f"{', '.join(STRATEGIES)}: adapters are small, so each process has the frozen backbone (ddp), or a "
                "part of it (fsdp2)."
            )
        if trainer.world_size == 1:
            return cls()  # whatever the strategy, which has nothing to do then
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
def started(place: Path, trainer: Trainer, needed: Sequence[str] = ()) -> Iterator[None]:
    """Tell processes that a trainer starts the run directory, and end them with this one.

    Args:
        place: The directory.
        trainer: The trainer, whose `fit` is called inside.
        needed: Arguments that going on needs besides the run.
    """
    if trainer.world_size > 1 and _begun:
        raise ConfigError(
            "This script begins a second training in several processes. Each of them runs the script from its start, "
            "and could not tell one training from the other. Begin one training in a script."
        )
    _begun.append(place)
    before = {name: os.environ.get(name) for name in (RUN, FIRST, *_LAUNCHED)}
    os.environ[RUN], os.environ[FIRST] = os.path.abspath(place), str(os.getpid())
    over, command = threading.Event(), _Command(place, command_to_go_on(place, needed))
    if trainer.world_size > 1:
        threading.Thread(target=_tell_of_dead, args=(trainer, command, over), daemon=True, name="watch-others").start()
    try:
        yield
    except BaseException as error:
        lost = trainer.world_size > 1 and _is_lost(error)
        dead = _dead(trainer, _REAPED) if lost else None
        over.set()
        launcher: Any = trainer.strategy.launcher
        if hasattr(launcher, "kill"):
            launcher.kill(signal.SIGTERM)
            launcher.procs.clear()  # Lightning's watch over them would end this process before it has said why
        if lost:
            said = dead or f"Another process of the training has ended ({brief(error)})"
            raise TrainingError(_ended(said, command, trainer)) from error
        raise
    finally:
        over.set()
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


def _there_are() -> str:
    count = torch.cuda.device_count()
    return f"{count} GPU{'' if count == 1 else 's'}"


def _is_lost(error: BaseException) -> bool:
    """Whether an exchange failed because another process has ended, and not by a fault of this one."""
    if isinstance(error, VispeftError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in _LOST)


def _dead(trainer: Trainer, within: float) -> str | None:
    """Say which of the processes that this one has started ended badly, after waiting a little for it."""
    others = getattr(trainer.strategy.launcher, "procs", ())
    until = time.monotonic() + within
    while True:
        for number, process in enumerate(others, 1):
            status = process.poll()
            if status:
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"Process {number} of the training {how}; what it said stands above"
        if not others or time.monotonic() >= until:
            return None
        time.sleep(0.1)


class _Command(NamedTuple):
    """A run, and the command that goes on with it."""

    place: Path
    text: str


def _ended(said: str, command: _Command, trainer: Trainer) -> str:
    place = command.place
    begun = getattr(trainer.checkpoint_callback, "began", False) or any(place.glob("checkpoints/step-*.ckpt"))
    how = f"Go on by {command.text}" if begun else "No step was made; give the same command again."
    return f"{said}. All others have ended with it. {how}"


def _tell_of_dead(trainer: Trainer, command: _Command, over: threading.Event) -> None:
    """Say that a process has ended, before Lightning ends this one as well without a word.

    It does so where this one waits in an exchange, which a GPU's library does not give up.
    """
    while not over.wait(_LOOK / 2):
        said = _dead(trainer, 0)
        if said is not None and not over.wait(_LOOK):
            print(f"error: {_ended(said, command, trainer)}", file=sys.stderr, flush=True)
            return


@contextmanager
def following(rank: int) -> Iterator[None]:
    """Say briefly that a process which is not the first lost the others: what ended them is said by one of them.

    Args:
        rank: Its number.

    Raises:
        TrainingError: If an exchange failed because another process has ended.
    """
    try:
        yield
    except Stopped as stopped:
        if FIRST in os.environ:  # by the first one, or together with it
            raise SystemExit(stopped.status) from None
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        print(f"Process {rank} of the training lost the others: {brief(error)}", file=sys.stderr, flush=True)
        if _first_tells():
            raise SystemExit(1) from error
        raise TrainingError(f"Process {rank} ends, since another process of the training has ended.") from error


def _first_tells() -> bool:
    """Whether the first process has started this one and says what has happened: it lives, or has ended this one."""
    try:
        time.sleep(_LOOK / 4)
    except Stopped:
        return FIRST in os.environ
    return os.environ.get(FIRST) == str(os.getppid())


def leave_group() -> None:
    """Leave the group of processes once all have trained, so that the first one can go on alone."""
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_backend() == "nccl":
            distributed.barrier(device_ids=[torch.cuda.current_device()])
        else:
            distributed.barrier()
        distributed.destroy_process_group()


def watch_parent() -> None:
    """End this process, which the first one has started, soon after that one has ended, however it did.

    It may have ended already, while this process was still importing.
    """
    if FIRST not in os.environ:
        return
    # Windows starts an environment's Python by another process.
    parent = int(os.environ[FIRST]) if os.name == "posix" else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
