"""Checks of a training before its first step: everything that would otherwise decide about its end."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vispeft.cli.config_keys import as_list
from vispeft.cli.evaluation import Outputs, evaluate, evaluation_trainer
from vispeft.core.modes import evaluating
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, DataError, FileError, UnknownNameError, is_utf8
from vispeft.storage.form import FormError, check_class_names
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.state import random_state, set_random_state
from vispeft.tasks.trainer_checks import check_precision

__all__ = [
    "check_names",
    "check_room",
    "check_settings",
    "check_text",
    "rehearse_stopping",
    "rehearse_test",
]

COPIES = 16
"""Room needed over that of the trained tensors: three states, each with weights, two moments and an EMA, two best
epochs and two adapters."""
LOGS = 20 * 2**20
"""Bytes for logs and pictures."""


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of the trainer with which a run could not be finished.

    Args:
        settings: The section ``trainer``, as it was read.

    Raises:
        ConfigError: If there is one.
    """
    if settings.get("logger") is False:
        raise ConfigError("trainer.logger is off, and a run directory always keeps its logs. Leave it out.")
    for name in ("fast_dev_run", "barebones"):
        if settings.get(name):
            raise ConfigError(
                f"trainer.{name} makes no run directory. For a quick look use --trainer.max_epochs 1 "
                "--trainer.limit_train_batches 2."
            )
    if settings.get("enable_checkpointing") is False:
        raise ConfigError("trainer.enable_checkpointing is off, and the best epoch is chosen among checkpoints.")
    check_precision(settings.get("precision"))
    _check_length(settings)
    _check_numbers(settings)


def _check_length(settings: dict[str, Any]) -> None:
    epochs, steps = settings.get("max_epochs"), settings.get("max_steps", -1)
    if epochs == 0 or steps == 0:
        raise ConfigError(f"trainer.max_epochs is {epochs} and trainer.max_steps {steps}; at least 1 is needed.")
    if epochs in (None, -1) and steps == -1:
        raise ConfigError("trainer.max_epochs sets no end, and the learning rate needs one. Give a number.")
    every = settings.get("check_val_every_n_epoch", 1)
    if every is not None and every < 1:
        raise ConfigError(f"trainer.check_val_every_n_epoch is {every}; at least 1 is needed.")
    if every is not None and epochs not in (None, -1) and every > epochs:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch is {every} and trainer.max_epochs {epochs}: no epoch would be validated, "
            "and the best one is chosen on validation. Make it smaller."
        )


def _seconds(duration: Any) -> float:
    """Return the seconds of a limit of time, in one of Lightning's forms."""
    try:
        return Timer(duration=duration).time_remaining() or 0.0
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(
            f"trainer.max_time is {duration}: give days, hours, minutes and seconds as 00:12:00:00, or as keys."
        ) from error


def _check_numbers(settings: dict[str, Any]) -> None:
    for split, why in (
        ("train", "nothing would be trained"),
        ("val", "the best epoch is chosen on validation"),
        ("test", "the run ends with the figures of its test split"),
    ):
        if settings.get(f"limit_{split}_batches") == 0:
            raise ConfigError(f"trainer.limit_{split}_batches is 0, and {why}. Give more.")
    interval = settings.get("val_check_interval")
    if isinstance(interval, (int, float)) and interval <= 0:
        raise ConfigError(f"trainer.val_check_interval is {interval}; a number above 0 is needed.")
    allowed = settings.get("max_time")
    if allowed is not None and not _seconds(allowed) > 0:
        raise ConfigError(f"trainer.max_time is {allowed}, in which nothing would be trained. Give more.")
    summed = settings.get("accumulate_grad_batches", 1)
    if summed < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {summed}; at least 1 is needed.")
    clip = settings.get("gradient_clip_val")
    if clip is not None and not 0 <= clip < math.inf:
        raise ConfigError(f"trainer.gradient_clip_val is {clip}; a number from 0 is needed, or null.")


