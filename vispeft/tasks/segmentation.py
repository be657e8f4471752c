"""Semantic segmentation: a class for every pixel, by a decoder on the maps of an adapted backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError
from vispeft.heads import decoder as make_decoder
from vispeft.heads.pyramid import MapReader
from vispeft.metrics import BoundaryF, SegmentationScores, per_class
from vispeft.tasks.dense import DenseNetwork, DenseTask
from vispeft.tasks.gathering import gather
from vispeft.tasks.inference import predict_masks
from vispeft.tasks.losses import SegmentationLoss
from vispeft.tasks.predictions import MaskPredictor
from vispeft.tasks.probe import Affine
from vispeft.viz import bars, confusion_matrix, overlay_grid

__all__ = ["Segmentation", "SegmentationNetwork"]


class SegmentationNetwork(DenseNetwork):
    """Backbone, map reader and decoder in one module: images in, class scores per pixel out."""

    def __init__(self, model: nn.Module, reader: MapReader, decoder: nn.Module) -> None:
        """Combine the parts.

        Args:
            model: The backbone, adapted or merged.
            reader: The reader of its maps.
            decoder: The decoder from maps to scores.
        """
        super().__init__(model, reader)
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (B, classes, H, W), resized bilinearly to the images.

        Args:
            images: Normalised images (B, 3, H, W) of any size; they are padded to whole patches inside.
        """
        padded = self.padded(images)
        return self.fitted(self.decoder(self.reader(self.model, padded)), padded, images)


