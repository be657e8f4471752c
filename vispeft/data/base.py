"""Base of all image data modules: the backbone's preprocessing, a reproducible order, data loaders."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from vispeft.core.arguments import ChecksArguments
from vispeft.data.listing import Target
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.randomness import draw_seed, seeded
from vispeft.data.shares import EvaluationShare, TrainingShare
from vispeft.errors import ConfigError, DataError, counted

__all__ = ["BatchSplit", "EpochSampler", "ImageData", "MemorySplit", "has_plain"]

Index = tuple[int, int]
"""Epoch and position of an image in its split."""


class EpochSampler(Sampler[Index]):
    """Yield (epoch, index) pairs, in an order that depends only on seed and epoch.

    The epoch is part of the index, so a worker that prefetches still draws the augmentation of the right epoch.
    """

    def __init__(self, length: int, seed: int, start: tuple[int, int] = (0, 0)) -> None:
        """Store the settings of the order.

        Args:
            length: Number of images.
            seed: Seed of the order.
            start: The first epoch, and the number of its images to skip, as they were already served.
        """
        self.length, self.seed, self.start = length, seed, start
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one.

        Args:
            epoch: Counted from zero.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[Index]:
        """Iterate over one epoch, or over the rest of the first one."""
        done = self.start[1] if self.epoch == self.start[0] else 0
        yield from self.order(self.epoch)[done:]

    def order(self, epoch: int) -> list[Index]:
        """Return the indices of a whole epoch, in their order.

        Args:
            epoch: Counted from zero.
        """
        generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch))
        return [(epoch, index) for index in torch.randperm(self.length, generator=generator).tolist()]

    def __len__(self) -> int:
        """Count the images."""
        return self.length


class BatchSplit(Dataset[tuple[Tensor, Tensor]], ABC):
    """A split that builds a whole batch at once, so random changes of a batch depend only on its indices."""

    targets: Tensor
    """Targets of all images, one row each."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: Index | int) -> tuple[Tensor, Tensor]:
        """Return one normalised image (3, H, W) and its target."""
        batch = self.__getitems__([index])
        return batch[0][0], batch[1][0]

    def __getitems__(self, indices: Sequence[Index | int]) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, 3, H, W) and their targets; the data loader calls this."""
        return self.batch([index if isinstance(index, tuple) else (0, index) for index in indices])

    def plain(self) -> BatchSplit:
        """Return the same images in the same order, prepared as for an evaluation: without random changes.

        A split whose batches depend on the epoch overrides this.
        """
        return self

    @abstractmethod
    def batch(self, indices: list[Index]) -> tuple[Tensor, Tensor]:
        """Build a batch.

        Args:
            indices: Epoch and position of each image.
        """


class MemorySplit(BatchSplit):
    """A split of resized images in memory, from which a whole batch is built at once."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        augment: v2.Transform | None = None,
        seed: int = 0,
    ) -> None:
        """Store the tensors.

        Args:
            images: uint8 (N, 1 or 3, H, W), of the size of `preprocessing`; grey ones are repeated to three channels on
                access.
            labels: Class indices (N,).
            preprocessing: Source of mean and standard deviation.
            augment: Applied to each uint8 image (3, H, W), with separate random numbers.
            seed: Seed of the augmentation.
        """
        self.images, self.targets, self.augment, self.seed = images, labels, augment, seed
        self._normalise = preprocessing.normalise()

    def batch(self, indices: list[Index]) -> tuple[Tensor, Tensor]:
        """Build a batch."""
        order = torch.tensor([index for _, index in indices])
        images = self.images[order].expand(-1, 3, -1, -1)
        if self.augment is not None:
            images = torch.stack([self._augmented(image, *pair) for image, pair in zip(images, indices, strict=True)])
        return self._normalise(images), self.targets[order]

    def plain(self) -> MemorySplit:
        """Return the same images without augmentation."""
        found = copy.copy(self)
        found.augment = None
        return found

    def _augmented(self, image: Tensor, epoch: int, index: int) -> Tensor:
        assert self.augment is not None
        with seeded(self.seed, epoch, index):
            return self.augment(image)


def has_plain(split: Any) -> bool:
    """Return whether a split says how its images are without random changes.

    Args:
        split: The split.
    """
    return isinstance(split, BatchSplit) and type(split).plain is not BatchSplit.plain