def check_text(config: str, place: object) -> None:
    """Check that config and run directory can be written down: they are UTF-8.

    Args:
        config: The whole config, as text.
        place: The run directory; None for one that is numbered.

    Raises:
        ConfigError: If one of them is not.
    """
    bad = [line.strip() for line in config.splitlines() if not is_utf8(line)]
    if bad:
        raise ConfigError(f"The config is no UTF-8 in {bad[0]!r}, and could not be written. Give another name.")
    if place is not None and not is_utf8(str(place)):
        raise ConfigError(f"--out is {str(place)!r}, which is no UTF-8. Give another name.")


def check_names(class_names: tuple[str, ...]) -> None:
    """Check that an adapter's file may hold the class names.

    Args:
        class_names: Names of the outputs.

    Raises:
        DataError: If one is no UTF-8, occurs twice, or has control characters.
    """
    for name in class_names:
        if not is_utf8(name):
            raise DataError(
                f"The class name {name!r} is no UTF-8, and could not be written into the adapter's file. Rename the "
                "folder, or the label in the list."
            )
    try:
        check_class_names(class_names)
    except FormError as error:
        raise DataError(
            f"The data were listed, and class_names{error} An adapter's file cannot hold such names. Rename the "
            "folders, or the labels in the list."
        ) from error


def check_room(place: Path, task: AdapterTask) -> None:
    """Check that the disk has room for the checkpoints and the adapter.

    Args:
        place: The run directory, which need not exist.
        task: The task.

    Raises:
        FileError: If it has not.
    """
    trained = sum(p.numel() * p.element_size() for _, p in task.trainable_parameters())
    trained = max(trained, 4 * task.report().trained)  # class prompts in host memory are no parameters
    needed = COPIES * trained + LOGS
    there = next((folder for folder in (place, *place.absolute().parents) if os.path.isdir(folder)), Path())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise FileError(
            f"The disk of {place} has {free / 2**20:,.0f} MiB left, and checkpoints, adapter and logs of this run need "
            f"about {needed / 2**20:,.0f}. Free some space, or choose another --out."
        )


def rehearse_test(task: AdapterTask, data: Any, settings: dict[str, Any]) -> None:
    """Measure one batch of the test split, which is otherwise read for the first time after the training.

    Lightning does the same for validation when a training begins. No random number is drawn.

    Args:
        task: The task.
        data: Its data, set up.
        settings: The section ``trainer``.

    Raises:
        ConfigError: If no batch is left of the test split.
        VispeftError: If it cannot be measured.
    """
    share = settings.get("limit_test_batches")
    if isinstance(share, float) and share < 1 and isinstance(data, ImageData):
        batches = len(data.test_dataloader())
        if int(share * batches) < 1:
            raise ConfigError(
                f"trainer.limit_test_batches is {share}, which leaves none of {batches} batches. Give more."
            )
    with _rehearsing(task, data):
        trainer = evaluation_trainer(**{**settings, "limit_test_batches": 1})
        evaluate(trainer, task, data, "test", Outputs(task.kept_outputs))


def rehearse_stopping(task: AdapterTask, data: Any, settings: dict[str, Any]) -> None:
    """Check that metrics by which a training may be stopped early exist, with one batch of validation.

    Lightning looks at them after the first epoch. Those of the training itself are not known before it.

    Args:
        task: The task.
        data: Its data, set up.
        settings: The section ``trainer``.

    Raises:
        UnknownNameError: If validation has no such metric.
    """
    found = [callback for callback in as_list(settings.get("callbacks")) if isinstance(callback, EarlyStopping)]
    names = [c.monitor for c in found if not c.monitor.startswith("train/") and not c._check_on_train_epoch_end]
    if not names:
        return
    with _rehearsing(task, data):
        trainer = evaluation_trainer(**{**settings, "limit_val_batches": 1})
        evaluate(trainer, task, data, "validation")
    for name in names:
        if name not in trainer.callback_metrics:
            raise UnknownNameError("metric of EarlyStopping", name, trainer.callback_metrics)


@contextmanager
def _rehearsing(task: AdapterTask, data: Any) -> Iterator[None]:
    """Put back afterwards what a measurement changes, and start no processes for it, which take longer than a batch."""
    random = random_state()
    workers = getattr(data, "num_workers", 0)
    try:
        if isinstance(data, ImageData):
            data.num_workers = 0
        with evaluating(task):
            yield
    finally:
        if isinstance(data, ImageData):
            data.num_workers = workers
        set_random_state(random)
