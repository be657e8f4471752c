"""Outputs of a frozen backbone, computed once and kept on disk.

A folder per split holds one ``.npy`` file per output, which is mapped into memory and not read whole, and ``meta.json``
with what they were computed from and a sha256 of each file. The folder's name is a digest of what decides the outputs,
so that other weights, images or settings never find it; it gets that name when everything in it is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from vispeft.core.families import unwrap
from vispeft.data.augmentation import Augmentation
from vispeft.data.base import BatchSplit, ImageData, Index
from vispeft.data.facts import cache_folder
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from vispeft.tasks.base import AdapterTask

__all__ = ["CachedSplit", "cache_features"]

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the layout; part of the digest."""
META = "meta.json"
PROBED = 64
"""Training images that are prepared for two epochs to see whether they change."""


class CachedSplit(BatchSplit):
    """A split that serves what a frozen backbone made of its images."""

    def __init__(self, outputs: Mapping[str, Tensor], targets: Tensor) -> None:
        """Keep the tensors.

        Args:
            outputs: Outputs of the backbone by name, one row per image.
            targets: Targets, one row per image.
        """
        self.outputs, self.targets = dict(outputs), targets

    def batch(self, indices: list[Index]) -> tuple[Any, Tensor]:
        """Make a batch."""
        order = torch.tensor([index for _, index in indices])
        return {name: tensor[order] for name, tensor in self.outputs.items()}, self.targets[order]


def cache_features(task: AdapterTask, data: Any, trainer: Trainer, folder: str | Path | None = None) -> None:
    """Let a data module serve what the frozen backbone makes of its images, computed once.

    What is on disk from an earlier run with the same backbone, images and settings is used again. Order, batches and
    targets stay those of the data module.

    Args:
        task: The task, on which nothing is trained yet.
        data: Its data, set up; its splits are replaced.
        trainer: Computes the outputs, on its device and in its precision.
        folder: Where outputs are kept; None for ``features`` in vispeft's cache folder.

    Raises:
        ConfigError: If the outputs of the backbone would not be the same in every epoch, or several processes train.
        DataError: If the data module is not one of `ImageData`.
        FileError: If the outputs cannot be written.
    """
    _check(task, data, trainer)
    place = Path(folder) if folder is not None else cache_folder() / "features"
    shared = _shared_key(task, data, trainer)
    splits: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        split = data.split(name)
        key = json.loads(json.dumps({**shared, "data": _content(split)}))
        home = place / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        outputs = _read(home, key)
        if outputs is None:
            logger.info("Computing what the backbone makes of the %d %s images; kept in %s", len(split), name, home)
            _write(home, key, task, data, trainer, split)
            outputs = _read(home, key)
            if outputs is None:
                raise FileError(f"{home} was damaged while it was written. Look at the disk, and try again.")
        else:
            logger.info("What the backbone makes of the %d %s images is taken from %s", len(split), name, home)
        splits[name] = CachedSplit(outputs, split.targets)
    data.replace_splits(splits)


# ------------------------------------------------------------------ what can be kept


def _check(task: AdapterTask, data: Any, trainer: Trainer) -> None:
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
    if data.target == "mask":
        raise ConfigError(
            "cache_features was asked for, and training images with masks are cropped anew in every epoch, so what the "
            "backbone makes of them changes. Leave cache_features out."
        )
    if trainer.world_size > 1:
        raise ConfigError(
            f"cache_features was asked for with {trainer.world_size} processes. Set trainer.devices to 1: what is left "
            "to train is small."
        )
    augment = getattr(data, "augment", None)
    if (augment and augment != Augmentation()) or _changes(data.split("train")):
        raise ConfigError(
            "cache_features was asked for, and the training images are augmented: they are others in every epoch, so "
            "the backbone would have to see each of them. Leave cache_features out, or switch data.augment off."
        )


def _changes(split: Any) -> bool:
    """Look whether images or targets change from epoch to epoch."""
    if not isinstance(split, BatchSplit):
        return False
    indices = range(min(PROBED, len(split)))
    first, second = ([*split.batch([(epoch, index) for index in indices])] for epoch in (0, 1))
    return not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ------------------------------------------------------------------ what decides the outputs


def _shared_key(task: AdapterTask, data: ImageData, trainer: Trainer) -> dict[str, Any]:
    method = task.bank.plan().method
    model = unwrap(task.model)
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
        "versions": {name: version(name) for name in ("torch", "timm", "torchvision")},
    }


