"""State that training changes and Lightning's checkpoints leave out: random numbers, metrics, means in mid-epoch.

Everything is taken at the start of a step and put back there, after Lightning has restored its own part of a
training. Lightning has no public way to the means that `self.log` builds, so this file looks into its result
collection; ``tests/tasks/test_resume.py`` fails when a later release builds it another way.
"""

from __future__ import annotations

import random
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["between_steps", "put_back", "training_state"]

_OPTIONS = (
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)
"""Options of `self.log`, kept for each value."""
_FIGURES = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_ACCUMULATORS = ("value", "cumulated_batch_size")


def training_state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Collect the state at the start of a step.

    Args:
        trainer: The trainer.
        module: The task.

    Returns:
        Tensors and plain values, which `put_back` takes.
    """
    connector = trainer._logger_connector
    return {
        "random": random_state(),
        "metrics": _metrics(module),
        "logged": [_entry(result) for result in trainer.fit_loop.epoch_loop._results.values()],
        "figures": {name: dict(getattr(connector, name)) for name in _FIGURES},
        "first": connector._first_loop_iter,
        "hook": connector._current_fx,
    }


def put_back(state: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Restore a collected state.

    Args:
        state: A result of `training_state`.
        trainer: The trainer, at the start of the same step.
        module: The task.
    """
    _restore_metrics(state["metrics"], module)
    _restore_logged(state["logged"], trainer, module)
    connector = trainer._logger_connector
    for name, values in state["figures"].items():
        setattr(connector, name, dict(values))
    connector._first_loop_iter, connector._current_fx = state["first"], state["hook"]
    set_random_state(state["random"])


def between_steps(loop: dict[str, Any]) -> int:
    """Change Lightning's counters at the start of a step into those of a training stopped between two steps.

    Args:
        loop: State of the fit loop; changed in place.

    Returns:
        Steps already done in the current epoch.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    done = batches["current"]["completed"]
    for counter in (batches["total"], batches["current"]):
        counter["ready"] = counter["started"] = counter["completed"]
    batches["is_last_batch"] = False
    if done == 0:
        # Stopped between two epochs: the epoch that has just started must count as not started.
        for counter in (epochs["total"], epochs["current"]):
            counter["ready"] = counter["started"] = counter["completed"]
    return int(done)


# ------------------------------------------------------------------ random numbers


def random_state() -> dict[str, Any]:
    """Take the states of all global generators, as tensors and plain values."""
    return packed(generator_states())


def generator_states() -> dict[str, Any]:
    """Take the states of all global generators as they come, for `packed`: quick enough for every step."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - users may draw from it, and that must go on as well
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def packed(states: dict[str, Any]) -> dict[str, Any]:
    """Turn states of generators into tensors and plain values, which files hold.

    Args:
        states: A result of `generator_states`.
    """
    version, words, spare = states["python"]
    name, keys, *rest = states["numpy"]
    numpy = (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
    return {**states, "python": (version, torch.tensor(words), spare), "numpy": numpy}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states of all global generators.

    Args:
        state: A result of `random_state`.
    """
    version, words, spare = state["python"]
    random.setstate((version, tuple(words.tolist()), spare))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------ metrics


def _metrics(module: LightningModule) -> dict[str, Any]:
    for collection in module.modules():
        if isinstance(collection, MetricCollection):
            list(collection.values())  # metrics that share their counts are brought up to date
    return {
        name: {"states": dict(metric.metric_state), "updates": metric._update_count}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def _restore_metrics(saved: dict[str, Any], module: LightningModule) -> None:
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name, entry in saved.items():
        if name not in metrics:  # of an earlier version, which measured it
            continue
        metric = metrics[name]
        for state, value in entry["states"].items():
            setattr(metric, state, _moved(value, metric.device))
        metric._update_count, metric._computed = entry["updates"], None


def _moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]


# ------------------------------------------------------------------ logged values


def _entry(result: Any) -> dict[str, Any]:
    """Describe a value logged in this epoch: its options, and the parts of its mean so far."""
    meta = result.meta
    return {
        "fx": meta.fx,
        "name": meta.name,
        "options": {name: getattr(meta, name) for name in _OPTIONS},
        "reduce": meta.reduce_fx.__name__,
        "sync": (meta.sync.should, meta.sync.rank_zero_only),
        "parts": {n: getattr(result, n) for n in _ACCUMULATORS if hasattr(result, n)} if result.is_tensor else None,
        "last": result._forward_cache if isinstance(result._forward_cache, Tensor) else None,
        "updates": result._update_count,
        "reset": result.has_reset,
    }


def _restore_logged(entries: list[dict[str, Any]], trainer: Trainer, module: LightningModule) -> None:
    results = trainer.fit_loop.epoch_loop._results
    results.clear()
    device = module.device
    for entry in entries:
        parts, options = entry["parts"], entry["options"]
        value = torch.zeros((), device=device) if parts is not None else attrgetter(options["metric_attribute"])(module)
        should, first_only = entry["sync"]
        results.log(
            entry["fx"],
            entry["name"],
            value,
            **options,
            reduce_fx=getattr(torch, entry["reduce"]),
            sync_dist=should,
            sync_dist_fn=trainer.strategy.reduce,
            rank_zero_only=first_only,
            batch_size=1,
        )
        result = results[f"{entry['fx']}.{entry['name']}"]
        for name, part in (parts or {}).items():
            setattr(result, name, part.to(device))
        result._forward_cache = None if entry["last"] is None else entry["last"].to(device)
        result._update_count, result.has_reset, result._computed = entry["updates"], entry["reset"], None
