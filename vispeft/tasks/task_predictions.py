"""Prediction of image files by several dense tasks: files of each task, a strip, and a table row per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.images import PLAIN, Reading
from vispeft.data.preprocessing import Preprocessing
from vispeft.tasks.dense_outputs import decode
from vispeft.tasks.predictions import Prediction, PreparedBeside
from vispeft.viz import dense_picture
from vispeft.viz.strips import palette_of, value_range

__all__ = ["TaskPredictor", "written_folders"]

STRIPS = "strips"
"""Folder of the pictures that show an image beside all predictions."""
MILLIMETRES = "_mm"
"""What is added to the name of a task of depth, for the folder of its 16-bit pictures."""
NUMBERS = ("depth", "values")
"""Kinds whose values are written as they are, as a NumPy array in float32, with a picture."""


def written_folders(targets: Mapping[str, DenseTarget]) -> tuple[str, ...]:
    """Return the folders of predictions: one per task, one more per task of depth, and that of strips.

    Args:
        targets: Kind of each task.
    """
    return (*targets, *(task + MILLIMETRES for task, target in targets.items() if target.kind == "depth"), STRIPS)


class TaskPredictor:
    """Predicts all tasks at the size of each image.

    Writes a folder per task: PNG of class indices, 8-bit PNG of probabilities (saliency, edge), RGB of normals, and for
    depth and other values the numbers themselves (``.npy``, float32) and a picture. Depth is also written as 16-bit PNG
    in millimetres (folder ``TASK_mm``), with 0 where a pixel is not above 0 or beyond 65.535 metres. The table has the
    pixels of each class, and the mean of other predictions.
    """

    table = "predictions.csv"
    at_once: int | None = 1

    def __init__(
        self,
        outputs: Callable[[Tensor, tuple[int, ...]], dict[str, Tensor]],
        targets: Mapping[str, DenseTarget],
        notes: Mapping[str, Any],
    ) -> None:
        """Combine the parts.

        Args:
            outputs: Computes outputs (B, K, h, w) by task, on the CPU, of normalised images (B, 3, H, W) for a height
                and width.
            targets: Kind of each task.
            notes: Notes of the adapter, which say how images are prepared.
        """
        self._outputs, self._targets = outputs, targets
        self.columns = [column for task, target in targets.items() for column in _columns(task, target)]
        self.folders: tuple[str, ...] = written_folders(targets)
        self.arrays: tuple[str, ...] = tuple(task for task, target in targets.items() if target.kind in NUMBERS)
        output = notes.get("output") or {}
        whole, short_side = output.get("evaluation") == "whole", output.get("short_side")
        self.prepare = PreparedBeside(Preprocessing.from_dict(notes["preprocessing"]), whole, short_side)

    def check(self, paths: Sequence[Path], reading: Reading = PLAIN) -> None:
        """Accept all: images of any size are predicted whole."""

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
        outputs = {task: values[0].float() for task, values in self._outputs(prepared[None], size).items()}
        if not all(values.isfinite().all() for values in outputs.values()):
            return Prediction([""] * len(self.columns), finite=False)
        found = {task: decode(self._targets[task], values[None])[0] for task, values in outputs.items()}
        ranges = {task: value_range(found[task]) if task in self.arrays else (0.0, 1.0) for task in found}
        drawn = {task: dense_picture(self._targets[task], values, ranges[task]) for task, values in found.items()}
        pictures = {task: self._file(task, found[task], drawn[task]) for task in found}
        strip = torch.cat([image, *drawn.values()], dim=2)
        row = [cell for task, values in found.items() for cell in _cells(self._targets[task], values)]
        depths = {task: found[task][0] for task, target in self._targets.items() if target.kind == "depth"}
        pictures |= {task + MILLIMETRES: _millimetres(values) for task, values in depths.items()}
        arrays = {task: found[task][0].numpy().astype(np.float32) for task in self.arrays}
        return Prediction(row, {**pictures, STRIPS: _rgb(strip)}, arrays)

    def _file(self, task: str, values: Tensor, drawn: Tensor) -> Image.Image:
        """Create the picture of a task: one whose pixels are the prediction, where 8 bits can hold it."""
        target = self._targets[task]
        if target.kind == "classes":
            image = Image.fromarray(values.numpy().astype(np.uint8))
            image.putpalette([part for colour in palette_of(target) for part in colour])
            return image
        if target.kind in ("saliency", "edge"):
            return Image.fromarray((values[0] * 255).round().to(torch.uint8).numpy())
        return _rgb(drawn)


def _rgb(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _millimetres(depth: Tensor) -> Image.Image:
    """Write depth (h, w) in metres as millimetres in 16 bits; 0, which stands for none, where they cannot hold it."""
    whole = (depth.double() * 1000).round()
    return Image.fromarray(whole.where((whole > 0) & (whole < 2**16), 0).numpy().astype(np.uint16))


def _columns(task: str, target: DenseTarget) -> list[str]:
    if target.kind == "classes":
        return [f"{task}: {name}" for name in target.class_names]
    return [] if target.kind == "normals" else [f"{task}: mean"]


def _cells(target: DenseTarget, values: Tensor) -> list[str]:
    if target.kind == "classes":
        return list(map(str, torch.bincount(values.flatten(), minlength=len(target.class_names)).tolist()))
    return [] if target.kind == "normals" else [f"{float(values.mean()):.6g}"]
