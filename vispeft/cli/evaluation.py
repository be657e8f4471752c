"""Measuring a task on a split, in the same way after training and later from files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.table import Table
from torch import Tensor

from vispeft.cli.processes import STRATEGIES
from vispeft.data.listed import ListedData
from vispeft.errors import ConfigError, counted
from vispeft.tasks.base import AdapterTask

__all__ = [
    "Measured",
    "Outputs",
    "accelerator_here",
    "class_table",
    "evaluate",
    "evaluation_trainer",
    "figure",
    "kept_settings",
    "measure",
    "metrics_table",
    "row_name",
    "tell_if_partial",
]

logger = logging.getLogger(__name__)

_KEPT = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "limit_val_batches",
    "limit_test_batches",
    "inference_mode",
    "deterministic",
)
"""Trainer settings that affect the results of an evaluation."""


def kept_settings(settings: Any) -> dict[str, Any]:
    """Choose the trainer's settings that affect an evaluation: the callbacks and loggers of a run are not made again.

    Args:
        settings: The section ``trainer`` of the run's config.

    Raises:
        ConfigError: If it is no section.
    """
    if not isinstance(settings, Mapping | None):
        raise ConfigError(f"trainer is {settings!r}; keys with values are needed there.")
    return {key: value for key, value in (settings or {}).items() if key in _KEPT}


def evaluation_trainer(**settings: Any) -> Trainer:
    """Create a trainer that only evaluates, on one device in this process alone, with the same results and no files.

    Args:
        settings: Settings of the training trainer, which may have had an accelerator and devices that are not here.
    """
    kept = kept_settings(settings)
    if kept.get("strategy") in STRATEGIES:
        del kept["strategy"]
    one = {**kept, "accelerator": accelerator_here(kept.get("accelerator")), "devices": 1, "num_nodes": 1}
    if one["accelerator"] != kept.get("accelerator", "auto"):
        return _quiet_trainer(one)
    try:
        trainer = _quiet_trainer(kept)
    except MisconfigurationException:
        return _quiet_trainer(one)  # there are fewer devices here; whatever else is wrong is said again
    if trainer.world_size == 1:
        return trainer
    # Of several processes each takes the device that it trains on.
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return _quiet_trainer({**kept, "devices": 1 if on_cpu else [trainer.strategy.root_device.index], "num_nodes": 1})


def accelerator_here(name: str | None) -> str:
    """Return the accelerator of a training if it is on this machine; otherwise log so, and let Lightning choose.

    Args:
        name: Lightning's name of it; None for the default.
    """
    classes = {key: entry["accelerator"] for key, entry in AcceleratorRegistry.items()}
    classes["gpu"] = classes["mps"] if classes["mps"].is_available() else classes["cuda"]
    if name in classes and not classes[name].is_available():
        logger.warning("trainer.accelerator is %s, of which this machine has none: it takes what it has (auto).", name)
        return "auto"
    return name or "auto"


def _quiet_trainer(settings: Mapping[str, Any]) -> Trainer:
    return Trainer(
        **settings,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Outputs(Callback):
    """Collect, for all images, the results of evaluation steps that the task names in `kept_outputs`."""

    def __init__(self, names: Sequence[str]) -> None:
        """Start with an empty collection.

        Args:
            names: Names of the results.
        """
        self._parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Collect a batch."""
        for name, parts in self._parts.items():
            parts.append(outputs[name].cpu())

    on_test_batch_end = on_validation_batch_end

    def joined(self) -> dict[str, Tensor]:
        """Concatenate the collected results of all images."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


def evaluate(
    trainer: Trainer, task: AdapterTask, data: LightningDataModule, split: str, outputs: Outputs | None = None
) -> dict[str, float | None]:
    """Measure a task on a split.

    Args:
        trainer: A trainer from `evaluation_trainer`.
        task: The task.
        data: The data.
        split: validation or test.
        outputs: Collector of the results of all images; None to collect nothing.

    Returns:
        Metrics by name, without the split's; None for one that was not measured.
    """
    measure = trainer.validate if split == "validation" else trainer.test
    torch.manual_seed(0)  # in case a user's task draws random numbers: the same ones each time
    before = list(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.callbacks = [*before, *([] if outputs is None else [outputs])]  # type: ignore[attr-defined]
    try:
        results = measure(task, datamodule=data, verbose=False)[0]
    finally:
        trainer.callbacks = before  # type: ignore[attr-defined]
    measured = task.outputs_seen.broken < task.outputs_seen.images or not task.outputs_seen.images
    return {
        name.removeprefix(f"{split}/"): value if measured and math.isfinite(value) else None
        for name, value in results.items()
    }


def row_name(data: Any, split: str) -> str:
    """Name a split in a table of figures; one that shows the images of another split is named by them.

    Args:
        data: The data module.
        split: validation or test.
    """
    other = data.listing.repeated_by(split) if isinstance(data, ListedData) else None
    return split if other is None else f"{split} ({other} images)"


def tell_if_partial(trainer: Any, split: str) -> None:
    """Log that a split was measured on some of its images only.

    Args:
        trainer: The trainer that measured it.
        split: validation or test.
    """
    short = "val" if split == "validation" else "test"
    limit = f"limit_{short}_batches"
    counts, loaders = getattr(trainer, f"num_{short}_batches"), getattr(trainer, f"{short}_dataloaders")
    seen = sum(counts) if isinstance(counts, list) else counts
    if isinstance(loaders, Sized) and seen < len(loaders):
        logger.warning(
            "The %s figures are partial: %s of %s measured, since trainer.%s is %s.",
            split,
            f"{seen:,}",
            counted(len(loaders), "batch was", "batches were"),
            limit,
            getattr(trainer, limit),
        )


@dataclass(frozen=True)
class Measured:
    """Results of a finished task."""

    metrics: dict[str, dict[str, float | None]]
    """Metrics of validation and test, by split."""
    details: dict[str, Any]
    """Further entries of ``metrics.json``: results per output, calibration."""
    seconds: dict[str, float]
    """Duration per split, in seconds."""
    _outputs: dict[str, Tensor]
    """Collected results of the test split."""

    def draw(self, task: AdapterTask, names: tuple[str, ...], folder: Path) -> None:
        """Draw the plots of the test split.

        Args:
            task: The task that was measured.
            names: Names of the outputs.
            folder: Folder for the plots.
        """
        task.draw_results(self._outputs, names, folder)


def measure(trainer: Trainer, task: AdapterTask, data: LightningDataModule) -> Measured:
    """Measure a trained task: first validation, on which it may calibrate itself, then test, once.

    Args:
        trainer: A trainer from `evaluation_trainer`.
        task: The task.
        data: The data.

    Returns:
        The results for ``metrics.json``.
    """
    metrics: dict[str, dict[str, float | None]] = {}
    seconds: dict[str, float] = {}
    details: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    names = task.output_names(data)
    for split in ("validation", "test"):
        start = time.perf_counter()
        outputs = Outputs(task.kept_outputs)
        metrics[split] = evaluate(trainer, task, data, split, outputs)
        tell_if_partial(trainer, split)
        seconds[split] = time.perf_counter() - start
        kept = outputs.joined()
        # If validation selects nothing, the model was trained on its images.
        if split == "test" or getattr(data, "validation_chooses", True):
            details |= task.details(split, kept, names)
    return Measured(metrics, details, seconds, kept)


def metrics_table(rows: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Format metrics as a table; a figure that was not measured, None, stays empty.

    The figures are columns, or rows where the columns would not fit into `NARROW` characters and the rows would.

    Args:
        rows: Metrics by row name.
        title: A line above the table.
    """
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    shown = {label: {_spaced(name): figure(metrics.get(name)) for name in names} for label, metrics in rows.items()}
    turned = {_spaced(name): {label: shown[label][_spaced(name)] for label in rows} for name in names}
    if _width(shown) > NARROW >= _width(turned):
        shown = turned
    table = Table(title=title)
    table.add_column("", overflow="fold", max_width=LONGEST_NAME)
    for column in next(iter(shown.values()), {}):
        table.add_column(column, justify="right")
    for label, cells in shown.items():
        table.add_row(label, *cells.values())
    return table


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _width(rows: Mapping[str, Mapping[str, str]]) -> int:
    """Count the characters of a table's lines; each column has three around it, and one is at the end."""
    columns = {name: [name] for name in next(iter(rows.values()), {})}
    for cells in rows.values():
        for name, cell in cells.items():
            columns[name].append(cell)
    first = min(LONGEST_NAME, max(map(len, rows), default=0))
    return first + sum(max(map(len, column)) for column in columns.values()) + 3 * (len(columns) + 1) + 1


def figure(value: float | None) -> str:
    """Format a figure for a table; one that was not measured is empty.

    Args:
        value: The figure; None where not measured.
    """
    return "" if value is None else f"{value:.4f}"


def class_table(metrics: Mapping[str, Any]) -> Table | None:
    """Format metrics per class as a table.

    Args:
        metrics: Content of ``metrics.json``; entries ``test_*_per_class`` are shown.

    Returns:
        A table with one row per class; None if there are no such metrics, or too many classes.
    """
    columns = {
        name.removeprefix("test_").removesuffix("_per_class"): values
        for name, values in metrics.items()
        if name.startswith("test_") and name.endswith("_per_class")
    }
    names = list(next(iter(columns.values()), {}))
    if not 0 < len(names) <= MOST_CLASSES:
        return None
    return metrics_table({name: {figure: values.get(name) for figure, values in columns.items()} for name in names})


NARROW = 80
"""Characters of a line in a terminal of ordinary width."""
LONGEST_NAME = 40
"""Width of a printed table's first column, in letters; longer names take several lines."""
MOST_CLASSES = 200
"""Largest number of rows of a printed table of classes."""
