"""Classification of images: one class each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_calibration_error

from vispeft.errors import ConfigError, DataError
from vispeft.heads.zero_shot import ZeroShotHead
from vispeft.methods.mmrl import MMRL, mmrl_head
from vispeft.metrics import ClassScores, per_class
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks.finite import finite_rows
from vispeft.tasks.supervised import Batch, SupervisedTask
from vispeft.viz import confusion_matrix, reliability_diagram

__all__ = ["Classification", "balanced_weights", "fit_temperature", "soft_cross_entropy"]

BINS = 15
"""Bins of the expected calibration error, as in Guo et al. (ICML 2017)."""


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error; NaN without images, where torchmetrics raises."""

    def compute(self) -> Tensor:
        """Compute the error over all images."""
        return super().compute() if len(self.confidences) else torch.tensor(math.nan)


class Classification(SupervisedTask):
    """One class per image, trained with cross entropy; targets may also be class proportions, as mixup makes them.

    Logs loss and accuracy of training, and of validation also the accuracy among the first five, the mean accuracy and
    the mean F1 of the classes, and the expected calibration error. A test adds the accuracy per class and the
    confusion matrix.
    """

    target: ClassVar[str] = "class"
    monitor = "validation/accuracy"

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        absent: Literal["skip", "zero"] = "skip",
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            label_smoothing: Fraction of each label to spread evenly over all classes.
            class_weights: How much each class counts in the training loss; ``balanced`` makes all classes count the
                same in sum, whatever their numbers of training images.
            absent: How a class that was not measured counts in the mean accuracy and the mean F1 of the classes: not
                at all (``skip``), or as zero.
            settings: Settings of `AdapterTask`.

        Raises:
            ConfigError: If a number is out of range, or the backbone is unknown.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"Classification(label_smoothing={label_smoothing}): a share from 0 up to, not including, 1 is needed."
            )
        self.absent = absent
        super().__init__(**settings)
        self.label_smoothing, self.class_weights, self.temperature = label_smoothing, class_weights, 1.0
        self.targets_needed = class_weights == "balanced"
        weights = None if class_weights in (None, "balanced") else _checked_weights(class_weights, self.num_classes)
        self.register_buffer("_weights", weights, persistent=False)
        self.test_confusion = MulticlassConfusionMatrix(self.num_classes)

    def make_metrics(self, split: str) -> MetricCollection:
        """Create the metrics of a split.

        Args:
            split: train, validation or test.
        """
        classes = self.num_classes
        metrics: dict[str, Any] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if split != "train":
            if classes > 5:
                metrics["top5_accuracy"] = MulticlassAccuracy(classes, average="micro", top_k=5)
            metrics["mean_class_accuracy"] = ClassScores(classes, figure="accuracy", absent=self.absent)
            metrics["f1"] = ClassScores(classes, figure="f1", absent=self.absent)
            metrics["calibration_error"] = CalibrationError(classes, n_bins=BINS)
        return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)

    def training_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the weighted and smoothed cross entropy.

        Args:
            scores: Class scores (B, classes).
            targets: Labels (B,), or class proportions (B, classes).
        """
        if targets.is_floating_point():
            return soft_cross_entropy(scores, targets, self._weights, self.label_smoothing)
        return F.cross_entropy(scores, targets, self._weights, label_smoothing=self.label_smoothing)

    def plain_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross entropy.

        Args:
            scores: Class scores (B, classes).
            targets: Labels (B,).
        """
        return F.cross_entropy(scores, targets)

    def for_metrics(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Use the class with the largest proportion as label of a mixed image.

        Args:
            scores: Class scores (B, classes).
            targets: Labels (B,), or class proportions (B, classes).
        """
        # torchmetrics mistakes scores for probabilities if all of a batch lie between 0 and 1; log-probabilities never
        # do.
        return scores.log_softmax(dim=1), targets.argmax(dim=1) if targets.is_floating_point() else targets

    def for_probe(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give targets, and the weights of the training loss."""
        return targets, self._weights

    def take_targets(self, targets: Tensor) -> None:
        """Compute balanced class weights.

        Args:
            targets: Labels of the training split (N,).
        """
        self._weights = balanced_weights(targets, self.num_classes).to(self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the metric that Lightning does not log, and so does not reset."""
        self.test_confusion.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Measure a batch of the test split and return its scores and targets."""
        measured = super().test_step(batch, batch_idx)
        self.test_confusion.update(*finite_rows(measured["scores"], measured["targets"]))
        return measured

    def decode(self, scores: Tensor) -> Tensor:
        """Class probabilities (B, classes), at the temperature fitted on validation.

        Args:
            scores: Class scores (B, classes).
        """
        return (scores / self.temperature).softmax(dim=-1)

    def calibrate(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Fit the temperature that `decode` divides scores by, which never changes the predicted class.

        Args:
            scores: Class scores of the validation split (N, classes).
            targets: Labels (N,).

        Returns:
            The temperature, and the calibration error on validation before and after.
        """
        self.temperature = fit_temperature(scores, targets)
        return {"temperature": self.temperature, "validation_calibration_error": self._before_after(scores, targets)}

    def _before_after(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        probabilities = {"before": scores.softmax(dim=-1), "after": self.decode(scores)}
        return {
            when: float(multiclass_calibration_error(values, targets, self.num_classes, n_bins=BINS))
            for when, values in probabilities.items()
        }

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        return {**super().output(), "temperature": self.temperature}

    def load_adapter(self, path: str | Path) -> None:
        """Replace the adapter by a saved one, its temperature included.

        Args:
            path: Its directory.
        """
        super().load_adapter(path)
        self.temperature = float((self.bank.notes().get("output") or {}).get("temperature", 1.0))

    def classify_by(self, classes: ClassEmbeddings) -> None:
        """Let class embeddings classify in place of the adapter's classifier, for measuring and predicting.

        The scores are ``scale * cos(P f, t)`` of the adapter's features f; those of MMRL are scored by both of its
        features where it was trained on all these classes, else by that of the class token.

        Args:
            classes: Embeddings of the classes, in the order of the outputs.

        Raises:
            ConfigError: If they are for other features than the adapter's classifier takes.
        """
        (name,), head = self.bank.active, self.bank.head()
        method, given = self.bank.plan().method, classes.projection.shape[1]
        if isinstance(method, MMRL) and method.joint is not None:
            new: nn.Module = mmrl_head(classes, method.alpha, set(classes.class_names) <= set(self.class_names()))
            given = cast(nn.Linear, new).in_features
        else:
            new = ZeroShotHead(classes)
        width = getattr(head, "in_features", None)
        if given != width:
            raise ConfigError(
                f"The class embeddings are for {given} features, and the classifier of {method.name} takes {width}. "
                "Make them with the text tower of the same CLIP, and take an adapter whose classifier reads the pooled "
                "features, such as LoRA."
            )
        self.bank.put_head(name, new.to(next(self.model.parameters()).device))
        self.num_classes, self.temperature = len(classes.embeddings), 1.0
        noted = self.bank.notes().get("output") or {}
        self.bank.annotate(class_names=classes.class_names, output={**noted, **self.output()})
        for split in ("train", "validation", "test"):
            setattr(self, f"{split}_metrics", self.make_metrics(split))
        self.test_confusion = MulticlassConfusionMatrix(self.num_classes)

    def summary(self, scores: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Accuracy of each class, None for one without images; calibration error before and after the temperature.

        Args:
            scores: Class scores of the test split (N, classes).
            targets: Labels (N,).
            names: Names of the classes.
        """
        counts = self.test_confusion.compute().double()
        return {
            "test_accuracy_per_class": per_class((counts.diagonal() / counts.sum(1)).float(), names),
            "test_calibration_error": self._before_after(scores, targets),
        }

    def draw(self, scores: Tensor, targets: Tensor, names: Sequence[str], folder: Path) -> None:
        """Draw the confusion matrix and the reliability diagram.

        Args:
            scores: Class scores of the test split (N, classes).
            targets: Labels (N,).
            names: Names of the classes.
            folder: Folder for the plots.
        """
        confusion_matrix(self.test_confusion.compute(), names, folder / "confusion_matrix.png")
        right = scores.argmax(dim=1) == targets
        sure = {"as trained": scores.softmax(1).amax(1), "at its temperature": self.decode(scores).amax(1)}
        reliability_diagram(sure, right, folder / "reliability.png", bins=BINS)

    def columns(self, names: Sequence[str]) -> list[str]:
        """Name the columns of a table of predictions."""
        return ["class", "probability"]

    def row(self, values: Tensor, names: Sequence[str]) -> list[str]:
        """The likeliest class and its probability."""
        best, index = values.max(dim=0)
        return [names[int(index)], f"{float(best):.6f}"]


def soft_cross_entropy(scores: Tensor, shares: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Compute the cross entropy with class proportions, with the same loss as class indices for one-hot targets.

    Args:
        scores: Class scores (B, classes).
        shares: Proportion of each class in each image (B, classes).
        weights: Weight of each class (classes,); None for equal weights.
        smoothing: Fraction to spread evenly over all classes.

    Returns:
        The mean, weighted by the classes' weights.
    """
    total = F.cross_entropy(scores, shares, weights, label_smoothing=smoothing, reduction="sum")
    # torch divides by the number of images here, but by the sum of weights for class indices.
    return total / (shares.sum() if weights is None else (shares @ weights).sum())


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Compute weights with which every class counts the same in sum, and all images together as they did.

    Args:
        labels: Labels of all training images (N,).
        classes: Number of classes.

    Returns:
        N / (classes * images of the class), per class.

    Raises:
        DataError: If a class has no image, or targets are no labels.
    """
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError("class_weights is 'balanced', which needs one label per image. Give a list of weights instead.")
    counts = torch.bincount(labels, minlength=classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"class_weights is 'balanced', and {len(empty)} of {classes} classes have no training image, first class "
            f"{empty[0]}. Leave these classes out, or give a list of weights."
        )
    return len(labels) / (classes * counts.float())


def _checked_weights(weights: Any, classes: int) -> Tensor:
    if isinstance(weights, str) or len(weights) != classes or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ConfigError(
            f"Classification(class_weights={weights!r}): give 'balanced', or one finite number above 0 for each of the "
            f"{classes} classes."
        )
    return torch.tensor(weights, dtype=torch.float32)


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Find the temperature at which scores, divided by it, have the smallest cross entropy.

    The slope of the cross entropy over 1 / temperature rises everywhere, so that halving intervals finds its zero. The
    temperature stays between 1/20 and 20: without an error on validation there is no smallest cross entropy.

    Args:
        scores: Class scores (N, classes); rows that are not finite are left out.
        labels: Labels (N,).

    Returns:
        The temperature; 1 without a finite row.
    """
    scores, labels = finite_rows(scores, labels)
    if not len(scores):
        return 1.0
    z = scores.double()
    right = z.gather(1, labels[:, None]).squeeze(1)
    low, high = -math.log(20), math.log(20)
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((math.exp(middle) * z).softmax(1).mul(z).sum(1) - right).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-low)