def _owner(cls: type, name: str) -> str:
    owner = next(part for part in cls.__mro__ if name in vars(part))
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def _content(split: Any) -> str:
    """Hash images and targets of a split."""
    digest = hashlib.sha256()
    source, images = getattr(split, "source", None), getattr(split, "images", None)
    if source is not None:
        for facts in source.facts(full=True):
            digest.update(facts.digest.encode())
    elif images is not None:
        _update(digest, images)
    else:  # as they are prepared; slower, but true for any split
        for batch, _ in DataLoader(split, batch_size=256):
            _update(digest, batch)
    _update(digest, split.targets)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)


# ------------------------------------------------------------------ computing and keeping


class _Backbone(LightningModule):
    """Runs the frozen part of a task."""

    def __init__(self, task: AdapterTask) -> None:
        super().__init__()
        self.task = task

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        method = self.task.bank.plan().method
        return method.frozen_outputs(self.task.model, batch[0].to(self.task.base_dtype))


class _Writer(BasePredictionWriter):
    """Writes outputs batch by batch into files that are mapped into memory."""

    def __init__(self, folder: Path, rows: int) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.rows, self.done = folder, rows, 0
        self.maps: dict[str, np.memmap[Any, Any]] = {}
        self.dtypes: dict[str, str] = {}

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        for name, tensor in prediction.items():
            values = _as_numpy(tensor.detach().cpu())
            if name not in self.maps:
                shape = (self.rows, *values.shape[1:])
                file = self.folder / f"{name}.npy"
                self.maps[name] = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=shape)
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            self.maps[name][self.done : self.done + len(values)] = values
        self.done += len(batch[1])

    def close(self) -> dict[str, str]:
        """Bring everything onto the disk, and give the types by name."""
        for array in self.maps.values():
            array.flush()
        self.maps = {}
        return self.dtypes


def _as_numpy(tensor: Tensor) -> Any:
    """Give the same bytes; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _write(
    home: Path, key: Mapping[str, Any], task: AdapterTask, data: ImageData, trainer: Trainer, split: Any
) -> None:
    """Compute the outputs of a split into a folder that gets its name at the end."""
    part: Path | None = None
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=home.parent))
        dtypes = _compute(part, task, data, trainer, split)
        files = {f"{name}.npy": _sha256(part / f"{name}.npy") for name in dtypes}
        text = json.dumps({"key": key, "dtypes": dtypes, "files": files}, indent=1)
        with open(part / META, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if home.exists():  # damaged, or made by another process in the meantime, which computes the same
            shutil.rmtree(home, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            os.rename(part, home)
    except OSError as error:
        raise FileError(
            f"What the backbone makes of the images could not be kept in {home.parent} ({error.strerror or error}). "
            "Free some space, give cache_features another folder, or leave it out."
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _compute(part: Path, task: AdapterTask, data: ImageData, trainer: Trainer, split: Any) -> dict[str, str]:
    writer = _Writer(part, len(split))
    loader = DataLoader(
        split,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=_keep if isinstance(split, BatchSplit) else None,
    )
    training = task.training
    before: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    trainer.callbacks = [*before, writer]  # type: ignore[attr-defined]
    try:
        trainer.predict(_Backbone(task), loader, return_predictions=False)
    finally:
        trainer.callbacks = before  # type: ignore[attr-defined]
        task.train(training)
    return writer.close()


def _keep(batch: Any) -> Any:
    return batch


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(home: Path, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Map a folder of outputs into memory; None where there is none, or it is damaged."""
    if not home.is_dir():
        return None
    try:
        meta = json.loads((home / META).read_text(encoding="utf-8"))
        wrong = [name for name, sha in meta["files"].items() if _sha256(home / name) != sha]
        if meta["key"] != key:
            wrong.append(META)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The kept outputs in %s are damaged (%s); they are computed again.", home, error)
        return None
    if wrong:
        logger.warning("The kept outputs in %s are damaged (%s was altered); they are computed again.", home, wrong[0])
        return None
    return {name: _mapped(home / f"{name}.npy", dtype) for name, dtype in meta["dtypes"].items()}


def _mapped(path: Path, dtype: str) -> Tensor:
    # Copy on write: torch wants memory it may write to, and the file stays as it is.
    values = torch.from_numpy(np.load(path, mmap_mode="c"))
    return values.view(torch.bfloat16) if dtype == "bfloat16" else values
