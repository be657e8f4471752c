"""Masks: the class of each pixel, read from files as it was written there and never by way of RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vispeft.data.facts import ImageFacts
from vispeft.data.images import UNREADABLE, why
from vispeft.data.listing import ListedSplit
from vispeft.data.palettes import Colour
from vispeft.data.sources import FileSource, JoinedSource, Source
from vispeft.errors import ConfigError, DataError

__all__ = ["IGNORE", "ListedMasks", "MaskCoding", "MaskFacts", "MaskFiles", "read_codes", "reduce_zero_label"]

IGNORE: int = 255
"""Marks pixels without a label; they take no part in losses and scores."""

OUTSIDE = -1
"""Stands for values that are no class."""
CODES = 65_536
"""Values a mask of 16 bits can have."""
KEPT = 1_000
"""Values of one mask that are remembered; index masks have fewer, photos have more."""

STRETCHED = {"L;2": 85, "L;4": 17}
"""Grey PNG of 2 and 4 bits by Pillow's name: it multiplies their values, so that they fill 0 to 255."""


def reduce_zero_label(mask: Tensor) -> Tensor:
    """Take class 0 out: 0 becomes `IGNORE`, every other class one less, and `IGNORE` stays.

    Args:
        mask: Classes from 0, or `IGNORE`, of any shape.
    """
    unlabelled = (mask == 0) | (mask == IGNORE)
    # Beginning from what stays valid, so that 0 - 1 is never asked of an unsigned type.
    return torch.where(unlabelled, torch.full_like(mask, IGNORE), mask.clamp(min=1) - 1)


def read_codes(file: str | Path | BinaryIO) -> np.ndarray:
    """Read what a mask file says about each pixel.

    Args:
        file: A path, or an open file.

    Returns:
        Indices (H, W) of a grey mask of 1 to 16 bits or of one with a palette, which is not looked up; or colours
        (H, W, 3) of an RGB mask, uint8.

    Raises:
        ValueError: If it is of another kind.
    """
    with Image.open(file) as image:
        return _codes(image)


def _codes(image: Image.Image) -> np.ndarray:
    stretched = STRETCHED.get(_raw_mode(image), 1)
    if image.mode == "LA":
        image = image.getchannel("L")
    elif image.mode == "RGBA":
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "P", "I", "RGB") and not image.mode.startswith("I;16"):
        raise ValueError(f"its pixels are {image.mode}; a mask is grey, has a palette, or is RGB")
    codes = np.asarray(image)
    return codes.astype(np.uint8) // stretched if codes.dtype in (bool, np.uint8) else codes


