"""``vispeft doctor --speed``: images per second that are read, and how many a training step takes."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluation import kept_settings
from vispeft.cli.runs import CONFIG
from vispeft.data.base import ImageData
from vispeft.data.reading import AHEAD
from vispeft.errors import ConfigError, counted
from vispeft.resources import config_names, find_config

__all__ = ["QUIET", "OneBatch", "Speed", "images_of", "measure_speed"]

SECONDS = 10.0
"""Seconds for which images are read."""
STEPS, WARMUP = 12, 3
"""Training steps on one batch, and those of them that are not timed: the first ones take memory and choose kernels."""
QUIET: dict[str, Any] = {
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a trainer that runs training steps alone."""
STEP_SETTINGS = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Settings of the trainer that change what a step costs, beside those of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of both sides of a training."""

    read: float
    """Images per second that are read, decoded and augmented."""
    needed: float
    """Images per second that training steps take, if none is waited for."""
    workers: int
    """Processes that read."""
    device: str
    """Device of the steps."""
    batch: int
    """Images of a step."""

    def lines(self) -> list[str]:
        """Say both figures, and which side waits for the other."""
        by = counted(self.workers, "worker") if self.workers else "no worker, in the process that trains"
        steps = f"steps of {counted(self.batch, 'image')} on {self.device}"
        return [
            f"read:    {self.read:,.0f} images per second, with {by}",
            f"needed:  {self.needed:,.0f} images per second, by {steps}",
            self._verdict(),
        ]

    def _verdict(self) -> str:
        if self.workers and self.read >= self.needed:
            return "Reading keeps up: the model does not wait for images."
        # Without workers a step waits for its images always; with them, only for those that are late.
        waits = 1 - self.read / self.needed if self.workers else self.needed / (self.needed + self.read)
        wanted = math.ceil(self.needed * max(1, self.workers) / self.read)
        most = os.cpu_count() or 1
        cores = "" if wanted <= most else f" (this machine has {counted(most, 'core')})"
        return (
            f"The model waits for images {waits:.0%} of the time. {counted(wanted, 'worker')} would keep up{cores}: "
            f"--data.num_workers {min(wanted, most)}. Large JPEGs are read faster with --data.decode reduced."
        )


def measure_speed(place: str, overrides: Sequence[str] = (), seconds: float | None = None) -> Speed:
    """Measure how fast the training images of a config are read, and how fast training takes them.

    Weights in memory change; nothing is written.

    Args:
        place: A config, the name of a packaged one, or a run.
        overrides: Changes to the config.
        seconds: How long images are read; None for `SECONDS`.

    Raises:
        ConfigError: If it is something else, or its settings do not fit.
        DataError: If the data cannot be used.
    """
    cli = ConfigCLI(_config(place), overrides)
    data = cli.datamodule
    if isinstance(data, ImageData):
        data.fit_to(cli.model.preprocessing)
    data.setup("fit")
    cli.model.check_data(data)
    cli.prepare_model()
    batch, read = _reading(data, SECONDS if seconds is None else seconds)
    steps, device = _steps(cli, batch)
    workers = getattr(data, "num_workers", 0)
    return Speed(read=read, needed=images_of(batch) / steps, workers=workers, device=device, batch=images_of(batch))


def _config(place: str) -> Path:
    path = Path(place)
    if os.path.isdir(path) and (path / CONFIG).is_file():
        return path / CONFIG
    if path.suffix in (".yaml", ".yml"):
        return path
    if place in config_names():
        return find_config(place)
    raise ConfigError(f"--speed measures the data and the model of a config or of a run, and {place} is neither.")


def images_of(batch: Any) -> int:
    """Count the images of a batch.

    Args:
        batch: The batch of any data module.
    """
    images = batch["image"] if isinstance(batch, Mapping) else batch[0]
    return len(images)


def _reading(data: LightningDataModule, seconds: float) -> tuple[Any, float]:
    """Return the first training batch, and how many images per second are read.

    Batches that workers had read ahead when the clock was started do not count.
    """
    loader: Any = data.train_dataloader()
    ahead = AHEAD * getattr(data, "num_workers", 0) + 1
    skipped = ahead if isinstance(loader, Sized) and len(loader) > 2 * ahead else 0
    first, images, began = None, 0, time.perf_counter()
    for number, batch in enumerate(loader):
        first = batch if first is None else first
        images += images_of(batch)
        if number + 1 == skipped:
            images, began = 0, time.perf_counter()
        elif time.perf_counter() - began > seconds:
            break
    return first, images / (time.perf_counter() - began)


class OneBatch:
    """A loader of one batch, once or several times; Lightning would take a list for several loaders."""

    def __init__(self, batch: Any, times: int) -> None:
        """Store the batch.

        Args:
            batch: The batch.
            times: How often it comes.
        """
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        """Count the batches."""
        return self.times

    def __iter__(self) -> Iterator[Any]:
        """Iterate over them."""
        return itertools.repeat(self.batch, self.times)


class _Clock(Callback):
    """Notes when each training step begins."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait for the step before, and look at the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.began.append(time.perf_counter())


def _steps(cli: ConfigCLI, batch: Any) -> tuple[float, str]:
    """Train for some steps on one batch, and return the median seconds of a step, and the device."""
    data, clock = cli.datamodule, _Clock()
    data.train_dataloader = lambda: OneBatch(batch, STEPS)  # type: ignore[method-assign]
    settings = {key: value for key, value in cli.trainer_settings.items() if key in STEP_SETTINGS}
    trainer = Trainer(
        **{key: value for key, value in kept_settings(cli.trainer_settings).items() if key not in QUIET},
        **settings,
        max_epochs=1,
        callbacks=[clock],
        **QUIET,
    )
    trainer.fit(cli.model, datamodule=data)
    seconds = [after - before for before, after in itertools.pairwise(clock.began[WARMUP:])]
    return statistics.median(seconds), str(cli.model.device)
