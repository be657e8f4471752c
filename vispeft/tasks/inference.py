"""From images to masks: whole images or sliding windows, with test-time augmentation, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.errors import ConfigError, DataError

__all__ = ["Inference", "padded_to", "predict_masks"]

Scores = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in, class scores (B, classes, H, W) out."""

BAND = 2**29
"""Bytes of scores of a row of windows that are held at once; wider images are predicted in slabs of columns."""
CHUNK = 2**26
"""Bytes of resized scores that are computed at once."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How masks are computed in validation, test and prediction.

    A sliding window equals mmsegmentation's ``slide`` mode: windows one stride apart, the last ones moved
    back to the border, their scores averaged where they overlap. Flips and scales act on one view (the image,
    or the window), and class probabilities are then averaged instead of scores.
    """

    mode: Literal["whole", "slide"] = "whole"
    """The whole image at once, or windows."""
    window: int = 512
    """Height and width of a window in pixels."""
    stride: int = 341
    """Pixels from one window to the next; two thirds of the window is customary."""
    flip: bool = False
    """Whether to predict the mirrored image too."""
    scales: tuple[float, ...] = (1.0,)
    """Scales at which images are predicted, relative to their size."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.mode not in ("whole", "slide"):
            raise ConfigError(f"Inference(mode={self.mode!r}): choose 'whole' or 'slide'.")
        if self.window < 1 or not 1 <= self.stride <= self.window:
            raise ConfigError(
                f"Inference(window={self.window}, stride={self.stride}): the stride is from 1 to the window, or pixels "
                "between windows would be left out."
            )
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"Inference(scales={self.scales}): give numbers above 0, such as (0.75, 1.0, 1.25).")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that matter as plain values: window and stride only with windows."""
        windows = {"window": self.window, "stride": self.stride} if self.mode == "slide" else {}
        return {"mode": self.mode, **windows, "flip": self.flip, "scales": list(self.scales)}

    @property
    def plain(self) -> bool:
        """Whether there is no augmentation: one scale of 1, no flip."""
        return not self.flip and self.scales == (1.0,)


@torch.no_grad()
def predict_masks(scores: Scores, images: Tensor, inference: Inference, size: tuple[int, int] | None = None) -> Tensor:
    """Compute the likeliest class of every pixel.

    Memory does not grow with the image times the classes. With windows, only the scores of one row of windows are held,
    in slabs of columns of up to `BAND` bytes: each band of rows is decided as soon as no further window covers it.
    Windows that reach into two slabs are computed for both. Scores are resized a few rows at a time.

    Args:
        scores: The model.
        images: (B, 3, H, W).
        inference: The settings.
        size: Height and width of the masks, to which scores are resized bilinearly; None for those of the images.

    Returns:
        Class indices (B, h, w), int64.

    Raises:
        DataError: If an image is smaller than the window.
    """
    height, width = images.shape[-2:]
    wanted = (height, width) if size is None else tuple(size)
    if inference.mode == "whole":
        found = _seen(scores, images, inference)
        if wanted == (height, width):
            return found.argmax(1)
        rows, columns = _between(height, wanted[0]), _between(width, wanted[1])
        return torch.cat(list(_resized(iter([found]), rows, columns, True)), dim=1)
    if min(height, width) < inference.window:
        raise DataError(
            f"An image of {height} x {width} pixels was given, and the sliding window has {inference.window}. Make "
            "inference.window smaller, the images larger, or take inference.mode=whole."
        )
    return _slid(scores, images, inference, wanted)


