"""Data modules for metric learning: embeddings of classes that are never trained on have to tell them apart.

Training classes and test classes are disjoint, as in Song et al. (CVPR 2016), whose splits of CUB, Cars and SOP are
those of the literature. The protocol `mlrc` is that of Musgrave et al., "A Metric Learning Reality Check" (ECCV 2020):
the classes for validation are one of four parts of the training classes, by their order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.augmentation import Augmentation
from vispeft.data.base import EpochSampler, Index
from vispeft.data.by_name import ClassOrder
from vispeft.data.listed import ImageSplit, ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing
from vispeft.data.metric_checks import check_batches
from vispeft.data.metric_listing import RetrievalListing, numbered, roles_of
from vispeft.data.per_class import PerClassSampler
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.randomness import draw_seed
from vispeft.errors import ConfigError, DataError, counted

__all__ = ["MetricData", "RetrievalSplit"]

MLRC_FOLDS = 4
"""Parts of the training classes (Musgrave et al., section 3.2)."""


class RetrievalSplit(ImageSplit):
    """A split whose images are queries, gallery, or both."""

    def __init__(self, listed: ListedSplit, preprocessing: Preprocessing) -> None:
        """Store images, labels and roles.

        Args:
            listed: Images and targets.
            preprocessing: Preprocessing of each image.
        """
        super().__init__(listed, preprocessing)
        self.roles = roles_of(listed)

    def __getitem__(self, index: Index | int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return one normalised image (3, H, W), its label and its role."""
        images, labels, roles = self.__getitems__([index])  # type: ignore[misc]
        return images[0], labels[0], roles[0]

    def batch(self, indices: list[Index]) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Build a batch of images (B, 3, H, W), labels int64 (B,) and roles int64 (B,)."""
        images, labels = super().batch(indices)
        return images, labels, self.roles[torch.tensor([index for _, index in indices])]


class MetricData(ListedData):
    """Base of the data modules for metric learning.

    Training batches are images float32 (B, 3, H, W) and labels int64 (B,) from 0 to `num_classes` - 1, with
    `images_per_class` images of each class. Batches of validation and test are images, labels and roles: 0 for an image
    that is both query and gallery, 1 for a query, 2 for an image of the gallery. Their labels are indices into
    `label_names`.

    Splits are made of whole classes. With the protocol ``literature``, validation classes are a share of the training
    classes and choose the epoch; without a share, all training classes are trained on, the test split is shown in each
    epoch, and the last epoch is the result. With ``mlrc``, the training classes are divided into `folds` parts by their
    order, of which the chosen one is for validation; ``vispeft train CONFIG --folds 4`` runs all of them.

    Subclasses return ``train``, and ``validation`` and ``test`` if there are such, from `read`, made by `listing_of`.
    """

    by_order: ClassVar[bool] = False
    """Whether the validation classes are the last ones in the order of the classes, as the published test classes are,
    instead of random ones."""

    def __init__(
        self,
        *,
        protocol: Literal["literature", "mlrc"] = "literature",
        images_per_class: int = 4,
        validation: float | None = 0.2,
        test: float = 0.5,
        folds: int | None = None,
        crop_pct: float | None = 0.875,
        augment: Augmentation | None = Augmentation(crop="resized", flip=0.5),  # noqa: B008 - it is frozen
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            protocol: Choice of the validation classes: ``literature`` or ``mlrc``.
            images_per_class: Images of each class in a training batch; it divides `batch_size`.
            validation: With ``literature``, the share of the training classes for validation; None trains on all, and
                reports the last epoch.
            test: Share of the classes for the test, if no test split is given.
            folds: With ``mlrc``, the number of parts; None takes 4.
            crop_pct: Fraction of a proportionally resized image that the centre crop keeps: 256 pixels for 224. None
                stretches the whole image to the size.
            augment: Augmentation of training images.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        name = type(self).__name__
        if protocol not in ("literature", "mlrc"):
            raise ConfigError(f"{name}(protocol={protocol!r}): the choices are literature and mlrc.")
        if folds is not None and protocol != "mlrc":
            raise ConfigError(f"{name}(folds={folds}): folds of classes belong to the protocol mlrc; set protocol too.")
        for key, share in (("validation", validation), ("test", test)):
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"{name}({key}={share}): a share of the classes between 0 and 1 is needed.")
        folds = MLRC_FOLDS if protocol == "mlrc" and folds is None else folds
        super().__init__(folds=folds, crop_pct=crop_pct, augment=augment, **settings)
        self.validation, self.test = validation, test  # type: ignore[assignment]  # shares of classes here
        self.protocol, self.images_per_class, self.target = protocol, images_per_class, "embedding"
        self.validation_chooses = protocol == "mlrc" or validation is not None
        self._check_batch()

    def _check_batch(self) -> None:
        name, size, per_class = type(self).__name__, self.batch_size, self.images_per_class
        if per_class < 1 or size % per_class or size < 2 * per_class:
            raise ConfigError(
                f"{name}(batch_size={size}, images_per_class={per_class}): a batch has the same number of images of "
                "each of two or more classes, so batch_size must be a multiple of images_per_class, at least twice it."
            )
        if self.augment is not None and self.augment.mixes:
            raise ConfigError(f"{name}: mixup and cutmix mix labels, and each image needs a class. Leave them out.")

    # ------------------------------------------------------------------ classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the training classes in the order of their labels.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
        """
        listing = self._retrieval
        if listing.broken or listing.train_classes < 2:
            self.report().raise_errors()
        return listing.class_names[: listing.train_classes]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of all classes by their labels; those of the training classes come first."""
        return self.listing.class_names

    @property
    def train_labels(self) -> list[int]:
        """Label of each training image, from 0 to `num_classes` - 1."""
        return self.listing.splits["train"].targets.tolist()

    @property
    def _retrieval(self) -> RetrievalListing:
        listing = self.listing
        assert isinstance(listing, RetrievalListing)
        return listing

    def match_classes(self, names: Sequence[str]) -> ClassOrder:
        """Leave the classes as they are: embeddings are compared with each other, and not with trained classes.

        Args:
            names: Names of the classes a model was trained with.
        """
        return ClassOrder(tuple(names), tuple(names), self.target)

    def listing_of(self, found: Listing, **settings: Any) -> RetrievalListing:
        """Make the listing of a reader.

        Args:
            found: Splits with one class per image.
            settings: Further fields, such as ``settled``.
        """
        known = {field.name: getattr(found, field.name) for field in fields(Listing)}
        known |= {"target": "embedding", "images_per_class": self.images_per_class}
        return RetrievalListing(**{**known, **settings})

    @abstractmethod
    def read(self) -> RetrievalListing:
        """List images and classes, without opening any image.

        Raises:
            DataError: If there is nothing to list.
        """

    # ------------------------------------------------------------------ batches

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Check the images and return the splits.

        Args:
            preprocessing: Preprocessing of each image.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
            ConfigError: If there are not enough classes or images for a batch.
        """
        self.accept()
        self.check_batches()
        augment = self.augment if self.augment != Augmentation() else None
        splits = self.listing.splits
        evaluated = {name: RetrievalSplit(splits[name], preprocessing) for name in ("validation", "test")}
        return {"train": ImageSplit(splits["train"], preprocessing, augment, seed=self.seed), **evaluated}

    def check_batches(self) -> None:
        """Refuse a batch size that the training classes cannot fill.

        Raises:
            ConfigError: If they cannot.
        """
        if problem := self._problem_of_batches(self._retrieval):
            raise ConfigError(f"{type(self).__name__}: {problem}.")

    def _problem_of_batches(self, listing: Listing) -> str:
        """Tell why batches of this size cannot be drawn; empty if they can."""
        assert isinstance(listing, RetrievalListing)
        return check_batches(listing, self.batch_together)

    def _sampler(self, length: int, start: tuple[int, int]) -> EpochSampler:
        self.check_batches()  # again, now that the number of processes is known
        labels = self.listing.splits["train"].targets
        return PerClassSampler(labels, self.images_per_class, self.batch_together, self.seed, start)

    def order_facts(self) -> dict[str, Any]:
        """Return what `ImageData.order_facts` does, and the images of a class in a batch."""
        return {**super().order_facts(), "images_per_class": self.images_per_class}

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify images, labels and roles of all splits."""
        yield from super().identity()
        yield roles_of(self.listing.splits["test"]).numpy().tobytes()

    # ------------------------------------------------------------------ drawing classes

    def _divide(self, listing: Listing) -> Listing:
        """Draw the missing splits by classes, and give the classes their final numbers."""
        splits, drawn = dict(listing.splits), dict[str, str]()
        if "test" not in splits:
            splits["train"], splits["test"] = self._held("test", splits["train"], self.test)
            drawn["test"] = f"split_seed {self.split_seed}"
        repeats, given = listing.repeats, splits.pop("validation", None)
        if given is not None and not self._keeps_validation:
            splits["train"] = splits["train"].join(given)
        if given is not None and self._keeps_validation:
            splits["validation"] = given
        elif self.folds is not None:
            splits["train"], splits["validation"] = self._fold(splits["train"])
            drawn["validation"] = f"fold {self.fold + 1} of {self.folds}"
        elif self.validation is None:
            splits["validation"], repeats = splits["test"], repeats | {"validation"}
        else:
            splits["train"], splits["validation"] = self._held("validation", splits["train"], self.validation)
            drawn["validation"] = "the last ones" if self.by_order else f"split_seed {self.split_seed}"
        names, splits = numbered(listing.class_names, {name: splits[name] for name in ("train", "validation", "test")})
        findings = [*listing.findings, *self._notes(drawn, splits)]
        found = replace(
            listing, class_names=names, splits=splits, findings=findings, repeats=repeats, drawn=frozenset(drawn)
        )
        if problem := self._problem_of_batches(found):
            # Not an error: whoever looks at images has not chosen a batch size yet. `load` refuses it.
            findings.append(Finding("warning", "batch-size", problem))
        return found

    @property
    def _keeps_validation(self) -> bool:
        """Whether a given validation split stays one, and is not for training."""
        return self.folds is None and self.validation is not None

    def _notes(self, drawn: dict[str, str], splits: dict[str, ListedSplit]) -> list[Finding]:
        """Say which classes were drawn, and which epoch is the result."""
        places = [
            f"{name} {counted(len(splits[name].targets.unique()), 'class', 'classes')} ({how})"
            for name, how in drawn.items()
        ]
        found = [Finding("fact", "drawn-classes", "Drawn by classes, disjoint", tuple(places))] if places else []
        shown = "The epoch that is best on the validation classes is the result"
        if not self.validation_chooses:
            shown = "There are no validation classes: the test split is shown in each epoch, and the last is the result"
        return [*found, Finding("fact", "chosen-epoch", shown)]

    def _held(self, name: str, split: ListedSplit, share: float) -> tuple[ListedSplit, ListedSplit]:
        """Hold out a share of the classes of a split."""
        classes = self._enough(split, 2, f"{name}={share}")
        count = min(max(round(len(classes) * share), 1), len(classes) - 1)
        if not (self.by_order and name == "validation"):
            generator = torch.Generator().manual_seed(draw_seed(self.split_seed))
            classes = classes[torch.randperm(len(classes), generator=generator)]
        return _apart(split, classes[len(classes) - count :])

    def _fold(self, split: ListedSplit) -> tuple[ListedSplit, ListedSplit]:
        """Hold out one part of the classes, which follow each other."""
        assert self.folds is not None
        classes = self._enough(split, self.folds, f"folds={self.folds}")
        return _apart(split, classes.tensor_split(self.folds)[self.fold])

    def _enough(self, split: ListedSplit, least: int, asked: str) -> Tensor:
        classes = split.targets.unique()
        if len(classes) < least:
            raise DataError(
                f"{type(self).__name__}({asked}): the training images have "
                f"{counted(len(classes), 'class', 'classes')}, too few to hold out whole classes. Give images of more "
                "classes."
            )
        return classes


def _apart(split: ListedSplit, classes: Tensor) -> tuple[ListedSplit, ListedSplit]:
    """Return the images of other classes, and those of the given ones."""
    held = torch.isin(split.targets, classes)
    return split.take((~held).nonzero().flatten()), split.take(held.nonzero().flatten())
