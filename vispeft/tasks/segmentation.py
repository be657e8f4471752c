"""Semantic segmentation: a class for every pixel, by a decoder on the maps of an adapted backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.core.method import Method
from vispeft.data.base import ImageData
from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError, DataError, VerificationError
from vispeft.heads import decoder as make_decoder
from vispeft.heads.pyramid import BEHIND_MAPS, DensePyramid, MapReader
from vispeft.metrics import BoundaryF, SegmentationScores
from vispeft.storage.files import DECODER, check_tensors, read_decoder
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.inference import Inference, padded_to, predict_masks
from vispeft.tasks.losses import SegmentationLoss
from vispeft.tasks.supervised import check_target
from vispeft.viz import bars, confusion_matrix, overlay_grid

__all__ = ["Segmentation", "SegmentationNetwork"]

Batch = tuple[Tensor, Tensor]
"""Normalised images (B, 3, H, W), and masks (B, h, w) of class indices, with `IGNORE` where nobody knows."""

EXAMPLES = 4
"""Images of a split that are kept for pictures."""


class SegmentationNetwork(nn.Module):
    """Backbone, map reader and decoder in one module: images in, class scores per pixel out."""

    def __init__(self, model: nn.Module, reader: MapReader, decoder: nn.Module) -> None:
        """Put the parts together.

        Args:
            model: The backbone, adapted or merged.
            reader: Reads its maps.
            decoder: Turns maps into scores.
        """
        super().__init__()
        self.model, self.reader, self.decoder = model, reader, decoder

    def forward(self, images: Tensor) -> Tensor:
        """Compute class scores (B, classes, H, W), resized bilinearly to the images.

        Args:
            images: Normalised images (B, 3, H, W) of any size; they are padded to whole patches inside.
        """
        return _pixel_scores(self.model, self.reader, self.decoder, images)


def _pixel_scores(model: nn.Module, reader: MapReader, decoder: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    padded = padded_to(images, reader.divisor)
    scores = decoder(reader(model, padded))
    if scores.shape[-2:] != padded.shape[-2:]:
        scores = F.interpolate(scores, padded.shape[-2:], mode="bilinear", align_corners=False)
    return cast(Tensor, scores[..., :height, :width])


class Segmentation(AdapterTask):
    """A class for every pixel, trained with cross entropy and, where asked for, Dice, Lovász or hard pixels.

    The adapter acts inside the frozen backbone; map reader and decoder train beside it and are stored with it. Logs the
    loss of training, and of validation the mean IoU and Dice, the mean accuracy of the classes, and the share of
    pixels that are right. A test also gives these figures per class.
    """

    target: ClassVar[str] = "mask"
    classifies: ClassVar[bool] = False
    monitor = "validation/miou"

    def __init__(
        self,
        *,
        method: Method,
        decoder: str = "segformer",
        decoder_args: dict[str, Any] | None = None,
        taps: list[int] | None = None,
        levels: Literal["taps", "vitdet"] = "taps",
        losses: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        ohem_thresh: float = 0.7,
        ohem_min_kept: int = 100_000,
        decoder_lr: float | None = None,
        inference: Inference | None = None,
        absent: Literal["skip", "zero"] = "skip",
        boundary: bool = False,
        backbone_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter, make the decoder, and verify that all of it trains.

        Args:
            method: The adapter.
            decoder: Name of the decoder; see `vispeft.heads.list_decoders`.
            decoder_args: Its options.
            taps: Blocks of a ViT or stages of a Swin whose maps are read; None takes four blocks, or all stages.
            levels: Hand the maps on as they are, or make a pyramid out of a plain ViT's last one.
            losses: Weight of each loss: cross_entropy, dice, lovasz, ohem; None takes cross entropy alone.
            class_weights: How much each class counts in the cross entropy, and in that of hard pixels.
            ohem_thresh: Probability of the own class below which a pixel is hard in any case, for the loss ohem.
            ohem_min_kept: How many pixels per image count in the loss ohem at least; the default of mmsegmentation, for
                crops of 512 pixels, is more than the whole of a crop of 224.
            decoder_lr: Highest learning rate of map reader and decoder; None takes `lr`.
            inference: How masks are computed outside of training; None takes whole images as they are.
            absent: What a class that occurs in no mask and no prediction counts in a mean: nothing (``skip``, as in
                mmsegmentation), or zero (as in multi-task papers).
            boundary: Measure the boundary F1 too.
            backbone_args: Further arguments of ``timm.create_model``; the backbone takes images of any size unless
                they say otherwise.
            settings: Those of `AdapterTask`.

        Raises:
            ConfigError: If a setting is out of range, the decoder is not known or cannot read these maps, or the
                method changes no map.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient through the maps.
        """
        if not method.reaches_maps:
            raise ConfigError(
                f"{method.name} changes the backbone's last feature and no map inside it, which is all that a decoder "
                "reads. Choose another method, such as lora, ssf or adaptformer."
            )
        if decoder_lr is not None and not (decoder_lr > 0 and math.isfinite(decoder_lr)):
            raise ConfigError(f"Segmentation(decoder_lr={decoder_lr}): a finite number above 0 is needed.")
        loss = SegmentationLoss(
            losses or {"cross_entropy": 1.0},
            class_weights=class_weights,
            ohem_thresh=ohem_thresh,
            ohem_min_kept=ohem_min_kept,
        )
        super().__init__(method=method, backbone_args={"flexible_size": True, **(backbone_args or {})}, **settings)
        self.decoder_name, self.decoder_args, self.decoder_lr = decoder, dict(decoder_args or {}), decoder_lr
        self.reader = MapReader(self.model, taps, levels)
        self.decoder = make_decoder(decoder, self.reader.channels, self.num_classes, **self.decoder_args)
        self._try_maps()
        self.verify()
        loss.check(self.num_classes)
        self.loss = loss
        self.inference = inference or Inference()
        self.scores = nn.ModuleDict(
            {split: SegmentationScores(self.num_classes, absent=absent) for split in ("validation", "test")}
        )
        self.boundary = BoundaryF(self.num_classes, absent=absent) if boundary else None
        self.examples: list[dict[str, Tensor]] = []

    def verify(self) -> None:
        """Check that every trainable tensor of the adapter receives a gradient through the maps that are read."""
        try:
            self.bank.verify(DensePyramid(self.model, self.reader.taps), BEHIND_MAPS)
        except VerificationError as error:
            found = str(error).partition(". The model does not use")[0]
            raise VerificationError(
                f"Through the maps at taps {self.reader.taps}, {found[0].lower()}{found[1:]}. What lies behind the "
                "last tap cannot train: add the last block or stage to taps, or limit the method by blocks."
            ) from error

    def _try_maps(self) -> None:
        """Run one small image through, so that a decoder that cannot read these maps is refused now."""
        size = self.preprocessing.size if self._one_size() else (self.reader.divisor * 2,) * 2
        image = torch.zeros(1, 3, *size, dtype=self.base_dtype)
        modes = {module: module.training for module in self.modules()}
        with torch.no_grad():
            self.network().eval()(image)
        for module, mode in modes.items():
            module.training = mode

    def _one_size(self) -> bool:
        return bool(getattr(getattr(self.model, "patch_embed", None), "strict_img_size", False))

    def network(self) -> SegmentationNetwork:
        """Give backbone, map reader and decoder as one module, which shares their tensors."""
        return SegmentationNetwork(self.model, self.reader, self.decoder)

    def deployed(self) -> nn.Module:
        """Give what is exported: images in, class scores per pixel out."""
        return self.network()

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute class scores (B, classes, H, W) in float32.

        Args:
            images: Normalised images (B, 3, H, W).
        """
        assert isinstance(images, Tensor)
        return _pixel_scores(self.model, self.reader, self.decoder, images.to(self.base_dtype)).float()

    # ------------------------------------------------------------------ data

    def check_data(self, data: Any) -> None:
        """Check that data fit the task and the model, as far as they say.

        Args:
            data: A data module.

        Raises:
            DataError: If targets, class count, image sizes or batch size do not fit.
        """
        check_target(type(self), data)
        super().check_data(data)
        self._check_batches(data)
        smallest = getattr(data, "smallest_size", None)
        if self.inference.mode == "slide" and smallest is not None and min(smallest) < self.inference.window:
            raise DataError(
                f"The smallest image has {smallest[0]} x {smallest[1]} pixels, and the sliding window has "
                f"{self.inference.window}. Make inference.window smaller, or take inference.mode=whole."
            )

    def _check_batches(self, data: Any) -> None:
        """Find a last training batch that BatchNorm could not be trained on, which would end an epoch's work."""
        if not isinstance(data, ImageData):
            return
        last = 0 if data.drop_last else len(data.split("train")) % data.batch_size  # type: ignore[arg-type]
        fewest, least = last or data.batch_size, self.decoder.least_batch
        if fewest < least:
            raise DataError(
                f"A training batch of each epoch has {fewest} image, and the decoder {self.decoder_name!r} needs "
                f"{least} for its BatchNorm. Set data.drop_last, or another data.batch_size."
            )

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        images, masks = batch
        loss = cast(Tensor, self.loss(self(images), masks))
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(masks))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._measure("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the test split."""
        self._measure("test", batch)

    def _measure(self, split: str, batch: Batch) -> None:
        images, masks = batch
        found = self.predict(images, tuple(masks.shape[-2:]))
        cast(SegmentationScores, self.scores[split]).update(found, masks)
        if self.boundary is not None:
            self.boundary.update(found, masks)
        for image, mask, prediction in zip(images, masks, found, strict=True):
            if len(self.examples) < EXAMPLES:
                parts = {"image": image, "mask": mask, "prediction": prediction}
                self.examples.append({name: tensor.detach().cpu() for name, tensor in parts.items()})

    def predict(self, images: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Compute masks (B, h, w) of class indices.

        Args:
            images: Normalised images (B, 3, H, W).
            size: Height and width of the masks; None for those of the images.
        """
        return predict_masks(self, images, self.inference, cast("tuple[int, int] | None", size))

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Give masks (B, H, W) of class indices."""
        return self.predict(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._begin("validation")

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._begin("test")

    def _begin(self, split: str) -> None:
        self.examples = []
        cast(SegmentationScores, self.scores[split]).reset()
        if self.boundary is not None:
            self.boundary.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation split."""
        self._log_scores("validation")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test split."""
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        figures = dict(cast(SegmentationScores, self.scores[split]).compute())
        if self.boundary is not None:
            figures["boundary_f"] = self.boundary.compute()
        self.log_dict({f"{split}/{name}": value for name, value in figures.items()})

    # ------------------------------------------------------------------ results

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Give IoU, accuracy and Dice of each class of the test split; None for one that does not occur."""
        if split != "test":
            return {}
        by_figure = cast(SegmentationScores, self.scores[split]).per_class()
        return {
            f"test_{figure}_per_class": {
                name: None if math.isnan(value) else value for name, value in zip(names, values.tolist(), strict=True)
            }
            for figure, values in by_figure.items()
        }

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw IoU per class, the confusion of pixels, and some images with their masks."""
        scores = cast(SegmentationScores, self.scores["test"])
        by_figure = {figure: values.tolist() for figure, values in scores.per_class().items()}
        iou, right = ({n: v for n, v in zip(names, by_figure[f], strict=True) if v == v} for f in ("iou", "acc"))
        bars(iou, right, folder / "iou_per_class.png", label="IoU", mark_label="share of its pixels found")
        confusion_matrix(scores.confusion, names, folder / "confusion_matrix.png")
        self.draw_examples(folder / "overlays_test.png", names)

    def draw_epoch(self, folder: Path, epoch: int) -> None:
        """Draw some validation images with their masks and predictions."""
        self.draw_examples(folder / f"overlays_epoch_{epoch + 1:03d}.png")

    def draw_examples(self, path: Path, names: Sequence[str] | None = None) -> None:
        """Draw the first images of the split that was measured last, with their masks and predictions.

        Args:
            path: The PNG file.
            names: Names of the classes; None takes those of the data, or numbers where they have none.
        """
        if not self.examples:
            return
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        preprocessing = getattr(data, "preprocessing", self.preprocessing)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        pictures = []
        for example in self.examples:
            image = (example["image"].float() * std + mean).clamp(0, 1)
            size = example["mask"].shape[-2:]
            if image.shape[-2:] != size:
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            pictures.append((image * 255).round().to(torch.uint8))
        masks, predictions = ([example[name] for example in self.examples] for name in ("mask", "prediction"))
        names = names or getattr(data, "class_names", None) or [str(index) for index in range(self.num_classes)]
        overlay_grid(pictures, masks, predictions, getattr(data, "palette", None), names, path)

    # ------------------------------------------------------------------ files

    def further_groups(self) -> list[dict[str, Any]]:
        """Give groups for map reader and decoder: matrices decay, vectors do not."""
        trained = [*self.reader.parameters(), *self.decoder.parameters()]
        lr = self.decoder_lr or self.lr
        return [
            {
                "params": [p for p in trained if (p.ndim > 1) == decays],
                "lr": lr,
                "weight_decay": self.weight_decay if decays else 0.0,
                "name": f"decoder {'decay' if decays else 'no_decay'}",
            }
            for decays in (True, False)
        ]

    def output(self) -> dict[str, Any]:
        """Say how outputs are read, for the adapter's file."""
        levels = "taps" if self.reader.levels is None else "vitdet"
        reader = {"taps": list(self.reader.taps), "levels": levels}
        return {
            "target": self.target,
            "decoder": {"name": self.decoder_name, "args": self.decoder_args, **reader},
            "ignore": IGNORE,
        }

    def head_tensors(self) -> dict[str, Tensor]:
        """Give the tensors of map reader and decoder under their names in files."""
        return {f"{DECODER}{key}": tensor for key, tensor in self._decoder_state().items()}

    def _decoder_state(self) -> dict[str, Tensor]:
        parts = (("reader", self.reader), ("decoder", self.decoder))
        return {f"{part}.{key}": tensor for part, module in parts for key, tensor in module.state_dict().items()}

    def take(self, units: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a saved adapter, and those of map reader and decoder where they are given."""
        self.bank.load_state_dict(units)
        if head:
            self.load_decoder({key.removeprefix(DECODER): tensor for key, tensor in head.items()})

    def load_decoder(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into map reader and decoder.

        Args:
            tensors: As `files.read_decoder` gives them.

        Raises:
            FileError: If one is missing, unknown, of another shape, or not finite; nothing is copied then.
        """
        check_tensors(self._decoder_state(), tensors)
        for part, module in (("reader.", self.reader), ("decoder.", self.decoder)):
            module.load_state_dict({k.removeprefix(part): t for k, t in tensors.items() if k.startswith(part)})

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter, and map reader and decoder beside it.

        Args:
            path: Its directory.
        """
        self.bank.save(path, decoder=self._decoder_state())

    def load_adapter(self, path: str | Path) -> None:
        """Replace adapter, map reader and decoder by saved ones.

        Args:
            path: Their directory.
        """
        super().load_adapter(path)
        self.load_decoder(read_decoder(path))
