"""Measuring a task on a split, the same way after training and later from files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from rich.table import Table
from torch import Tensor

from vispeft.tasks.base import AdapterTask

__all__ = ["confusion", "evaluate", "evaluation_trainer", "metrics_table", "per_class"]

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
    "plugins",
)
"""Settings of a trainer that decide what an evaluation computes."""


def evaluation_trainer(**settings: Any) -> Trainer:
    """Make a trainer that only evaluates: the same numbers, no files.

    Args:
        settings: Settings of the training's trainer.
    """
    return Trainer(
        **{key: value for key, value in settings.items() if key in _KEPT},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def evaluate(trainer: Trainer, task: AdapterTask, data: LightningDataModule, split: str) -> dict[str, float]:
    """Measure a task on a split.

    Args:
        trainer: As `evaluation_trainer` makes it.
        task: The task.
        data: The data.
        split: validation or test.

    Returns:
        Metrics by name, without the split's.
    """
    measure = trainer.validate if split == "validation" else trainer.test
    torch.manual_seed(0)  # nothing here draws random numbers; if a user's task does, it draws the same ones each time
    results = measure(task, datamodule=data, verbose=False)[0]
    return {name.removeprefix(f"{split}/"): value for name, value in results.items()}


def per_class(task: AdapterTask, names: tuple[str, ...]) -> dict[str, float]:
    """Give the accuracy of each class in the last test.

    Args:
        task: The task.
        names: Names of the classes.
    """
    metric = getattr(task, "test_class_accuracy", None)
    return {} if metric is None else dict(zip(names, metric.compute().tolist(), strict=True))


def confusion(task: AdapterTask) -> Tensor | None:
    """Give the counts (true class, predicted class) of the last test."""
    metric = getattr(task, "test_confusion", None)
    return None if metric is None else metric.compute()


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show metrics as a table.

    Args:
        rows: Metrics by what they were measured on.
    """
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    table = Table()
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for label, metrics in rows.items():
        table.add_row(label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names))
    return table