class Segmentation(DenseTask):
    """A class for every pixel, trained with cross entropy and, where asked for, Dice, Lovász or hard pixels.

    Logs the loss of training, and of validation the mean IoU and Dice, the mean accuracy of the classes, and the share
    of pixels that are right. A test adds these figures per class.
    """

    target: ClassVar[str] = "mask"
    monitor = "validation/miou"

    def __init__(
        self,
        *,
        losses: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        ohem_thresh: float = 0.7,
        ohem_min_kept: int = 100_000,
        absent: Literal["skip", "zero"] = "skip",
        boundary: bool = False,
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter, make the decoder, and verify that all of it trains.

        Args:
            losses: Weight of each loss: cross_entropy, dice, lovasz, ohem; None takes cross entropy alone.
            class_weights: How much each class counts in the cross entropy, and in that of hard pixels.
            ohem_thresh: Probability of the own class below which a pixel is hard in any case, for the loss ohem.
            ohem_min_kept: How many pixels per image count in the loss ohem at least; the default of mmsegmentation, for
                crops of 512 pixels, is more than the whole of a crop of 224.
            absent: How a class that occurs in no mask and no prediction counts in a mean: not at all (``skip``, as in
                mmsegmentation), or as zero (as in multi-task papers).
            boundary: Measure the boundary F1 too.
            settings: Settings of `DenseTask` and `AdapterTask`.

        Raises:
            ConfigError: If a setting is out of range, the decoder is not known or cannot read these maps, or the
                method changes no map.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient through the maps.
        """
        if settings.get("head_start") is not None and settings.get("decoder", "segformer") != "linear":
            raise ConfigError(
                f"Segmentation(head_start={settings['head_start']!r}): a probe starts the decoder linear, and "
                f"{settings.get('decoder', 'segformer')} has layers that are not linear. Leave head_start out, or take "
                "decoder: linear."
            )
        loss = SegmentationLoss(
            losses or {"cross_entropy": 1.0},
            class_weights=class_weights,
            ohem_thresh=ohem_thresh,
            ohem_min_kept=ohem_min_kept,
        )
        super().__init__(**settings)
        self.absent = absent
        self.decoder = make_decoder(self.decoder_name, self.reader.channels, self.num_classes, **self.decoder_args)
        self.check_maps()
        loss.check(self.num_classes)
        self.loss = loss
        self.scores = nn.ModuleDict(
            {split: SegmentationScores(self.num_classes, absent=absent) for split in ("validation", "test")}
        )
        self.boundary = BoundaryF(self.num_classes, absent=absent) if boundary else None

    def parts(self) -> dict[str, nn.Module]:
        """Map reader and decoder."""
        return {"reader": self.reader, "decoder": self.decoder}

    def network(self) -> SegmentationNetwork:
        """Backbone, map reader and decoder as one module, which shares their tensors."""
        return SegmentationNetwork(self.model, self.reader, self.decoder)

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute class scores (B, classes, H, W) in float32.

        Args:
            images: Normalised images (B, 3, H, W).
        """
        assert isinstance(images, Tensor)
        return cast(Tensor, self.network()(images.to(self.base_dtype))).float()

    # ------------------------------------------------------------------ start from a probe

    probe_kind: ClassVar[str] = "class"

    def setup(self, stage: str) -> None:
        """Check the trainer's data before the first step, also for a start from a probe."""
        super().setup(stage)
        if stage == "fit" and self.head_start is not None:
            self.head_start.check(self, getattr(self.trainer, "datamodule", None))

    def probe_layer(self) -> nn.Module:
        """Return the layer whose input linear models are fitted to: that of the scores."""
        return cast(nn.Module, self.decoder.conv_seg)

    def frozen_layer(self) -> nn.Module:
        """Return the layer that sees the map of the frozen backbone alone: the decoder is shared."""
        return self.probe_layer()

    def probe_rows(self, seen: Tensor, images: Tensor, targets: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Take cells of the map as rows (N, channels), with the class of the mask at their centres.

        Args:
            seen: The map (B, channels, h, w), float32 on the CPU.
            images: The batch (B, 3, H, W).
            targets: Its masks (B, H', W').
            most: Most cells of an image, evenly spread over those with a label.
        """
        padded = self.network().padded(images)
        rows, columns = (_centres(seen, padded, images, targets, dim) for dim in (-2, -1))
        labels = targets[:, rows][:, :, columns]
        cells = seen[..., : len(rows), : len(columns)].permute(0, 2, 3, 1)
        found = [
            (cell[known], label[known])
            for cell, label in zip(cells, labels, strict=True)
            for known in [label != IGNORE]
        ]
        spread = [(cell[evenly], label[evenly]) for cell, label in found for evenly in [_evenly(len(label), most)]]
        return torch.cat([cell for cell, _ in spread]), torch.cat([label for _, label in spread])

    def for_probe(self, targets: Tensor) -> tuple[Tensor, None]:
        """Give the classes of cells, which count alike."""
        return targets, None

    def judge_probe(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Measure scores of cells (N, classes) against their classes: mean IoU, and cross entropy."""
        measured = SegmentationScores(self.num_classes, absent=self.absent).to(scores.device)
        measured.update(scores.argmax(1)[None, None], targets[None, None])
        figures = {f"validation/{name}": value for name, value in measured.compute().items()}
        return {"validation/loss": nn.functional.cross_entropy(scores, targets), **figures}

    def start_from_probe(self, model: Affine, features: Tensor) -> None:
        """Write a linear model of cells into batch norm and convolution: the first standardises them.

        Args:
            model: The model.
            features: Rows that it was fitted to (N, channels).
        """
        norm, layer = cast(nn.BatchNorm2d, self.decoder.bn), cast(Any, self.decoder.conv_seg)
        before = 1 + norm.eps  # the rows come out of the fresh norm, which divides by the root of this
        mean, variance = features.mean(0), before * features.var(0, correction=0)
        norm.running_mean.copy_(mean * before**0.5)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        layer.weight.copy_((model.weight * ((variance + norm.eps) / before).sqrt())[..., None, None])
        layer.bias.copy_(model.bias + model.weight @ mean)

    # ------------------------------------------------------------------ steps

    def training_loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of class scores (B, classes, H, W) and masks (B, H, W) of class indices or `IGNORE`."""
        return cast(Tensor, self.loss(output, labels))

    def measure(self, split: str, images: Tensor, labels: Tensor) -> None:
        """Compare predicted masks with masks (B, h, w) of class indices or `IGNORE`."""
        found = self.predict(images, tuple(labels.shape[-2:]))
        masks = labels.masked_fill(found == IGNORE, IGNORE)
        cast(SegmentationScores, self.scores[split]).update(found, masks)
        if self.boundary is not None:
            self.boundary.update(found, masks)
        self.keep_examples({"image": images, "mask": masks, "prediction": found})

    def predict(self, images: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Compute masks (B, h, w) of class indices; all of `IGNORE` where scores of an image are not finite.

        Args:
            images: Normalised images (B, 3, H, W).
            size: Height and width of the masks; None for those of the images.
        """
        known = torch.ones(len(images), dtype=torch.bool, device=images.device)

        def scores(views: Tensor) -> Tensor:
            found = cast(Tensor, self(views))
            known.logical_and_(found.amax(1).flatten(1).isfinite().all(1))  # NaN and infinity are the largest of all
            return found

        masks = predict_masks(scores, images, self.inference, cast("tuple[int, int] | None", size))
        self.outputs_seen.add(known)
        return masks.masked_fill(~known[:, None, None], IGNORE)

    def predictor(self) -> MaskPredictor:
        """Create the predictor of images: a mask for each."""
        return MaskPredictor(
            lambda images, size: self.predict(images.to(self.device), size),
            self.inference,
            self.class_names(),
            self.bank.notes(),
        )

    def reset_metrics(self, split: str) -> None:
        """Reset the metrics of a split."""
        cast(SegmentationScores, self.scores[split]).reset()
        if self.boundary is not None:
            self.boundary.reset()

    def figures(self, split: str) -> dict[str, Tensor]:
        """Compute mean IoU, accuracies and Dice of a split, and the boundary F1 where it is measured."""
        scores = cast(SegmentationScores, self.scores[split])
        figures = dict(scores.compute())
        if self.boundary is not None:
            figures["boundary_f"] = self.boundary.compute()
        if not gather(
            scores.confusion.sum()[None]
        ).any():  # no label at all: zero, by the rule ``absent``, would be a measured figure
            figures = {name: torch.full_like(value, math.nan) for name, value in figures.items()}
        return figures

    # ------------------------------------------------------------------ results

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """IoU, accuracy and Dice of each class of the test split; None for one that does not occur."""
        if split != "test":
            return {}
        by_figure = cast(SegmentationScores, self.scores[split]).per_class()
        return {f"test_{figure}_per_class": per_class(values, names) for figure, values in by_figure.items()}

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw IoU per class, the confusion of pixels, and some images with their masks."""
        scores = cast(SegmentationScores, self.scores["test"])
        iou, right = (per_class(scores.per_class()[figure], names) for figure in ("iou", "acc"))
        bars(iou, right, folder / "iou_per_class.png", label="IoU", mark_label="share of its pixels found")
        confusion_matrix(scores.confusion, names, folder / "confusion_matrix.png")
        self.draw_examples(folder / "overlays_test.png", names)

    def draw_examples(self, path: Path, names: Sequence[str] | None = None) -> None:
        """Draw the first images of the split that was measured last, with their masks and predictions.

        Args:
            path: The PNG file.
            names: Names of the classes; None takes those of the data, or numbers where they have none.
        """
        if not self.examples:
            return
        data = self.shown_data()
        pictures = [self.example_image(example, tuple(example["mask"].shape[-2:])) for example in self.examples]
        masks, predictions = ([example[name] for example in self.examples] for name in ("mask", "prediction"))
        names = names or getattr(data, "class_names", None) or [str(index) for index in range(self.num_classes)]
        overlay_grid(pictures, masks, predictions, getattr(data, "palette", None), names, path)

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        return {**super().output(), "ignore": IGNORE}


def _centres(seen: Tensor, padded: Tensor, images: Tensor, masks: Tensor, dim: int) -> Tensor:
    """Find the pixels of masks at the centres of a map's cells, along one side; cells behind the image are left out."""
    cells, side, whole = seen.shape[dim], images.shape[dim], padded.shape[dim]
    places = (torch.arange(cells, dtype=torch.float64) + 0.5) * whole / cells
    return (places[places < side] * masks.shape[dim] / side).long().clamp(max=masks.shape[dim] - 1)


def _evenly(count: int, most: int) -> Tensor:
    """Choose at most so many of a number of rows, evenly spread."""
    return torch.arange(count) if count <= most else (torch.arange(most) * count) // most
