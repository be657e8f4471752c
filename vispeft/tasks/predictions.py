"""Prediction of image files: a table row for each image, and pictures if the task draws any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vispeft.data.images import PLAIN, Reading, read_size
from vispeft.data.joint import EvaluationPair
from vispeft.data.masks import IGNORE
from vispeft.data.palettes import make_palette
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import DataError, counted
from vispeft.tasks.inference import Inference
from vispeft.viz import lay_over

__all__ = ["MaskPredictor", "Prediction", "Predictor", "PreparedBeside", "ScorePredictor"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    row: list[str]
    """Cells of the table, after the image's path."""
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Pictures by the folder they belong to."""
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = field(default_factory=dict)
    """Arrays by the folder they belong to, which the predictor names in ``arrays``."""
    finite: bool = True
    """Whether the model's outputs are finite; if not, the cells are empty and masks hold `IGNORE` alone."""


class Predictor(Protocol):
    """How a task predicts images; `AdapterTask.predictor` makes one.

    A predictor may also have ``prepare``, a function of one image that runs where images are read, in a worker process
    and once per image; it must not hold the model. Its results are then given to ``predict_prepared`` instead of images
    to the predictor itself: stacked where they are tensors of floats of one shape, else as a list. With ``least``, a
    height and a width, JPEG files may be decoded at reduced scale.
    """

    table: str
    """File name of the table, ending in ``.csv``."""
    columns: list[str]
    """Names of its columns, after the path."""
    folders: tuple[str, ...]
    """Folders of pictures."""
    at_once: int | None
    """Largest number of images predicted together; None for any."""

    def check(self, paths: Sequence[Path], reading: Reading = PLAIN) -> None:
        """Find images that cannot be predicted, before the first one is.

        Args:
            paths: Readable image files.
            reading: How their pixels become RGB.

        Raises:
            DataError: If there are any.
        """
        ...

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict images.

        Args:
            images: uint8 (3, H, W), of any size each.

        Returns:
            One prediction for each.
        """
        ...


class PreparedBeside:
    """Prepares images for dense tasks, and gives each beside its own pixels, in whose size it is predicted."""

    def __init__(self, preprocessing: Preprocessing, whole: bool, short_side: int | None) -> None:
        """Store the steps; see `EvaluationPair`.

        Args:
            preprocessing: Source of size, interpolation, mean and standard deviation.
            whole: Whether to keep the image's aspect ratio.
            short_side: With `whole`, the shorter side of the result in pixels; None keeps the image's size.
        """
        self.pair = EvaluationPair(preprocessing, whole, short_side)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (3, H, W), and the prepared one (3, h, w).

        Args:
            image: The image.
        """
        return image, self.pair(image, torch.zeros(image.shape[-2:], dtype=torch.uint8))[0]


class ScorePredictor:
    """Predicts one row of values for each image: a class, labels, or numbers."""

    table = "predictions.csv"
    folders: tuple[str, ...] = ()
    at_once: int | None = None

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        row: Callable[[Tensor], list[str]],
        columns: list[str],
        notes: Mapping[str, Any],
    ) -> None:
        """Combine the parts.

        Args:
            predict: Computes values (B, outputs) of normalised images (B, 3, H, W) on the CPU.
            row: Turns the values of one image (outputs,) into cells.
            columns: Names of the cells.
            notes: Notes of the adapter, which say how images are prepared.
        """
        self._predict, self._row, self.columns = predict, row, columns
        preprocessing = Preprocessing.from_dict(notes["preprocessing"])
        self.prepare: Callable[[Tensor], Tensor] = preprocessing.transform()
        self.least = preprocessing.least

    def check(self, paths: Sequence[Path], reading: Reading = PLAIN) -> None:
        """Accept all: images of any size are resized."""

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict images."""
        return self.predict_prepared(torch.stack([self.prepare(image) for image in images]))

    def predict_prepared(self, images: Tensor) -> list[Prediction]:
        """Predict prepared images.

        Args:
            images: Normalised images (B, 3, H, W).
        """
        values = self._predict(images).cpu()
        nothing = Prediction([""] * len(self.columns), finite=False)
        return [Prediction(self._row(row)) if row.isfinite().all() else nothing for row in values]


class MaskPredictor:
    """Predicts a mask of the size of each image: index PNG, overlay, and the pixels of each class in the table."""

    table = "areas.csv"
    folders: tuple[str, ...] = ("masks", "overlays")
    at_once: int | None = 1

    def __init__(
        self,
        predict: Callable[[Tensor, tuple[int, ...]], Tensor],
        inference: Inference,
        names: Sequence[str],
        notes: Mapping[str, Any],
    ) -> None:
        """Combine the parts.

        Args:
            predict: Computes masks (B, h, w) of normalised images (B, 3, H, W) on the CPU, for a height and width.
            inference: How it does so.
            names: Names of the classes.
            notes: Notes of the adapter, which say how images are prepared and classes are coloured.
        """
        output = notes.get("output") or {}
        self._predict, self._inference, self.columns = predict, inference, list(names)
        self._colours = [tuple(colour) for colour in output.get("palette") or make_palette(len(names))]
        whole, short_side = output.get("evaluation") == "whole", output.get("short_side")
        self.prepare = PreparedBeside(Preprocessing.from_dict(notes["preprocessing"]), whole, short_side)

    def check(self, paths: Sequence[Path], reading: Reading = PLAIN) -> None:
        """Find images smaller than the sliding window; those that cannot be read are left to the reading.

        Raises:
            DataError: If there are any.
        """
        window = self._inference.window
        if self._inference.mode != "slide":
            return
        small = []
        for path in paths:
            with contextlib.suppress(DataError):
                if min(self.prepare.pair.size_of(*read_size(path, reading))) < window:
                    small.append(str(path))
        if small:
            raise DataError(
                f"{len(small)} of {counted(len(paths), 'image')} {'is' if len(small) == 1 else 'are'} smaller than the "
                f"sliding window of {window} pixels that the run was trained with: {', '.join(small[:5])}"
                f"{' and more' if len(small) > 5 else ''}. Nothing was predicted; enlarge or remove them."
            )

    def __call__(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict images one by one, since their sizes differ."""
        return self.predict_prepared([self.prepare(image) for image in images])

    def predict_prepared(self, images: Sequence[tuple[Tensor, Tensor]]) -> list[Prediction]:
        """Predict images one by one.

        Args:
            images: Results of `prepare`.
        """
        return [self._one(image, prepared) for image, prepared in images]

    def _one(self, image: Tensor, prepared: Tensor) -> Prediction:
        size = tuple(image.shape[-2:])
        mask = self._predict(prepared[None], size)[0].cpu()
        overlay = Image.fromarray(lay_over(image, mask, self._colours).permute(1, 2, 0).numpy())
        labelled = mask[mask != IGNORE]
        counts = torch.bincount(labelled, minlength=len(self.columns))
        cells = list(map(str, counts.tolist())) if len(labelled) else [""] * len(counts)
        pictures = {"masks": self._index_image(mask), "overlays": overlay}
        return Prediction(cells, pictures, finite=len(labelled) > 0)

    def _index_image(self, mask: Tensor) -> Image.Image:
        """Create a palette image of class indices, of which there are at most 255."""
        image = Image.fromarray(mask.numpy().astype(np.uint8))
        image.putpalette([value for colour in self._colours for value in colour])
        return image
