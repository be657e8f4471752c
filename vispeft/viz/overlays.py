"""Plots of masks: images with their labels and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vispeft.data.masks import IGNORE
from vispeft.data.palettes import Colour, make_palette
from vispeft.errors import DataError, counted
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import save

__all__ = ["class_legend", "colour_mask", "lay_over", "overlay_grid", "stripes"]

OPACITY = 0.6
"""Opacity of a class's colour over the image."""
UNLABELLED: Colour = (128, 128, 128)
"""Colour of unlabelled pixels."""
_STRIPES = 40
"""Number of stripes over unlabelled pixels, counted along height plus width."""
_PANEL = 2.6
"""Width of one panel in inches."""
_LEGEND_ROWS, _LEGEND_COLUMNS = 16, 4
"""Largest legend; a longer one would leave no room for the images."""


def colour_mask(mask: Tensor, palette: Sequence[Colour]) -> Tensor:
    """Colour a mask by its classes.

    Args:
        mask: Class indices, and `IGNORE` for unlabelled pixels (H, W), which become grey.
        palette: Red, green and blue, 0 to 255, per class.

    Returns:
        RGB, uint8 (3, H, W).

    Raises:
        DataError: If the mask has another shape, or a value that is not a class.
    """
    if mask.ndim != 2:
        raise DataError(f"The mask has shape {tuple(mask.shape)}; (height, width) is needed.")
    indices = mask.detach().cpu().long()
    strange = (indices < 0) | ((indices >= len(palette)) & (indices != IGNORE))
    if strange.any():
        raise DataError(
            f"The mask has the value {int(indices[strange][0])}, and there are colours for 0 to {len(palette) - 1}; "
            f"only {IGNORE} may stand for pixels without a label."
        )
    colours = torch.tensor([*palette, UNLABELLED], dtype=torch.uint8)
    return colours[torch.where(indices == IGNORE, len(palette), indices)].permute(2, 0, 1)


def overlay_grid(
    images: Sequence[Tensor] | Tensor,
    labels: Sequence[Tensor] | Tensor,
    predictions: Sequence[Tensor] | Tensor,
    palette: Sequence[Colour] | None,
    class_names: Sequence[str],
    path: str | Path,
) -> Path:
    """Draw a row per image: the image, its label and its prediction, with a legend of the classes below.

    Colours are laid over the image; unlabelled pixels are striped in grey. The legend names the classes that occur,
    those with the most pixels first.

    Args:
        images: RGB, uint8, each (3, H, W); sizes may differ.
        labels: Class indices, or `IGNORE`, each (H, W).
        predictions: Class indices, each (H, W).
        palette: Red, green and blue, 0 to 255, per class; None takes the colours of PASCAL VOC.
        class_names: Names of the classes.
        path: The PNG file to write.

    Returns:
        The PNG file.

    Raises:
        DataError: If there is nothing to draw, or shapes, types or values do not match.
        FileError: If the picture cannot be written.
    """
    colours = tuple(palette or make_palette(len(class_names)))
    _check(images, labels, predictions, colours, class_names)
    rows = [
        (image.cpu(), lay_over(image, label, colours), lay_over(image, prediction, colours))
        for image, label, prediction in zip(images, labels, predictions, strict=True)
    ]
    shares = [image.shape[1] / image.shape[2] for image in images]
    legend = class_legend([*labels, *predictions], colours, drawn_names(class_names))
    height = _PANEL * sum(shares) + 0.3 + 0.25 * -(-len(legend) // _LEGEND_COLUMNS)
    with matplotlib.rc_context(settings_for(class_names, axes_grid=False)):
        figure = Figure(figsize=(3 * _PANEL, height), layout="constrained")
        panels = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": shares})
        for axes, picture in zip(panels.flat, chain.from_iterable(rows), strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.axis("off")
        for axes, title in zip(panels[0], ("image", "label", "prediction"), strict=True):
            axes.set_title(title, fontsize=10)
        figure.legend(handles=legend, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=8)
        return save(figure, path)


def _check(
    images: Sequence[Tensor] | Tensor,
    labels: Sequence[Tensor] | Tensor,
    predictions: Sequence[Tensor] | Tensor,
    colours: Sequence[Colour],
    class_names: Sequence[str],
) -> None:
    """Refuse arguments that cannot be drawn.

    Raises:
        DataError: If there is nothing to draw, or numbers, shapes or types do not match.
    """
    if not len(images) == len(labels) == len(predictions) > 0:
        raise DataError(
            f"There are {counted(len(images), 'image')}, {counted(len(labels), 'label')} and "
            f"{counted(len(predictions), 'prediction')}; the same number of each is needed, at least one."
        )
    if len(colours) != len(class_names):
        raise DataError(f"There are {len(colours)} colours and {len(class_names)} class names.")
    for image, label, prediction in zip(images, labels, predictions, strict=True):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise DataError(f"An image is {image.dtype} of shape {tuple(image.shape)}; uint8 (3, H, W) is needed.")
        for mask in (label, prediction):
            if mask.shape != image.shape[1:]:
                raise DataError(f"A mask of shape {tuple(mask.shape)} lies over an image of {tuple(image.shape[1:])}.")


def lay_over(image: Tensor, mask: Tensor, colours: Sequence[Colour]) -> Tensor:
    """Blend a mask's colours into an image; unlabelled pixels become grey stripes.

    Args:
        image: RGB, uint8 (3, H, W).
        mask: Class indices, or `IGNORE` (H, W).
        colours: Red, green and blue, 0 to 255, per class.

    Returns:
        RGB, uint8 (3, H, W).
    """
    covered = (mask.cpu() != IGNORE) | stripes(*mask.shape)
    painted = (1 - OPACITY) * image.cpu().float() + OPACITY * colour_mask(mask, colours).float()
    return torch.where(covered, painted.round().to(torch.uint8), image.cpu())


def stripes(height: int, width: int) -> Tensor:
    """Mark every second of diagonal stripes, bool (height, width).

    Args:
        height: Rows in pixels.
        width: Columns in pixels.
    """
    lines = torch.arange(height)[:, None] + torch.arange(width)
    return lines * _STRIPES // (height + width) % 2 == 0


def class_legend(masks: Sequence[Tensor], colours: Sequence[Colour], class_names: Sequence[str]) -> list[Patch]:
    """Create legend entries for the classes that occur, most frequent first, and one for unlabelled pixels.

    Args:
        masks: Class indices, or `IGNORE`, each (H, W).
        colours: Red, green and blue, 0 to 255, per class.
        class_names: Names of the classes, as they are drawn.
    """
    pixels = torch.zeros(IGNORE + 1, dtype=torch.long)
    for mask in masks:
        pixels += torch.bincount(mask.detach().cpu().flatten().long(), minlength=IGNORE + 1)
    unlabelled = int(pixels[IGNORE])
    pixels[IGNORE] = 0
    occurring = [int(index) for index in pixels.argsort(descending=True) if pixels[index] > 0]
    shown = occurring[: _LEGEND_ROWS * _LEGEND_COLUMNS]
    entries = [Patch(color=_share(colours[index]), label=class_names[index]) for index in shown]
    if len(shown) < len(occurring):
        entries.append(Patch(color="none", label=f"and {len(occurring) - len(shown)} more"))
    if unlabelled:
        entries.append(Patch(facecolor="white", edgecolor="grey", hatch="/////", label="no label"))
    return entries


def _share(colour: Colour) -> tuple[float, float, float]:
    """Convert a colour to matplotlib's range, 0 to 1."""
    red, green, blue = colour
    return red / 255, green / 255, blue / 255
