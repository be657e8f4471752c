"""The end of a run: the adapter of its best epoch, then its figures, then its pictures, each failing alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

from vispeft.cli import runs
from vispeft.cli.common import console, versions
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluation import Measured, class_table, measure, metrics_table, row_name
from vispeft.cli.stopping import disk_is_full
from vispeft.errors import TrainingError, brief, counted
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE
from vispeft.tasks.checkpoints import RunCheckpoints
from vispeft.viz import learning_curves

__all__ = ["finish_run"]

logger = logging.getLogger(__name__)


def finish_run(place: Path, cli: ConfigCLI, trainer: Trainer, began: float) -> None:
    """Write what a run leaves: adapter, ``metrics.json`` and pictures, in this order.

    Files that were written stay, whatever goes wrong later: the adapter is there before anything is measured.

    Args:
        place: The run directory.
        cli: The config's objects.
        trainer: The training trainer, whose checkpoints know the best epoch.
        began: When the run began, as `time.perf_counter` tells it, without the time in which it stood still.

    Raises:
        TrainingError: If no epoch was measured.
        VispeftError: If the best epoch cannot be read, measured or written.
    """
    checkpoints = cast(RunCheckpoints, trainer.checkpoint_callback)
    if not checkpoints.best_model_path:
        raise TrainingError(
            f"No epoch of {place} was measured by {cli.model.monitor} yet, so there is no best one. Go on by "
            f"vispeft train --resume {place}"
        )
    cli.model.restore(checkpoints.best_model_path)
    # Its own count: at the end of a training, the one that Lightning writes into a file is already the next.
    best = int(cast(dict[str, Any], checkpoints.best)["epoch"])
    _save(place, cli, {})
    try:
        measured = measure(cli.trainer, cli.model, cli.datamodule)
    except Exception:
        said = (
            f"The adapter is kept in {place / runs.ADAPTER}, and could not be measured; --resume {place} tries again."
        )
        console.print(said, soft_wrap=True)
        raise
    by_split = measured.metrics.items()
    _save(place, cli, {f"{split}/{name}": value for split, metrics in by_split for name, value in metrics.items()})
    metrics = {"command": runs.command_of(place), **_figures(place, cli, trainer, measured, best, began)}
    runs.mark_unfinished(place)
    runs.write_json(place / runs.METRICS, metrics)
    if _draw(place, cli, measured, best):
        runs.mark_finished(place)
    _show(cli, metrics, float(cast(dict[str, Any], checkpoints.best)["score"]))


def _save(place: Path, cli: ConfigCLI, figures: dict[str, float | None]) -> None:
    task, data = cli.model, cli.datamodule
    preprocessing = getattr(data, "preprocessing", task.preprocessing)
    names = task.output_names(data)
    output = {**task.output(), **getattr(data, "output_notes", dict)()}
    task.bank.annotate(class_names=names, preprocessing=preprocessing.to_dict(), metrics=figures, output=output)
    task.save_adapter(place / runs.ADAPTER)


def _figures(
    place: Path, cli: ConfigCLI, trainer: Trainer, measured: Measured, best: int, began: float
) -> dict[str, Any]:
    checkpoints, started = cast(RunCheckpoints, trainer.checkpoint_callback), cli.model.head_start
    files = [place / runs.ADAPTER / name for name in sorted((ADAPTER_FILE, HEAD_FILE, JSON_FILE))]
    return {
        **measured.metrics,
        **measured.details,
        **({"head_start": started.record} if started is not None and started.record else {}),
        "best_epoch": best + 1,
        "epochs": checkpoints.epochs,
        "steps": checkpoints.steps,
        "seed": cli.config["seed_everything"],
        "parameters": cli.model.report().to_dict(),
        "adapter_bytes": {path.name: path.stat().st_size for path in files if path.is_file()},
        "seconds": {"training": checkpoints.seconds, **measured.seconds, "total": time.perf_counter() - began},
        "device": str(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "versions": versions(),
    }


def _draw(place: Path, cli: ConfigCLI, measured: Measured, best: int) -> bool:
    """Draw the pictures of a run, and tell whether all of them could be drawn."""
    task, plots, log = cli.model, place / runs.PLOTS, place / runs.LOGS / "csv" / "metrics.csv"
    names, shown = task.output_names(cli.datamodule), task.curves
    drawn = [
        _drawn("learning curves", place, partial(learning_curves, log, plots / "learning_curves.png", best, shown)),
        _drawn("pictures of the results", place, partial(measured.draw, task, names, plots)),
    ]
    return all(drawn)


def _drawn(what: str, place: Path, draw: Callable[[], Any]) -> bool:
    try:
        draw()
    except Exception as error:  # whatever a picture raises, the run is finished without it
        if disk_is_full(error):
            raise
        logger.warning(
            "The %s could not be drawn (%s: %s) Adapter and figures are complete; --resume %s tries the pictures "
            "again.",
            what,
            type(error).__name__,
            brief(error),
            place,
        )
        return False
    return True


def _show(cli: ConfigCLI, metrics: dict[str, Any], score: float) -> None:
    measured = metrics["validation"].get(cli.model.monitor.partition("/")[2]) is not None
    chosen = "Best" if measured and getattr(cli.datamodule, "validation_chooses", True) else "Last"
    console.print(f"{chosen} of {counted(metrics['epochs'], 'epoch')}: epoch {metrics['best_epoch']}")
    if metrics["best_epoch"] == 0:
        console.print(
            "No epoch was better on validation than the probe that the head started from. It is kept, with the adapter "
            "at its start. Try another learning rate (model.lr), or more epochs.",
            soft_wrap=True,
        )
    started = cli.model.head_start
    if started is not None and started.frozen_is_better(score, cli.model.monitor_mode):
        figure = f"{cli.model.monitor.partition('/')[2]} {started.record['frozen']['figure']:.4f}"
        console.print(
            f"The probe of the frozen features alone is better on validation ({figure}): "
            f"{cli.model.bank.plan().method.name} acts from its start on. The same command with --method linear_probe "
            "keeps that probe.",
            soft_wrap=True,
        )
    rows = {row_name(cli.datamodule, split): metrics[split] for split in ("validation", "test")}
    console.print(metrics_table(cli.model.shown(rows)))
    if (by_class := class_table(metrics)) is not None:
        console.print(by_class)
