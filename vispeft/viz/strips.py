"""Pictures of dense labels and predictions, and strips of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.data.palettes import make_palette
from vispeft.errors import DataError, counted
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.overlays import UNLABELLED, class_legend, colour_mask, stripes
from vispeft.viz.style import save

__all__ = ["dense_picture", "palette_of", "task_strips", "value_range"]

Range = tuple[float, float]
"""Smallest and largest value of a picture, which are drawn dark and bright."""

_PANEL = 2.0
"""Width of one panel in inches."""
_LEGEND_COLUMNS = 5
_NEAR_TO_FAR = "viridis_r"
"""Colours of depth, from near to far; the same for any kind of colour vision."""


def value_range(values: Tensor) -> Range:
    """Find the smallest and the largest value of labels.

    Args:
        values: Depth or values (1, H, W), with `IGNORE` for pixels without a label.

    Returns:
        Both; 0 and 1 if there is no label.
    """
    known = values[(values != IGNORE) & values.isfinite()]
    return (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)


def dense_picture(target: DenseTarget, values: Tensor, within: Range = (0.0, 1.0)) -> Tensor:
    """Draw labels or predictions of one image.

    Classes have their colours, saliency, edges and values are grey, depth is coloured from near to far, and normals are
    red, green and blue by their components from -1 to 1. Pixels without a label are striped in grey.

    Args:
        target: Kind and colours.
        values: As in a batch of `DenseTarget`, without the first axis: (H, W) of classes, else (C, H, W).
        within: Range of depth and values.

    Returns:
        RGB, uint8 (3, H, W).
    """
    values = values.detach().cpu()
    if target.kind == "classes":
        picture, labelled = colour_mask(values, palette_of(target)), values != IGNORE
    else:
        labelled = (values != IGNORE).all(0) & values.isfinite().all(0)
        picture = _coloured(target, torch.where(labelled, values.float(), 0.0), within)
    grey = torch.tensor(UNLABELLED, dtype=torch.uint8).view(3, 1, 1)
    return torch.where(labelled, picture, torch.where(stripes(*labelled.shape), grey, torch.full_like(grey, 255)))


def palette_of(target: DenseTarget) -> Sequence[tuple[int, int, int]]:
    """Return the colours of the classes of a target.

    Args:
        target: A target of classes.
    """
    return target.palette or make_palette(len(target.class_names))


def _coloured(target: DenseTarget, values: Tensor, within: Range) -> Tensor:
    if target.kind == "normals":
        return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    low, high = within
    share = ((values[0] - low) / max(high - low, 1e-12)).clamp(0, 1)
    if target.kind != "depth":
        return (share * 255).round().to(torch.uint8).expand(3, -1, -1)
    colours = matplotlib.colormaps[_NEAR_TO_FAR](share.numpy(), bytes=True)[..., :3]
    return torch.from_numpy(colours.copy()).permute(2, 0, 1)


def task_strips(
    images: Sequence[Tensor],
    labels: Sequence[Mapping[str, Tensor]] | None,
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Mapping[str, DenseTarget],
    path: str | Path,
) -> Path:
    """Draw two rows per image: the image with the label of each task, and below the predictions.

    Depth and values have the range of the label in both rows, without labels that of the prediction.

    Args:
        images: RGB, uint8, each (3, H, W); sizes may differ.
        labels: Labels by task; None draws predictions alone, in one row.
        predictions: Predictions by task.
        targets: Kind of each task, in the order of the columns.
        path: The PNG file to write.

    Returns:
        The PNG file.

    Raises:
        DataError: If there is nothing to draw, or the numbers of images differ.
        FileError: If the picture cannot be written.
    """
    if not 0 < len(images) == len(predictions) == len(labels if labels is not None else predictions):
        raise DataError(
            f"There are {counted(len(images), 'image')} and {counted(len(predictions), 'prediction')}; the same number "
            "of each is needed, at least one, and labels for each or for none."
        )
    rows: list[list[Tensor | None]] = []
    for index, image in enumerate(images):
        rows += _rows(image, labels[index] if labels is not None else None, predictions[index], targets)
    shares = [next(panel.shape[1] / panel.shape[2] for panel in panels if panel is not None) for panels in rows]
    legend = _legend([*(labels or ()), *predictions], targets)
    height = _PANEL * sum(shares) + 0.4 + 0.25 * -(-len(legend) // _LEGEND_COLUMNS)
    names = [*targets, *(name for target in targets.values() for name in target.class_names)]
    with matplotlib.rc_context(settings_for(names, axes_grid=False)):
        figure = Figure(figsize=(_PANEL * (len(targets) + 1), height), layout="constrained")
        grid = figure.subplots(len(rows), len(targets) + 1, squeeze=False, gridspec_kw={"height_ratios": shares})
        for place, panel in zip(grid.flat, chain.from_iterable(rows), strict=True):
            place.axis("off")
            if panel is None:
                place.text(0.95, 0.5, "prediction", ha="right", va="center", fontsize=9, transform=place.transAxes)
            else:
                place.imshow(panel.permute(1, 2, 0).numpy())
        for place, title in zip(grid[0], ("image", *drawn_names(list(targets))), strict=True):
            place.set_title(title, fontsize=9)
        if legend:
            figure.legend(handles=legend, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=7)
        return save(figure, path)


def _rows(
    image: Tensor,
    labels: Mapping[str, Tensor] | None,
    predictions: Mapping[str, Tensor],
    targets: Mapping[str, DenseTarget],
) -> list[list[Tensor | None]]:
    """Draw the panels of one image; None stands for an empty place."""
    ranged = ("depth", "values")
    ranges = {
        task: value_range((labels or predictions)[task]) if target.kind in ranged else (0.0, 1.0)
        for task, target in targets.items()
    }

    def panels(values: Mapping[str, Tensor]) -> list[Tensor | None]:
        return [dense_picture(target, values[task], ranges[task]) for task, target in targets.items()]

    first: list[Tensor | None] = [image.cpu()]
    if labels is None:
        return [first + panels(predictions)]
    return [first + panels(labels), [None, *panels(predictions)]]


def _legend(values: Sequence[Mapping[str, Tensor]], targets: Mapping[str, DenseTarget]) -> list[Patch]:
    entries: list[Patch] = []
    for task, target in targets.items():
        if target.kind == "classes":
            masks = [found[task] for found in values]
            entries += class_legend(masks, palette_of(target), drawn_names(target.class_names))
    return entries
