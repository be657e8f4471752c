"""Dense tasks: predictions for every pixel, by decoders on the maps of an adapted backbone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.core.method import Method
from vispeft.core.modes import evaluating
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, DataError, VerificationError, check_object, counted
from vispeft.heads.pyramid import BEHIND_MAPS, DensePyramid, MapReader
from vispeft.tasks.inference import Inference, padded_to
from vispeft.tasks.parts import PartsTask
from vispeft.tasks.supervised import check_target

__all__ = ["DenseNetwork", "DenseTask"]

LAST_NORM = "final_norm"
"""Role of the backbone's last norm, which decoders with norms of their own do not read."""
EXAMPLES = 4
"""Number of images per split kept for plots."""


class DenseNetwork(nn.Module):
    """Base of the networks of dense tasks: backbone, map reader and decoders in one module."""

    def __init__(self, model: nn.Module, reader: MapReader) -> None:
        """Combine the parts.

        Args:
            model: The backbone, adapted or merged.
            reader: The reader of its maps.
        """
        super().__init__()
        self.model, self.reader = model, reader

    @property
    def pads_to(self) -> int:
        """Number whose multiples height and width are padded to."""
        return self.reader.divisor

    def padded(self, images: Tensor) -> Tensor:
        """Pad images (B, 3, H, W) to whole cells of the coarsest map.

        Args:
            images: Normalised images of any size.
        """
        return padded_to(images, self.reader.divisor)

    @staticmethod
    def fitted(scores: Tensor, padded: Tensor, images: Tensor) -> Tensor:
        """Resize a decoder's output (B, K, h, w) bilinearly to the padded images, and cut it to the images.

        Args:
            scores: The output.
            padded: The padded images (B, 3, H', W').
            images: The images (B, 3, H, W).
        """
        if scores.shape[-2:] != padded.shape[-2:]:
            scores = F.interpolate(scores, padded.shape[-2:], mode="bilinear", align_corners=False)
        return scores[..., : images.shape[-2], : images.shape[-1]]