def _raw_mode(image: Image.Image) -> str:
    """Say how grey values are packed in a file that is not read yet."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    return arguments if isinstance(arguments, str) else ""


def pack(colours: np.ndarray) -> np.ndarray:
    """Turn colours (..., 3) into whole numbers 0xRRGGBB (...)."""
    wide = colours.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


# ------------------------------------------------------------------ what values mean


@dataclass(frozen=True, kw_only=True)
class MaskCoding:
    """Says which class a value or a colour of a mask file stands for."""

    num_classes: int
    """Number of classes that come out, at most 255."""
    ids: Mapping[int, int] | None = None
    """Class by value of the file, where they are not the same; 255 for values without a label. Values that are left
    out are an error, besides 255 itself."""
    reduce_zero_label: bool = False
    """Whether 0 stands for pixels without a label, and the classes begin at 1."""
    colours: tuple[Colour, ...] | None = None
    """A colour per class, for masks that are RGB."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: If one of them cannot work.
        """
        if not 1 <= self.num_classes <= IGNORE:
            raise ConfigError(
                f"Masks of {self.num_classes} classes were asked for; 1 to {IGNORE} are possible, because {IGNORE} "
                "marks pixels without a label."
            )
        if self.ids is not None:
            allowed = {*range(self.num_classes + self.reduce_zero_label), IGNORE}
            wrong = {value: index for value, index in self.ids.items() if index not in allowed}
            if wrong or any(not 0 <= value < CODES for value in self.ids):
                raise ConfigError(
                    f"ids of masks go from values 0 to {CODES - 1} to classes 0 to {max(allowed - {IGNORE})} or "
                    f"{IGNORE}; found {wrong or dict(self.ids)}."
                )
        if self.colours is not None and len(set(self.colours)) < len(self.colours):
            twice = next(colour for colour in self.colours if self.colours.count(colour) > 1)
            raise ConfigError(f"Two classes have the colour {twice}, so RGB masks cannot be read with it.")

    def classes(self, codes: np.ndarray, coloured: bool) -> np.ndarray:
        """Look values up.

        Args:
            codes: Values, or colours as `pack` gives them, of any shape.
            coloured: Whether they are colours.

        Returns:
            int16 classes, `IGNORE` or `OUTSIDE`, of the same shape.
        """
        if coloured:
            return self._by_colour(codes)
        if codes.dtype not in (np.uint8, np.uint16):
            inside = (codes >= 0) & (codes < CODES)
            return np.where(inside, self._table[np.where(inside, codes, 0)], np.int16(OUTSIDE))
        return self._table[codes]

    def decode(self, codes: np.ndarray, name: str) -> Tensor:
        """Turn what `read_codes` gave into classes.

        Args:
            codes: Indices (H, W) or colours (H, W, 3).
            name: What to call the mask in messages.

        Returns:
            uint8 classes or `IGNORE` (H, W).

        Raises:
            DataError: If it has a value or a colour that stands for nothing.
        """
        coloured = codes.ndim == 3
        codes = pack(codes) if coloured else codes
        found = self.classes(codes, coloured)
        if bool((found == OUTSIDE).any()):
            strange = [show_code(int(code), coloured) for code in np.unique(codes[found == OUTSIDE])[:5]]
            raise DataError(
                f"{name} has {', '.join(strange)}, which stands for none of the {self.num_classes} classes and not for "
                f"a pixel without a label ({IGNORE}). `vispeft doctor` shows all masks with such values."
            )
        return torch.from_numpy(found.astype(np.uint8))

    @cached_property
    def _table(self) -> np.ndarray:
        """Class by value, for all values of 16 bits."""
        table = np.full(CODES, OUTSIDE, np.int16)
        table[IGNORE] = IGNORE
        if self.ids is None:
            count = self.num_classes + self.reduce_zero_label
            table[: min(count, IGNORE)] = np.arange(min(count, IGNORE))
        else:
            table[list(self.ids)] = list(self.ids.values())
        if not self.reduce_zero_label:
            return table
        known = table != OUTSIDE
        table[known] = reduce_zero_label(torch.from_numpy(table[known])).numpy()
        return table

    def _by_colour(self, codes: np.ndarray) -> np.ndarray:
        if not self.colours:
            return np.full(codes.shape, OUTSIDE, np.int16)
        keys = pack(np.array(self.colours))
        order = keys.argsort()
        near = order[np.searchsorted(keys[order], codes).clip(max=len(keys) - 1)]
        return np.where(keys[near] == codes, near, OUTSIDE).astype(np.int16)


def show_code(code: int, coloured: bool) -> str:
    """Write a value or a colour for messages.

    Args:
        code: A value, or a colour as `pack` gives it.
        coloured: Whether it is a colour.
    """
    return f"({code >> 16}, {code >> 8 & 255}, {code & 255})" if coloured else f"value {code}"


# ------------------------------------------------------------------ what is known about a mask


@dataclass(frozen=True)
class MaskFacts(ImageFacts):
    """What is known about one mask."""

    codes: Sequence[tuple[int, int]] = ()
    """Values, or colours as `pack` gives them, with their pixels, most frequent first, at most `KEPT`."""
    coloured: bool = False
    """Whether they are colours."""
    more: int = 0
    """Further values that were left out."""
    classes: Mapping[int, int] = field(default_factory=dict)
    """Pixels by class, `IGNORE` among them."""
    outside: Sequence[tuple[int, int]] = ()
    """Values or colours that stand for nothing, with their pixels."""

    def read_with(self, coding: MaskCoding) -> MaskFacts:
        """Say which classes the values stand for.

        Args:
            coding: Knows it.
        """
        if not self.codes:
            return self
        values = np.array([code for code, _ in self.codes], dtype=np.int64)
        classes: dict[int, int] = {}
        outside: list[tuple[int, int]] = []
        for (code, pixels), index in zip(self.codes, coding.classes(values, self.coloured).tolist(), strict=True):
            if index == OUTSIDE:
                outside.append((code, pixels))
            else:
                classes[index] = classes.get(index, 0) + pixels
        return replace(self, classes=classes, outside=outside)


def look_at_mask(file: BinaryIO, full: bool) -> MaskFacts:
    """Look at one mask.

    Args:
        file: Its open file.
        full: Decode it and count its values; otherwise only the header is read.
    """
    if not file.read(1):
        return MaskFacts(problem="empty")
    file.seek(0)
    try:
        with Image.open(file) as image:
            header = MaskFacts(width=image.width, height=image.height, mode=image.mode)
            if not full:
                return header
            try:
                codes = _codes(image)
            except OSError as error:
                return replace(header, problem="truncated", reason=why(error))
    except UNREADABLE as error:
        return MaskFacts(problem="broken", reason=why(error))
    return replace(header, **_counted(codes))


def _counted(codes: np.ndarray) -> dict[str, Any]:
    """Count values and hash them."""
    digest = hashlib.blake2b(np.ascontiguousarray(codes).tobytes(), digest_size=16)
    digest.update(f"{codes.dtype} {codes.shape}".encode())
    coloured = codes.ndim == 3
    values, pixels = _unique(pack(codes) if coloured else codes)
    order = np.argsort(-pixels, kind="stable")[:KEPT]
    counted = [(int(values[index]), int(pixels[index])) for index in order]
    return {"codes": counted, "coloured": coloured, "more": len(values) - len(counted), "digest": digest.hexdigest()}


def _unique(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if codes.dtype != np.uint8:
        return np.unique(codes, return_counts=True)
    pixels = np.bincount(codes.ravel(), minlength=256)  # much faster than sorting
    return np.flatnonzero(pixels), pixels[pixels > 0]


# ------------------------------------------------------------------ sources and splits


class MaskFiles(FileSource):
    """Mask files; `read` gives classes (H, W) instead of an image."""

    def __init__(self, paths: Iterable[Path], root: Path, coding: MaskCoding) -> None:
        """Keep the paths.

        Args:
            paths: The files.
            root: Names in messages are relative to it.
            coding: Which class a value stands for.
        """
        super().__init__(paths, root)
        self.coding = coding

    def read(self, index: int) -> Tensor:
        """Read a mask as uint8 classes or `IGNORE` (H, W)."""
        try:
            codes = read_codes(self.paths[index])
        except UNREADABLE as error:
            raise DataError(f"{self.paths[index]} cannot be read as a mask ({why(error)}).") from error
        return self.coding.decode(codes, self.paths[index])

    def take(self, indices: Sequence[int]) -> MaskFiles:
        """Give a source of some of the files."""
        return MaskFiles([Path(self.paths[index]) for index in indices], Path(self.root), self.coding)

    def facts(self, full: bool) -> list[MaskFacts]:  # type: ignore[override]
        """Look at every file that has changed since the last time."""
        found = self.look("mask" if full else "mask-fast", lambda file: look_at_mask(file, full), MaskFacts)
        return [known.read_with(self.coding) for known in found]


class ListedMasks(ListedSplit):
    """Images of a split and their masks."""

    masks: Source
    """Gives the masks."""

    def __init__(self, source: Source, masks: Source) -> None:
        """Put images and masks together.

        Args:
            source: Gives the images.
            masks: Gives a mask for each of them.
        """
        # Masks are not read to draw splits: to the draw, all images are of one kind.
        super().__init__(source, torch.zeros(len(source), dtype=torch.long))
        self.masks = masks
        self._facts: tuple[bool, list[MaskFacts]] | None = None

    def mask_facts(self, full: bool) -> list[MaskFacts]:
        """Look at every mask, once.

        Args:
            full: Decode them and count their values; otherwise what is known already, at least the headers.
        """
        if self._facts is not None and (self._facts[0] or not full):
            return self._facts[1]
        found: list[MaskFacts] = self.masks.facts(full)  # type: ignore[assignment]
        self._facts = full, found
        return found

    def label(self, index: int) -> str:
        """Tell the mask of an image from others: by its values, where they were read."""
        return self.mask_facts(full=False)[index].digest

    def take(self, indices: Tensor) -> ListedMasks:
        """Give some of the images."""
        return ListedMasks(self.source.take(indices.tolist()), self.masks.take(indices.tolist()))

    def join(self, other: ListedSplit) -> ListedMasks:
        """Put the images of another split behind these."""
        assert isinstance(other, ListedMasks)
        joined = JoinedSource([self.source, other.source])
        return ListedMasks(joined, JoinedSource([self.masks, other.masks]))
