"""Outputs of a task's frozen backbone, computed once for all epochs and runs."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from vispeft.core.families import unwrap
from vispeft.core.modes import evaluating
from vispeft.data.augmentation import Augmentation
from vispeft.data.base import BatchSplit, ImageData
from vispeft.data.cache import CachedSplit, OutputFiles, OutputStore, changes_between_epochs, split_digest
from vispeft.data.images import PLAIN
from vispeft.data.listing import PER_PIXEL
from vispeft.errors import ConfigError, DataError
from vispeft.storage.fingerprint import fingerprint
from vispeft.storage.places import cache_folder
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.state import random_state, set_random_state

__all__ = ["cache_features"]

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the layout and of the computation; part of every key."""


def cache_features(task: AdapterTask, data: Any, trainer: Trainer, folder: str | Path | None = None) -> None:
    """Replace a data module's images by outputs of the frozen backbone, computed once.

    Outputs on disk from an earlier run with the same backbone, images and settings are used again. Order, batches and
    targets stay those of the data module.

    Args:
        task: The task, before training.
        data: Its data, set up; its splits are replaced.
        trainer: Computes the outputs, on its device and in its precision.
        folder: Folder of the outputs; None for ``features`` in vispeft's cache folder.

    Raises:
        ConfigError: If the backbone's outputs would differ between epochs, or several processes train.
        DataError: If the data module is not one of `ImageData`.
        FileError: If the outputs cannot be written.
    """
    _check(task, data, trainer)
    store = OutputStore(Path(folder) if folder is not None else cache_folder() / "features")
    shared = _shared_key(task, data, trainer)
    splits: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        split: Any = data.split(name)
        key = {**shared, "data": split_digest(split)}
        said = (len(split), name, store.home(key))
        outputs = store.read(key)
        if outputs is None:
            logger.info("Computing the backbone's outputs for the %d %s images; they are kept in %s", *said)
            fill = partial(_compute, task=task, data=data, trainer=trainer, split=split)
            outputs = store.write(key, len(split), fill)
        else:
            logger.info("The backbone's outputs for the %d %s images are taken from %s", *said)
        splits[name] = CachedSplit(outputs, split.targets)
    data.replace_splits(splits)


def _check(task: AdapterTask, data: Any, trainer: Trainer) -> None:
    """Refuse tasks and data whose outputs differ from epoch to epoch."""
    method = task.bank.plan().method
    if not method.cacheable:
        raise ConfigError(
            f"cache_features was asked for, and {method.name} acts inside the backbone, whose outputs change with "
            "every step. Leave cache_features out, or take a method such as linear_probe."
        )
    model = unwrap(task.model)
    drops = [path for path in task.bank.view.head_drop_paths if getattr(model.get_submodule(path), "p", 0) > 0]
    if drops:
        raise ConfigError(
            f"cache_features was asked for, and {drops[0]} drops other values of the backbone's output in each step. "
            "Leave cache_features out, or give the backbone drop_rate 0."
        )
    if not isinstance(data, ImageData):
        raise DataError(
            f"cache_features was asked for, and {type(data).__name__} is no ImageData, so its images cannot be told "
            "apart. Leave cache_features out."
        )
    if data.target in PER_PIXEL:
        raise ConfigError(
            "cache_features was asked for, and training images with masks are cropped anew in every epoch, so the "
            "backbone's outputs change. Leave cache_features out."
        )
    if any(getattr(data.split(name), "roles", torch.zeros(0)).any() for name in ("validation", "test")):
        raise ConfigError(
            "cache_features was asked for, and the images of the test are queries or gallery, which kept features do "
            "not tell apart. Leave cache_features out."
        )
    if trainer.world_size > 1:
        raise ConfigError(
            f"cache_features was asked for with {trainer.world_size} processes. Set trainer.devices to 1: the "
            "parameters left to train are few."
        )
    augment = getattr(data, "augment", None)
    if (augment and augment != Augmentation()) or changes_between_epochs(data.split("train")):
        raise ConfigError(
            "cache_features was asked for, and the training images are augmented: they are others in every epoch, so "
            "the backbone would have to see each of them. Leave cache_features out, or switch data.augment off."
        )


def _shared_key(task: AdapterTask, data: ImageData, trainer: Trainer) -> dict[str, Any]:
    """Collect everything except the images that affects the outputs."""
    method = task.bank.plan().method
    model = unwrap(task.model)
    merging = task.bank.token_merging
    reading = {name: value for name, value in getattr(data, "reading", PLAIN).notes().items() if name != "max_pixels"}
    return {
        "schema": SCHEMA,
        "outputs": f"{_owner(type(method), 'frozen_outputs')}({json.dumps(method.frozen_fields(), sort_keys=True)})",
        "backbone": fingerprint(model, task.bank.view),
        "made": {"name": task.backbone, "args": {name: str(value) for name, value in task.backbone_args.items()}},
        "preprocessing": data.preprocessing.to_dict(),
        # The last bits of an output depend on these.
        "batch_size": data.batch_size,
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        **({"token_merging": asdict(merging)} if merging else {}),
        **({"reading": reading} if reading else {}),
        "versions": {name: version(name) for name in ("torch", "timm", "torchvision")},
    }


def _owner(cls: type, name: str) -> str:
    owner = next(part for part in cls.__mro__ if name in vars(part))
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


class _Backbone(LightningModule):
    """Runs the frozen part of a task."""

    def __init__(self, task: AdapterTask) -> None:
        super().__init__()
        self.task = task

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        method = self.task.bank.plan().method
        return method.frozen_outputs(self.task.model, batch[0].to(self.task.base_dtype))


class _Writer(BasePredictionWriter):
    """Pass the outputs of each batch to the files of a store."""

    def __init__(self, files: OutputFiles) -> None:
        super().__init__(write_interval="batch")
        self.files = files

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
        self.files.append(prediction)


def _compute(files: OutputFiles, task: AdapterTask, data: ImageData, trainer: Trainer, split: Any) -> None:
    """Run the frozen backbone over a split, and append its outputs."""
    loader = DataLoader(
        split,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=_keep if isinstance(split, BatchSplit) else None,
    )
    random = random_state()
    before: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.callbacks = [*before, _Writer(files)]  # type: ignore[attr-defined]
    try:
        with evaluating(task):
            trainer.predict(_Backbone(task), loader, return_predictions=False)
    finally:
        trainer.callbacks = before  # type: ignore[attr-defined]
        set_random_state(random)  # a run draws the same numbers whether its outputs were on the disk or not


def _keep(batch: Any) -> Any:
    return batch
