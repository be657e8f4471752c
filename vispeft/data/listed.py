"""Base of the data modules that list their images first: checks, random splits, folds, augmentation."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.augmentation import Augmentation, TrainTransform
from vispeft.data.base import BatchSplit, ImageData, Index
from vispeft.data.by_name import ClassOrder, in_order
from vispeft.data.checks import Report, examine
from vispeft.data.device_augmentation import MIX, DeviceAugmentation, UnfinishedBatch
from vispeft.data.formats import MAX_PIXELS
from vispeft.data.images import Reading
from vispeft.data.listing import PER_PIXEL, Finding, ListedSplit, Listing
from vispeft.data.preprocessing import DECODINGS, Preprocessing
from vispeft.data.randomness import seeded
from vispeft.data.reading import BrokenImage
from vispeft.data.splitting import check_drawing, cross_validation, hold_out, share_of_rest
from vispeft.errors import ConfigError, DataError, check_object, counted, printable

__all__ = ["ImageSplit", "ListedData", "PixelSplit"]

logger = logging.getLogger(__name__)


class ImageSplit(BatchSplit):
    """A split that reads its images on access."""

    def __init__(
        self,
        listed: ListedSplit,
        preprocessing: Preprocessing,
        augment: Augmentation | None = None,
        mixer: Mixup | None = None,
        seed: int = 0,
    ) -> None:
        """Store the parts that batches are built from.

        Args:
            listed: Images and targets.
            preprocessing: Preprocessing of each image.
            augment: Augmentation of training images.
            mixer: timm's mixup.
            seed: Seed of augmentation and mixing.
        """
        self.source, self.targets = listed.source, listed.targets
        self._plain = preprocessing.transform()
        self._plain_least = preprocessing.least
        self._least = self._plain_least if augment is None else augment.least(preprocessing)
        device = augment is not None and augment.on_device
        self._train = None if augment is None or device else TrainTransform(preprocessing, augment)
        self._device = DeviceAugmentation(preprocessing, augment, mixer, seed) if augment and device else None
        self._mixer, self._seed = mixer, seed

    def batch(self, indices: list[Index]) -> Any:
        """Build a batch, which depends only on its indices and the seed.

        Returns:
            Images and targets, or an `UnfinishedBatch` for `finish`, if batches are augmented on the device.
        """
        if self._device is not None:
            return self._unfinished(self._device, indices)
        images = torch.stack([self._image(epoch, index) for epoch, index in indices])
        targets = self.targets[torch.tensor([index for _, index in indices])]
        if self._mixer is not None:
            with seeded(self._seed, MIX, *indices[0]):
                images, targets = self._mixer(images, targets)
        return images, targets

    def plain(self) -> ImageSplit:
        """Return the same images without augmentation and mixing."""
        found = copy.copy(self)
        found._least, found._train, found._device, found._mixer = self._plain_least, None, None, None
        return found

    def finish(self, batch: UnfinishedBatch) -> tuple[Tensor, Tensor]:
        """Augment a batch on its device.

        Args:
            batch: The batch, moved to the device.
        """
        assert self._device is not None
        return self._device.finish(batch)

    def _unfinished(self, steps: DeviceAugmentation, indices: list[Index]) -> UnfinishedBatch:
        images, flips, boxes = [], [], []
        for epoch, index in indices:
            image = self._read(index)
            with seeded(self._seed, epoch, index):
                images.append(steps.crop(image))
                flip, box = steps.draw()
            flips.append(flip)
            boxes.append(box)
        targets = self.targets[torch.tensor([index for _, index in indices])]
        return UnfinishedBatch(torch.stack(images), targets, torch.tensor(flips), torch.tensor(boxes), indices[0])

    def _read(self, index: int) -> Tensor:
        return self.source.read(index) if self._least is None else self.source.read_reduced(index, self._least)

    def _image(self, epoch: int, index: int) -> Tensor:
        image = self._read(index)
        if self._train is None:
            return self._plain(image)
        with seeded(self._seed, epoch, index):
            return self._train(image)


Prepare = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Transform of an image and its labels."""