def _slid(scores: Scores, images: Tensor, inference: Inference, wanted: tuple[int, ...]) -> Tensor:
    """Compute masks (B, h, w) by windows, slab by slab."""
    height, width = images.shape[-2:]
    window = inference.window
    # The first window is computed here, since its scores say how many classes there are.
    first = [_seen(scores, images[..., :window, :window], inference)]
    fitting = max(window, BAND // (first[0][..., 0].numel() * first[0].element_size()))
    count = -(-width // fitting)
    rows, columns = _between(height, wanted[0]), _between(width, wanted[1])
    masks = torch.empty(len(images), *wanted, dtype=torch.long, device=first[0].device)
    for slab in torch.arange(wanted[1]).tensor_split(min(count, wanted[1])):
        start, end = int(slab[0]), int(slab[-1]) + 1
        if wanted == (height, width):
            bands = _bands(scores, images, inference, (start, end), first)
            found: Iterator[Tensor] = (band.argmax(1) for band in bands)
        else:
            sides = (int(columns.first[start]), int(columns.second[end - 1]) + 1)
            bands = _bands(scores, images, inference, sides, first)
            found = _resized(bands, rows, columns.cut(start, end), end - start == wanted[1])
        top = 0
        for decided in found:
            masks[:, top : top + decided.shape[1], start:end] = decided
            top += decided.shape[1]
    return masks


def _seen(scores: Scores, images: Tensor, inference: Inference) -> Tensor:
    """Compute the scores of one view, or the mean of its probabilities under augmentation."""
    if inference.plain:
        return scores(images).float()
    size = tuple(images.shape[-2:])
    total: Tensor | None = None
    for scale in inference.scales:
        scaled = images
        if scale != 1:
            smaller = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, smaller, mode="bilinear", align_corners=False, antialias=scale < 1)
        for flipped in (False, True) if inference.flip else (False,):
            found = scores(scaled.flip(-1) if flipped else scaled).float()
            found = found.flip(-1) if flipped else found
            if tuple(found.shape[-2:]) != size:
                found = F.interpolate(found, size, mode="bilinear", align_corners=False)
            found = found.softmax(1)
            total = found if total is None else total.add_(found)
    assert total is not None
    return total / (len(inference.scales) * (1 + inference.flip))


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along a side; the last window ends with it."""
    count = max(0, -(-(side - window) // stride)) + 1
    return [min(index * stride, side - window) for index in range(count)]


def _windows_over(side: int, starts: list[int], window: int) -> Tensor:
    """Count the windows that cover each place along a side (side,)."""
    count = torch.zeros(side)
    for start in starts:
        count[start : start + window] += 1
    return count


def _bands(
    scores: Scores, images: Tensor, inference: Inference, sides: tuple[int, int], first: list[Tensor]
) -> Iterator[Tensor]:
    """Yield the mean scores of bands of rows (B, classes, rows, columns), from the top; each is valid until the next.

    Args:
        scores: The model.
        images: (B, 3, H, W).
        inference: The settings.
        sides: First column, and the one behind the last.
        first: The scores of the first window, which are taken out; empty if they were.
    """
    height, width = images.shape[-2:]
    window, stride = inference.window, inference.stride
    tops, lefts = _starts(height, window, stride), _starts(width, window, stride)
    rows, columns = _windows_over(height, tops, window), _windows_over(width, lefts, window)[slice(*sides)]
    lefts = [left for left in lefts if left < sides[1] and left + window > sides[0]]
    band: Tensor | None = None
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            if first and (top, left) == (0, 0):
                part = first.pop()
            else:
                part = _seen(scores, images[..., top : top + window, left : left + window], inference)
            if band is None:
                band = part.new_zeros(*part.shape[:2], window, sides[1] - sides[0])
            inside = slice(max(left, sides[0]), min(left + window, sides[1]))
            band[..., inside.start - sides[0] : inside.stop - sides[0]] += part[
                ..., inside.start - left : inside.stop - left
            ]
            del part
        assert band is not None
        done = following - top
        yield band[:, :, :done].div_((rows[top:following, None] * columns).to(band))
        if following < height:
            _shift(band, done)


class _Between(NamedTuple):
    """Places between which values are interpolated along a side, for each new place."""

    first: Tensor
    """The one before, from 0."""
    second: Tensor
    """The one after."""
    share: Tensor
    """Share of the one after, from 0 to 1."""

    def cut(self, start: int, end: int) -> _Between:
        """Keep some of the new places, and count the old ones from the first that they need."""
        first, second, share = (part[start:end] for part in self)
        return _Between(first - first[0], second - first[0], share)


def _between(side: int, wanted: int) -> _Between:
    """Place the points of a side that is resized bilinearly, as `interpolate` does with ``align_corners=False``."""
    places = ((torch.arange(wanted) + 0.5) * (side / wanted) - 0.5).clamp(0, side - 1)
    first = places.long()
    return _Between(first, (first + 1).clamp(max=side - 1), places - first)


def _resized(bands: Iterator[Tensor], rows: _Between, columns: _Between, whole: bool) -> Iterator[Tensor]:
    """Yield the likeliest classes (B, rows, w) of scores that are resized bilinearly, a few rows at a time.

    Args:
        bands: Bands of rows (B, classes, rows, W), from the top.
        rows: The rows of the masks between those of all bands.
        columns: The columns of the masks between those of the bands.
        whole: Whether these are all columns.
    """
    top, before = 0, None
    for band in bands:
        inside = ((rows.second >= top) & (rows.second < top + band.shape[2])).nonzero().flatten()
        left, right, share = (part.to(band.device) for part in columns)
        row = band.shape[0] * band.shape[1] * max(len(left), band.shape[3]) * band.element_size()
        for some in filter(len, inside.split(max(1, CHUNK // row))):
            first, second = rows.first[some] - top, rows.second[some] - top
            above = band[:, :, first.clamp(min=0)]
            if before is not None:
                above[:, :, first < 0] = before
            mixed = above.lerp_(band[:, :, second], rows.share[some, None].to(band))
            if whole:  # equal and faster
                yield F.interpolate(mixed, (len(some), len(left)), mode="bilinear", align_corners=False).argmax(1)
            else:
                sides = (mixed.index_select(3, side) for side in (left, right))
                yield next(sides).lerp_(next(sides), share.to(band)).argmax(1)
        top, before = top + band.shape[2], band[:, :, -1:].clone()


def _shift(band: Tensor, done: int) -> None:
    """Move rows up in place, class by class to avoid a second band, and free the rows below."""
    for plane in band.flatten(0, 1):
        kept = plane[done:].clone()
        plane[: kept.shape[0]] = kept
        plane[kept.shape[0] :] = 0


def padded_to(images: Tensor, divisor: int) -> Tensor:
    """Pad images at the bottom and at the right with zeros, which is the mean colour of normalised ones.

    Args:
        images: (B, 3, H, W).
        divisor: Number that height and width become multiples of.
    """
    below, beside = ((-side) % divisor for side in images.shape[-2:])
    # An exported program keeps the padding, of nothing where nothing is needed, for images of other sizes.
    return F.pad(images, (0, beside, 0, below)) if torch.compiler.is_exporting() or below or beside else images