class ImageData(ChecksArguments, LightningDataModule, ABC):
    """Base of all data modules.

    Size, mean, standard deviation and interpolation come from the backbone unless they are given: under a Lightning
    trainer the task passes them on, and without a trainer `for_model` reads them. Order and augmentation are functions
    of (seed, epoch, index) only.

    Subclasses implement `class_names` and return their three splits from `load`.
    """

    target: Target = "class"
    """Kind of targets: ``class``, ``multilabel``, ``regression``, ``mask``, ``tasks`` or ``embedding``."""
    validation_chooses: bool = True
    """Whether the validation split may select the best epoch; otherwise the last one is kept."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        image_size: int | tuple[int, int] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Validate and store the settings.

        Args:
            batch_size: Images per batch of each process.
            image_size: Height and width in pixels, or one number for both; None takes the backbone's.
            mean: Mean per channel of values in [0, 1]; None takes the backbone's.
            std: Standard deviation per channel; None takes the backbone's.
            interpolation: nearest, bilinear or bicubic; None takes the backbone's.
            crop_pct: Fraction of a proportionally resized image that the centre crop keeps; None stretches the whole
                image to the size.
            drop_last: Drop the last training batch of an epoch if it is smaller than the others.
            num_workers: Worker processes that build batches; 0 is fastest for data in memory.
            seed: Seed of order and augmentation.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not least <= value < 2**31:
                raise ConfigError(f"{type(self).__name__}({name}={value}): at least {least} is needed, below 2^31.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        given = {"size": size, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
        self._given: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        # Placeholders stand in for the backbone's values, so that the given ones are validated now.
        Preprocessing(**{"size": (1, 1), "mean": (0, 0, 0), "std": (1, 1, 1), **self._given})
        self.batch_size, self.num_workers, self.seed, self.drop_last = batch_size, num_workers, seed, drop_last
        self.processes: int | None = None
        """Processes that train together; None until they are known: those of the trainer, and one without a trainer."""
        self._from_model: Preprocessing | None = None
        self._splits: dict[str, Dataset[Any]] = {}
        self._position = (0, 0)
        self._digest: str | None = None

    @classmethod
    def for_model(cls, model: nn.Module, **settings: Any) -> ImageData:
        """Create the data module for a backbone, ready for use without a trainer.

        Args:
            model: A timm model, adapted or not.
            settings: Settings of the data module.
        """
        data = cls(**settings)
        data.fit_to(Preprocessing.of(model))
        data.setup()
        return data

    def fit_to(self, preprocessing: Preprocessing) -> None:
        """Adopt a backbone's preprocessing where the settings leave it open.

        Args:
            preprocessing: The backbone's preprocessing.
        """
        self._from_model = preprocessing

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels, or of the numbers of a regression."""

    @property
    def num_classes(self) -> int:
        """Number of classes, or of values to predict."""
        return len(self.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of each image.

        Raises:
            DataError: If neither the settings nor a backbone define it.
        """
        base = self._from_model
        if base is None and self.trainer is not None:
            base = getattr(self.trainer.lightning_module, "preprocessing", None)
        missing = [key for key in ("size", "mean", "std") if key not in self._given]
        if base is None and missing:
            raise DataError(
                f"{type(self).__name__} does not know the backbone, and {', '.join(missing)} of its images were not "
                f"given. Use {type(self).__name__}.for_model(model), or give image_size, mean and std."
            )
        known = {} if base is None else {field.name: getattr(base, field.name) for field in fields(base)}
        return Preprocessing(**{**known, **self._given})

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images as the backbone sees them."""
        return (3, *self.preprocessing.size)

    @abstractmethod
    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Create the splits ``train``, ``validation`` and ``test``.

        Args:
            preprocessing: Preprocessing of each image.

        Raises:
            DataError: If images or labels cannot be used.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load the splits once; Lightning calls this before training, validation and testing."""
        if self._splits:
            return
        splits = self.load(self.preprocessing)
        for name in ("train", "validation", "test"):
            if len(splits[name]) == 0:  # type: ignore[arg-type]
                raise DataError(f"{type(self).__name__} has no image in its {name} split; give it a larger share.")
        if self.drop_last and len(splits["train"]) < self.batch_together:  # type: ignore[arg-type]
            processes = self.batch_together // self.batch_size
            raise DataError(
                f"{type(self).__name__} has {counted(len(splits['train']), 'training image')}, "  # type: ignore[arg-type]
                f"fewer than batch_size={self.batch_size}{f' of {processes} processes' if processes > 1 else ''}, and "
                "drop_last leaves smaller batches out. Make batch_size smaller."
            )
        self._splits = splits

    def split(self, name: str) -> Dataset[Any]:
        """Return one split.

        Args:
            name: train, validation or test.

        Raises:
            DataError: If the splits are not loaded yet.
        """
        if name not in self._splits:
            raise DataError(f"{type(self).__name__} has no {name!r} split loaded. Call setup(), or use for_model.")
        return self._splits[name]

    def measured_on(self, split: str, task: str) -> dict[str, Any]:
        """Describe what figures of a split are measured on, for a comparison with those of another run.

        Args:
            split: train, validation or test.
            task: The task whose labels count, of several; subclasses add digests of what they know.

        Returns:
            Values for JSON: the class of the data, height and width of the images, and their number.

        Raises:
            DataError: If the splits are not loaded yet.
        """
        images = len(self.split(split))  # type: ignore[arg-type]
        return {"data": type(self).__name__, "size": list(self.preprocessing.size), "images": images}

    def replace_splits(self, splits: Mapping[str, Dataset[Any]]) -> None:
        """Replace the splits by others of the same images in the same order, such as cached features.

        Args:
            splits: The splits ``train``, ``validation`` and ``test``.
        """
        self._splits = dict(splits)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training images, in a different order each epoch."""
        split = self.split("train")
        # The position is taken before the loader is created, as workers read as soon as it is iterated over.
        (epoch, batches), self._position = self._position, (0, 0)
        whole = self._sampler(len(split), (epoch, batches * self.batch_together))  # type: ignore[arg-type]
        rank, processes = self._place()
        if processes == 1:
            return self._loader(split, whole, training=True)
        share = TrainingShare(whole, self.batch_size, rank, processes, self.drop_last)
        return self._loader(split, share, training=True)

    @property
    def batch_together(self) -> int:
        """Images per batch of all processes of the training together, also while one of them measures alone."""
        return self.batch_size * (self.processes or self._place()[1])

    def _place(self) -> tuple[int, int]:
        """Return the number of this process and how many there are."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training run in the data; Lightning adds it to checkpoints."""
        if self.trainer is None or not self._splits:
            return {}
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        between = epochs.processed == epochs.ready
        return {**self.order_facts(), "epoch": epochs.processed, "batches": 0 if between else batches.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training run at the position of a `state_dict`.

        Args:
            state_dict: A result of `state_dict`.

        Raises:
            DataError: If the images differ, so that the order cannot be the same.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.check_same(state_dict)
        self._position = (state_dict["epoch"], state_dict["batches"])

    def check_same(self, state_dict: Mapping[str, Any], *, order: bool = True) -> None:
        """Check that the splits are those of an earlier run, so none of its training images is a test image now.

        Args:
            state_dict: The `state_dict` of that run.
            order: Whether the order of training has to be the same, too, which goes by the batches.

        Raises:
            DataError: If images, targets or their order differ.
        """
        changed = [
            f"{name} was {state_dict[name]} and is {now}"
            for name, now in self.order_facts().items()
            if state_dict.get(name, now) != now and (order or name != "batch_size")
        ]
        if changed:
            raise DataError(
                f"The checkpoint was written with other images or labels: {', '.join(changed)}. Give the same data, or "
                "begin a new run."
            )

    def order_facts(self) -> dict[str, Any]:
        """Return the inputs of the training order except the epoch, and the identity of the images."""
        if self._digest is None:
            digest = hashlib.sha256()
            for part in self.identity():
                digest.update(part)
            self._digest = digest.hexdigest()[:16]
        images = len(self.split("train"))  # type: ignore[arg-type]
        return {"images": images, "batch_size": self.batch_together, "seed": self.seed, "digest": self._digest}

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify the images and targets of all splits."""
        for name, split in self._splits.items():
            yield f"{name} {len(split)}".encode()  # type: ignore[arg-type]
            if isinstance(targets := getattr(split, "targets", None), Tensor):
                yield targets.numpy().tobytes()

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation images, in a fixed order."""
        return self._loader(self.split("validation"), self._share("validation"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of test images, in a fixed order."""
        return self._loader(self.split("test"), self._share("test"))

    def _share(self, name: str) -> EvaluationShare | None:
        """Return the images of a split that this process measures; None for all."""
        rank, processes = self._place()
        length = len(self.split(name))  # type: ignore[arg-type]
        return None if processes == 1 else EvaluationShare(length, rank, processes, name)

    def plain_dataloader(self, name: str) -> DataLoader[Any]:
        """Return a loader of a split in its fixed order, with images prepared as for an evaluation.

        Args:
            name: train, validation or test.
        """
        split = self.split(name)
        return self._loader(split.plain() if isinstance(split, BatchSplit) else split)

    def _sampler(self, length: int, start: tuple[int, int]) -> EpochSampler:
        """Return the order of `length` training images, from an epoch and a number of images served in it."""
        return EpochSampler(length, self.seed, start)

    def _batch_of(self, split: Dataset[Any], training: bool) -> int:
        """Return the batch size for a split, in training or for an evaluation."""
        return self.batch_size

    def _loader(
        self, split: Dataset[Any], sampler: Sampler[Any] | None = None, training: bool = False
    ) -> DataLoader[Any]:
        on_gpu = self._on_gpu()
        return DataLoader(
            split,
            batch_size=self._batch_of(split, training),
            sampler=sampler,
            drop_last=self.drop_last and training,
            num_workers=self.num_workers,
            collate_fn=_keep if isinstance(split, BatchSplit) else None,
            pin_memory=on_gpu,
            # On a CPU the workers of one split would take the cores of another's.
            persistent_workers=on_gpu and self.num_workers > 0,
            # Seeds the workers and keeps the loader from drawing from the training run's global generator.
            generator=torch.Generator().manual_seed(draw_seed(self.seed)),
        )

    def _on_gpu(self) -> bool:
        """Whether batches go to a GPU; without a trainer, whether there is one."""
        if self.trainer is None:
            return torch.cuda.is_available()
        return bool(self.trainer.strategy.root_device.type == "cuda")


def _keep(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch unchanged: `BatchSplit` has already collated it."""
    return batch