class DenseTask(PartsTask, ABC):
    """Base of the tasks that predict something for every pixel.

    The adapter acts inside the frozen backbone; a map reader and decoders train with it and are stored with it.
    Subclasses create their decoders after this class has created the map reader, name them in `parts`, return the whole
    `network`, and then call `check_maps`. They define the loss, the measuring of a batch and the figures of a split.
    """

    target: ClassVar[str]
    """Kind of the data's targets."""

    def __init__(
        self,
        *,
        method: Method,
        decoder: str = "segformer",
        decoder_args: dict[str, Any] | None = None,
        taps: list[int] | None = None,
        levels: Literal["taps", "vitdet"] = "taps",
        decoder_lr: float | None = None,
        inference: Inference | None = None,
        backbone_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter, and make the map reader.

        Args:
            method: The adapter.
            decoder: Name of the decoder; see `vispeft.heads.list_decoders`.
            decoder_args: Its options.
            taps: Blocks of a ViT or stages of a Swin whose maps are read; None takes four blocks, or all stages.
            levels: ``taps`` passes the maps on unchanged, ``vitdet`` builds a pyramid from the last map of a plain ViT.
            decoder_lr: Highest learning rate of map reader and decoders; None takes `lr`.
            inference: Inference outside training; None predicts whole images at their size.
            backbone_args: Further arguments of ``timm.create_model``; the backbone takes images of any size unless
                they say otherwise.
            settings: Settings of `AdapterTask`.

        Raises:
            ConfigError: If a setting is out of range, or the method changes no map.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        check_object(type(self).__name__, "method", method, Method)
        check_object(type(self).__name__, "inference", inference, Inference)
        if not method.reaches_maps:
            raise ConfigError(
                f"{method.name} changes the backbone's last feature and no map inside it, which is all that a decoder "
                "reads. Choose another method, such as lora, ssf or adaptformer."
            )
        if decoder_lr is not None and not (decoder_lr > 0 and math.isfinite(decoder_lr)):
            raise ConfigError(f"{type(self).__name__}(decoder_lr={decoder_lr}): a finite number above 0 is needed.")
        super().__init__(method=method, backbone_args={"flexible_size": True, **(backbone_args or {})}, **settings)
        self.decoder_name, self.decoder_args, self.parts_lr = decoder, dict(decoder_args or {}), decoder_lr
        self.inference = inference or Inference()
        self.reader = MapReader(self.model, taps, levels)
        self.examples: list[dict[str, Tensor]] = []

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def network(self) -> nn.Module:
        """Backbone, map reader and decoders as one module, which shares their tensors: images in, predictions out."""

    @abstractmethod
    def training_loss(self, output: Any, labels: Any) -> Tensor:
        """Compute the loss of a training batch.

        Args:
            output: The result of `forward`.
            labels: The labels of the batch.
        """

    @abstractmethod
    def measure(self, split: str, images: Tensor, labels: Any) -> None:
        """Measure a batch: update the metrics, count broken outputs, keep examples.

        Args:
            split: validation or test.
            images: Normalised images (B, 3, H, W).
            labels: The labels of the batch.
        """

    @abstractmethod
    def reset_metrics(self, split: str) -> None:
        """Reset the metrics of a split.

        Args:
            split: validation or test.
        """

    @abstractmethod
    def figures(self, split: str) -> Mapping[str, Tensor]:
        """Compute the figures of a split by name; NaN for one that was not measured.

        Args:
            split: validation or test.
        """

    @abstractmethod
    def predict(self, images: Tensor, size: tuple[int, ...] | None = None) -> Any:
        """Compute predictions.

        Args:
            images: Normalised images (B, 3, H, W).
            size: Height and width of the predictions; None for those of the images.
        """

    @abstractmethod
    def draw_examples(self, path: Path) -> None:
        """Draw the kept images of the split that was measured last, with targets and predictions.

        Args:
            path: The PNG file.
        """

    # ------------------------------------------------------------------ checks

    def check_maps(self) -> None:
        """Check that the decoders can read the maps, and that the adapter trains through them.

        Raises:
            ConfigError: If a decoder cannot read these maps.
            VerificationError: If a trainable tensor receives no gradient through the maps.
        """
        self._try_maps()
        self.verify()

    def verify(self) -> None:
        """Check that every trainable tensor of the adapter receives a gradient through the maps that are read."""
        try:
            self.bank.verify(self.maps_network(), BEHIND_MAPS if self.reader.norm else (*BEHIND_MAPS, LAST_NORM))
        except VerificationError as error:
            found = str(error).partition(". The model does not use")[0]
            raise VerificationError(
                f"Through the maps at taps {self.reader.taps}, {found[0].lower()}{found[1:]}. Layers behind the "
                "last tap cannot train: add the last block or stage to taps, or limit the method by blocks."
            ) from error

    def maps_network(self) -> nn.Module:
        """Return the backbone with the maps that decoders read."""
        return DensePyramid(self.model, self.reader.taps, norm=self.reader.norm)

    def probe_size(self) -> tuple[int, int]:
        """Return height and width of a small image that the backbone takes."""
        return self.preprocessing.size if self._one_size() else (self.reader.divisor * 2,) * 2

    def _try_maps(self) -> None:
        """Run one small image through, to refuse now a decoder that cannot read these maps."""
        image = torch.zeros(1, 3, *self.probe_size(), dtype=self.base_dtype)
        with evaluating(self), torch.no_grad():
            self.network().eval()(image)

    def _one_size(self) -> bool:
        return bool(getattr(getattr(self.model, "patch_embed", None), "strict_img_size", False))

    def check_data(self, data: Any) -> None:
        """Check that data fit the task and the model, as far as they are described.

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
        """Refuse a last training batch too small for BatchNorm, which would fail at the end of an epoch."""
        if not isinstance(data, ImageData):
            return
        processes = data.batch_together // data.batch_size
        rest = 0 if data.drop_last else len(data.split("train")) % data.batch_together  # type: ignore[arg-type]
        last = -(-rest // processes)
        modules = [module for part in self.parts().values() for module in part.modules()]
        fewest, least = last or data.batch_size, max(getattr(module, "least_batch", 1) for module in modules)
        if fewest < least:
            each = "" if processes == 1 else f" for each of {processes} processes"
            raise DataError(
                f"A training batch of each epoch has {counted(fewest, 'image')}{each}, and the decoder "
                f"{self.decoder_name!r} needs {least} for its BatchNorm. Set data.drop_last, or another "
                "data.batch_size."
            )

    # ------------------------------------------------------------------ steps

    def output_of(self, images: Tensor | Mapping[str, Tensor], result: Any) -> Any:
        """Compute the output by a pass of its own: the decoders read maps that a run does not hold."""
        return self(images)

    def training_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        output, result = self.answered(images)
        loss = self.with_method_loss(self.training_loss(output, labels), batch, output, result)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self.measure("validation", *batch)

    def test_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> None:
        """Measure a batch of the test split."""
        self.measure("test", *batch)

    def predict_step(self, batch: tuple[Tensor, Any] | Tensor, batch_idx: int) -> Any:
        """Compute the predictions of a batch."""
        return self.predict(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._begin("validation")

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self._begin("test")

    def _begin(self, split: str) -> None:
        self.examples = []
        self.reset_metrics(split)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation split."""
        self._log_figures("validation")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test split."""
        self._log_figures("test")

    def _log_figures(self, split: str) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in self.figures(split).items()})

    # ------------------------------------------------------------------ pictures

    def keep_examples(self, batch: Mapping[str, Tensor]) -> None:
        """Keep the first images of a split for pictures.

        Args:
            batch: Tensors of a batch by name, one row for each image; ``image`` is normalised.
        """
        for rows in zip(*batch.values(), strict=True):
            if len(self.examples) < EXAMPLES:
                example = {name: row.detach().cpu() for name, row in zip(batch, rows, strict=True)}
                self.examples.append(example)

    def draw_epoch(self, folder: Path, epoch: int) -> None:
        """Draw some validation images with targets and predictions."""
        self.draw_examples(folder / f"overlays_epoch_{epoch + 1:03d}.png")

    def example_image(self, example: Mapping[str, Tensor], size: tuple[int, ...]) -> Tensor:
        """Undo the normalisation of a kept image.

        Args:
            example: One of `examples`.
            size: Height and width of the picture.

        Returns:
            uint8 (3, h, w).
        """
        image = example["image"].float()
        if image.shape[-2:] != size:
            image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        return self.as_picture(image)

    # ------------------------------------------------------------------ files

    def deployed(self) -> nn.Module:
        """Module to export: normalised images in, predictions per pixel out."""
        return self.network()

    def size_step(self) -> tuple[int, int]:
        """Divisors of the height and width of images: the cell size of the coarsest map in pixels."""
        return self.reader.divisor, self.reader.divisor

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        levels = "taps" if self.reader.levels is None else "vitdet"
        reader = {"taps": list(self.reader.taps), "levels": levels}
        decoder = {"name": self.decoder_name, "args": self.decoder_args, **reader}
        return {"target": self.target, "decoder": decoder, "inference": self.inference.to_dict()}
