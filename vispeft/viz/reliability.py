"""Reliability diagrams: accuracy of a model against its confidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import DataError
from vispeft.viz.style import COLOURS, SETTINGS, save

__all__ = ["reliability_diagram"]

_LINES = (COLOURS["train"], COLOURS["validation"], COLOURS["note"])


def reliability_diagram(sure: Mapping[str, Tensor], right: Tensor, path: str | Path, bins: int = 15) -> Path:
    """Draw accuracy over predicted probability, in bins of equal width; probabilities that are not finite are left out.

    Args:
        sure: Probability of the predicted class (N,), keyed by the name of its line; at most three.
        right: Whether the prediction is correct (N,).
        path: The PNG file.
        bins: Number of bins.

    Returns:
        The PNG file.

    Raises:
        DataError: If there are no predictions.
        FileError: If the picture cannot be written.
    """
    if not len(right):
        raise DataError("There are no predictions to draw a reliability diagram of.")
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=COLOURS["note"], linewidth=1, linestyle=":", label="as sure as right")
        for (name, given), colour in zip(sure.items(), _LINES, strict=False):
            known = given.isfinite()
            values, hits = given[known], right[known]
            bin_of = (values.float() * bins).long().clamp(max=bins - 1)
            counts = torch.bincount(bin_of, minlength=bins)
            filled = counts > 0
            means = [torch.bincount(bin_of, weights=v.double(), minlength=bins) / counts for v in (values, hits)]
            points = [mean[filled].tolist() for mean in means]
            axes.plot(*points, color=colour, label=name, linewidth=1.8, marker="o", markersize=4)
        axes.set(xlabel="probability of the predicted class", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
        axes.legend()
        return save(figure, path)