class PixelSplit(BatchSplit):
    """A split that reads each image and its labels of pixels on access; a subclass reads and stacks the labels."""

    def __init__(self, listed: ListedSplit, prepare: Prepare, seed: int = 0) -> None:
        """Store the parts that batches are built from.

        Args:
            listed: Images and labels.
            prepare: Transform of an image and its labels, with separate random numbers.
            seed: Seed of the random numbers.
        """
        self.listed, self.source, self.targets = listed, listed.source, listed.targets
        self._prepare, self._seed = prepare, seed
        self.plainly: Prepare | None = None
        """Transform of an evaluation, where it is another one."""

    def plain(self) -> PixelSplit:
        """Return the same images and labels prepared as for an evaluation."""
        found = copy.copy(self)
        found._prepare = self.plainly or self._prepare
        return found

    def batch(self, indices: list[Index]) -> tuple[Tensor, Any]:
        """Build a batch of images (B, 3, H, W) and their labels."""
        images, labels = zip(*(self._one(epoch, index) for epoch, index in indices), strict=True)
        return torch.stack(images), self.stacked(labels)

    @abstractmethod
    def read_labels(self, index: int) -> Any:
        """Read the labels of an image.

        Args:
            index: Its position in the split.
        """

    @abstractmethod
    def stacked(self, labels: Sequence[Any]) -> Any:
        """Combine the prepared labels of several images.

        Args:
            labels: Labels of one image each.
        """

    def _one(self, epoch: int, index: int) -> tuple[Tensor, Any]:
        image, labels = self.source.read(index), self.read_labels(index)
        with seeded(self._seed, epoch, index):
            return self._prepare(image, labels)


