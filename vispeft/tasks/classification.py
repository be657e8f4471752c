"""Classification of images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vispeft.adapters.method import Method
from vispeft.errors import ConfigError
from vispeft.tasks.base import AdapterTask

__all__ = ["Classification"]

Batch = tuple[Tensor, Tensor]


class Classification(AdapterTask):
    """One class per image, trained with cross entropy.

    Logs loss and accuracy of training and validation; a test also gives accuracy per class and the confusion matrix.
    """

    monitor = "validation/accuracy"

    def __init__(
        self,
        *,
        backbone: str,
        method: Method,
        num_classes: int,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            backbone: Name of a timm model, or ``zoo:NAME``.
            method: The adapter.
            num_classes: Number of classes; configs take it from the data.
            backbone_args: Further arguments for ``timm.create_model``, such as ``pretrained`` or ``img_size``.
            weights: File with the backbone's weights, instead of pretrained ones.
            lr: Highest learning rate.
            weight_decay: Weight decay of matrices; vectors have none.
            warmup: Share of all steps in which the learning rate rises.
            label_smoothing: Share of each label that is spread evenly over all classes.

        Raises:
            ConfigError: If a number is out of range, or the backbone is not known.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"Classification(label_smoothing={label_smoothing}): a share from 0 up to, not including, 1 is needed."
            )
        super().__init__(
            backbone=backbone,
            method=method,
            num_classes=num_classes,
            backbone_args=backbone_args,
            weights=weights,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
        )
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_class_accuracy = MulticlassAccuracy(num_classes, average="none")
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch: images (B, 3, H, W), labels (B,)."""
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.label_smoothing)
        self.train_accuracy(scores, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_train_epoch_start(self) -> None:
        """Log the learning rate the epoch begins with."""
        schedule = self.lr_schedulers()
        self.log("lr", schedule.get_last_lr()[0], on_epoch=True)  # type: ignore[union-attr]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._measure("validation", batch, self.validation_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the test split."""
        scores = self._measure("test", batch, self.test_accuracy)
        self.test_class_accuracy.update(scores, batch[1])
        self.test_confusion.update(scores, batch[1])

    def on_test_epoch_start(self) -> None:
        """Begin anew; these two are not logged by Lightning, which would otherwise do it."""
        self.test_class_accuracy.reset()
        self.test_confusion.reset()

    def _measure(self, split: str, batch: Batch, accuracy: Metric) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores.float(), labels)
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=len(labels))
        accuracy(scores, labels)
        self.log(f"{split}/accuracy", accuracy, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return scores

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Give class probabilities (B, classes)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).float().softmax(dim=-1)