class ListedData(ImageData):
    """Base of the data modules that list their images before opening one.

    Subclasses return the splits they find from `read`. Missing splits are drawn from ``train``. Before training, all
    images are checked, and one message lists every problem; unchanged images are not inspected again next time.

    With `folds`, all images of train and validation (and of test, if that would be drawn) are divided into that many
    parts. The chosen one is the test split, and a fraction of the others is the validation split. A given test split is
    then ignored.
    """

    def __init__(
        self,
        *,
        check: Literal["full", "fast"] = "full",
        augment: Augmentation | None = None,
        validation: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        transparency: tuple[int, int, int] | None = None,
        value_range: tuple[float, float] | None = None,
        max_pixels: int = MAX_PIXELS,
        decode: Literal["full", "reduced"] = "full",
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            check: Decode every image and compare contents (``full``), or read headers only (``fast``).
            augment: Augmentation of training images.
            validation: Fraction of train for selecting the best epoch, if no validation split is given.
            test: Fraction of train for the final test, if no test split is given.
            split_seed: Seed of random splits and folds.
            folds: Number of parts for cross-validation, each the test split of one run. None gives a single split.
            fold: Index of the part to test, from 0.
            transparency: Colour (red, green, blue) that transparent images are laid on; None drops the transparency,
                and hidden colours become visible.
            value_range: Values of images of more than 8 bits that become black and white; None takes all values that
                the file could hold.
            max_pixels: Largest number of pixels of an image or a mask.
            decode: Decode all pixels of JPEG files (``full``), or fewer where the resizing leaves far fewer anyway
                (``reduced``), which is faster and changes pixels a little. It is stored with the adapter.
            settings: Settings of `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        name = type(self).__name__
        if check not in ("full", "fast"):
            raise ConfigError(f"{name}(check={check!r}): the choices are full and fast.")
        if decode not in DECODINGS:
            raise ConfigError(f"{name}(decode={decode!r}): the choices are {' and '.join(DECODINGS)}.")
        check_object(name, "augment", augment, Augmentation)
        check_drawing(name, validation=validation, test=test, split_seed=split_seed, folds=folds, fold=fold)
        self.check, self.augment = check, augment
        if augment is not None and augment.on_device:
            # Not a method: it would stand in the way of the same hook of a user's task.
            self.on_after_batch_transfer = self.augment_on_device  # type: ignore[method-assign]
        if decode != "full":
            self._given["decode"] = decode
        self.validation, self.test, self.split_seed = validation, test, split_seed
        self.folds, self.fold = folds, fold
        self.reading = Reading(transparency=transparency, value_range=value_range, max_pixels=max_pixels)
        self._listing: Listing | None = None
        self._report: Report | None = None
        self._matched: ClassOrder | None = None

    @abstractmethod
    def read(self) -> Listing:
        """List images and targets, without opening any image.

        Raises:
            DataError: If there is nothing to list.
        """

    @property
    def listing(self) -> Listing:
        """The images with their final splits."""
        if self._listing is None:
            found = replace(self.read(), reading=self.reading)
            for split in found.splits.values():
                split.read_with(self.reading)
            found = self._divide(found)
            self._listing = found if self._matched is None else in_order(found, self._matched)
        return self._listing

    def match_classes(self, names: Sequence[str]) -> ClassOrder:
        """Number the classes as a model does, by their names.

        Args:
            names: Names of the model's outputs.

        Returns:
            What was matched.

        Raises:
            DataError: If the splits are loaded already, or the data have classes that the model does not know.
        """
        if self._splits:
            raise DataError(f"{type(self).__name__} has loaded its splits; match the classes before.")
        order = ClassOrder(self.class_names, tuple(names), self.listing.target)
        order.check()
        if order.found != order.wanted:
            self._matched, self._listing, self._report = order, None, None
        return order

    def report(self) -> Report:
        """Check everything, once.

        Returns:
            The report; findings raise no error here.
        """
        if self._report is None:
            self._report = examine(self.listing, full=self.check == "full")
        return self._report

    def augment_on_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Augment a training batch on its device, where `augment` has ``on_device``.

        A Lightning trainer calls it for every batch. In a loop of your own, call it for each batch of
        `train_dataloader` that was moved to the device.

        Args:
            batch: A batch of any split; those of other splits are returned unchanged.
            dataloader_idx: Number of the loader, which Lightning tells.
        """
        if isinstance(batch, UnfinishedBatch):
            return cast(ImageSplit, self.split("train")).finish(batch)
        return batch

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the targets, or of the numbers.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
        """
        if self.listing.broken or len(self.listing.class_names) < (2 if self.listing.target == "class" else 1):
            self.report().raise_errors()
        return self.listing.class_names

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Check the images and return the splits.

        Args:
            preprocessing: Preprocessing of each image.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
            ConfigError: If the augmentation does not suit the targets or batches.
        """
        mixer = self._mixer()
        self.accept()
        augment = self.augment if self.augment != Augmentation() else None
        splits = self.listing.splits
        return {
            "train": ImageSplit(splits["train"], preprocessing, augment, mixer, self.seed),
            **{name: ImageSplit(splits[name], preprocessing) for name in ("validation", "test")},
        }

    def output_notes(self) -> dict[str, Any]:
        """Return how pixels become RGB, for the adapter's file."""
        notes = self.reading.notes()
        return {"reading": notes} if notes else {}

    def accept(self) -> None:
        """Refuse data with errors, and log the warnings and what is left out.

        Raises:
            ConfigError: If files cannot be decoded at reduced scale, and that was asked for.
            DataError: If the data cannot be used; the message lists every problem.
        """
        self._check_decoding()
        report = self.report()
        report.raise_errors()
        for finding in report.findings:
            if finding.level == "warning" or finding.code == "left-out":
                level = logging.WARNING if finding.level == "warning" else logging.INFO
                logger.log(level, "%s: %s", printable(self.listing.place), finding.line(3))

    def leave_out_unreadable(self, split: str) -> list[BrokenImage]:
        """Take the images that cannot be read out of all splits, to measure a model on the others.

        Splits that are drawn are drawn before, so that each image stays in its split.

        Args:
            split: train, validation or test.

        Returns:
            The images of this split that were taken out.
        """
        left_out = []
        facts = self.report().facts
        for name, listed in self.listing.splits.items():
            broken = {index: known for index, known in enumerate(facts[name]) if known.problem}
            if not broken:
                continue
            if name == split:
                names = {listed.source.name(index): known for index, known in broken.items()}
                left_out += [
                    BrokenImage(image, f"{image} cannot be read as an image ({known.reason or known.problem}).")
                    for image, known in names.items()
                ]
            kept = [index for index in range(len(listed)) if index not in broken]
            self.listing.splits[name] = listed.take(torch.tensor(kept, dtype=torch.int64))
            self._report = None
        return left_out

    def _check_decoding(self) -> None:
        if self._given.get("decode", "full") == "full":
            return
        name = f"{type(self).__name__}(decode='reduced')"
        if self.listing.target in PER_PIXEL:
            raise ConfigError(f"{name}: labels of pixels need all pixels of their images. Leave decode out.")
        if not all(split.source.reduces for split in self.listing.splits.values()):
            raise ConfigError(f"{name}: its images are not decoded by vispeft. Leave decode out.")

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify images and targets of all splits: names, and pixels where they were read."""
        yield from super().identity()
        if changed := {key: value for key, value in self.reading.notes().items() if key != "max_pixels"}:
            yield f"{changed}\n".encode()
        facts = self.report().facts
        for name, split in self.listing.splits.items():
            for index, known in enumerate(facts[name]):
                yield f"{name} {split.source.name(index)} {known.digest}\n".encode(errors="surrogateescape")

    def _mixer(self) -> Mixup | None:
        if self.augment is None or not self.augment.mixes:
            return None
        name, target = type(self).__name__, self.listing.target
        if target == "regression":
            raise ConfigError(f"{name}: mixup and cutmix mix labels, and the targets are numbers. Leave them out.")
        if self.batch_size % 2 or not self.drop_last:
            raise ConfigError(
                f"{name}(batch_size={self.batch_size}, drop_last={self.drop_last}): mixup and cutmix pair the images "
                "of a batch, so they need an even batch_size and drop_last: true."
            )
        return self.augment.mixer(self.num_classes, multi_label=target == "multilabel")

    # ------------------------------------------------------------------ drawing splits

    def _divide(self, listing: Listing) -> Listing:
        """Draw the missing splits, or the folds."""
        splits = dict(listing.splits)
        drawn: dict[str, ListedSplit] = {}
        if self.folds is not None:
            pool = self._pool(listing)
            if self.folds > len(pool):
                raise DataError(f"{listing.place} has {counted(len(pool), 'image')}, too few for folds={self.folds}.")
            rest, tested = cross_validation(pool.targets, self.folds, self.fold, self.split_seed)
            drawn["test"], splits = pool.take(tested), {"train": pool.take(rest)}
            share = share_of_rest(self.validation, 1 / self.folds)
        else:
            if "test" not in splits:
                splits["train"], drawn["test"] = self._held(splits["train"], self.test)
            share = share_of_rest(self.validation, self.test if "test" in drawn else 0)
        if "validation" not in splits:
            splits["train"], drawn["validation"] = self._held(splits["train"], share)
        if not drawn:
            return listing
        splits = {name: {**splits, **drawn}[name] for name in ("train", "validation", "test")}
        drawn_of = f"fold {self.fold + 1} of {self.folds}, " if self.folds else ""
        # Masks and labels are not read for it, so a draw knows nothing about their classes.
        how = "at random" if listing.target in PER_PIXEL else "stratified"
        text = f"Drawn ({drawn_of}split_seed {self.split_seed}), {how} and disjoint"
        note = Finding("fact", "drawn-splits", text, tuple(f"{name} {len(split)}" for name, split in drawn.items()))
        # Folds mix the published splits, so their published sizes do not apply.
        published = None if self.folds is not None else listing.published
        findings = [*listing.findings, note]
        return replace(
            listing,
            splits=splits,
            findings=findings,
            published=published,
            repeats=frozenset(),
            drawn=frozenset(drawn),
        )

    def _held(self, split: ListedSplit, share: float) -> tuple[ListedSplit, ListedSplit]:
        rest, held = hold_out(split.targets, share, self.split_seed)
        return split.take(rest), split.take(held)

    def _pool(self, listing: Listing) -> ListedSplit:
        """Join the images that are divided into folds."""
        parts = [listing.splits["train"]]
        if "validation" in listing.splits and "validation" not in listing.repeats:
            parts.append(listing.splits["validation"])
        return parts[0] if len(parts) == 1 else parts[0].join(parts[1])
