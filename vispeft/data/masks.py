"""Masks: the class of each pixel, read directly from the file's values, never by conversion to RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL.ImageFile import ImageFile
from torch import Tensor

from vispeft.data.facts import ImageFacts, header_facts
from vispeft.data.formats import PixelError, open_image
from vispeft.data.images import DEEP, GREY, PLAIN, UNREADABLE, Reading, why
from vispeft.data.listing import ListedSplit
from vispeft.data.palettes import Colour, read_palette
from vispeft.data.pixels import (
    grey_values,
    is_wide,
    netpbm_values,
    netpbm_white,
    palette_colours,
    upright,
    wide_colours,
)
from vispeft.data.sources import FileSource, JoinedSource, Source
from vispeft.errors import ConfigError, DataError

__all__ = [
    "IGNORE",
    "ListedMasks",
    "MaskCoding",
    "MaskFacts",
    "MaskFiles",
    "own_coding",
    "read_codes",
    "reduce_zero_label",
]

IGNORE: int = 255
"""Class of unlabelled pixels, which losses and metrics ignore."""

OUTSIDE = -1
"""Result for values that map to no class."""
CODES = 65_536
"""Number of values of a 16-bit mask, which are looked up in a table."""
LEAST, MOST = -(2**31), 2**32 - 1
"""Smallest and largest value of a mask of 32 bits, signed or not."""
KEPT = 1_000
"""Largest number of values stored per mask; index masks have fewer, photos more."""


def reduce_zero_label(mask: Tensor) -> Tensor:
    """Remove class 0: it becomes `IGNORE`, every other class is lowered by one, and `IGNORE` stays.

    Args:
        mask: Classes from 0, or `IGNORE`, of any shape.
    """
    unlabelled = (mask == 0) | (mask == IGNORE)
    # Clamped first, so that an unsigned type never computes 0 - 1.
    return torch.where(unlabelled, torch.full_like(mask, IGNORE), mask.clamp(min=1) - 1)


def read_codes(file: str | Path | BinaryIO, by_colour: bool = False, reading: Reading = PLAIN) -> np.ndarray:
    """Read the values of a mask file as they are stored, upright as its metadata say.

    Args:
        file: A path, or an open file.
        by_colour: Whether its colours are wanted, also those of a palette and of grey values.
        reading: The limit on pixels.

    Returns:
        Integers (H, W) of a grey mask of 1 to 32 bits or of a palette mask, whose palette is ignored; or colours (H, W,
        3), uint8, of an RGB mask, and of all masks with `by_colour`.

    Raises:
        PixelError: If it is of another kind, or has too many pixels.
        OSError: If it is damaged, or no image.
    """
    with open_image(file, reading.max_pixels) as image:
        refuse_mask(image, by_colour)
        return _codes(image, file, by_colour)


def refuse_mask(image: ImageFile, by_colour: bool) -> None:
    """Refuse an image that cannot be a mask, by its header.

    Args:
        image: An opened image.
        by_colour: Whether its colours are wanted.

    Raises:
        PixelError: If it cannot.
    """
    if image.mode not in (*GREY, "P", "PA", "RGB", "RGBA") or image.mode == "F":
        text = "its pixels are floating-point numbers" if image.mode == "F" else f"its pixels are {image.mode}"
        raise PixelError("unsupported", f"{text}; a mask is grey with whole numbers, has a palette, or is RGB")
    if by_colour and image.mode in DEEP:
        raise PixelError(
            "unsupported", f"its grey values of 16 or 32 bits (mode {image.mode}) are no colours of a palette"
        )


def _codes(image: ImageFile, file: str | Path | BinaryIO, by_colour: bool) -> np.ndarray:
    """Read the values or colours of an opened mask."""
    if image.mode in ("RGB", "RGBA"):
        return _colours(image, file)
    if image.mode in ("P", "PA"):
        image.load()
        codes = upright(np.asarray(image if image.mode == "P" else image.getchannel(0)), image)
        return palette_colours(image)[codes] if by_colour else codes
    grey = grey_values(image)
    if not by_colour:
        return grey.values
    shades = (grey.values.astype(np.uint16) * 255 + grey.white // 2) // max(1, grey.white)
    return np.repeat((255 - shades if grey.inverted else shades).astype(np.uint8)[..., None], 3, 2)


def _colours(image: ImageFile, file: str | Path | BinaryIO) -> np.ndarray:
    """Read the colours of an RGB mask, whose transparency says nothing."""
    if image.format == "PPM":
        colours, white = netpbm_values(image), netpbm_white(image)
    elif is_wide(image):
        colours, white = wide_colours(image, file)[..., :3], 65_535
    else:
        image.load()
        return np.ascontiguousarray(upright(np.asarray(image), image)[..., :3])
    if (colours * np.int64(255) % white).any():
        text = f"its colours go from 0 to {white}, and some of them stand between two colours of 8 bits"
        raise PixelError("unsupported", f"{text}; save it with 8 bits")
    return (colours * np.int64(255) // white).astype(np.uint8)


def pack(colours: np.ndarray) -> np.ndarray:
    """Pack colours (..., 3) into integers 0xRRGGBB (...)."""
    wide = colours.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


# ------------------------------------------------------------------ from values to classes


@dataclass(frozen=True, kw_only=True)
class MaskCoding:
    """Mapping from the values or colours of mask files to classes."""

    num_classes: int
    """Number of resulting classes, at most 255."""
    ids: Mapping[int, int] | None = None
    """Class by file value, if they differ; 255 marks values without a label. Values that are not listed are an error,
    except 255."""
    reduce_zero_label: bool = False
    """Whether 0 marks unlabelled pixels and classes start at 1."""
    colours: tuple[Colour, ...] | None = None
    """Colour of each class, for RGB masks."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one of them is invalid.
        """
        if not 1 <= self.num_classes <= IGNORE:
            raise ConfigError(
                f"Masks of {self.num_classes} classes were asked for; 1 to {IGNORE} are possible, because {IGNORE} "
                "marks pixels without a label."
            )
        if self.ids is not None:
            if self.reduce_zero_label:
                raise ConfigError(
                    "ids of masks were given with reduce_zero_label, which would lower the classes in ids by one "
                    f"and drop the first of them. Write 0: {IGNORE} into ids and leave reduce_zero_label out."
                )
            allowed = {*range(self.num_classes), IGNORE}
            wrong = {value: index for value, index in self.ids.items() if index not in allowed}
            if wrong or any(not LEAST <= value <= MOST for value in self.ids):
                raise ConfigError(
                    f"ids of masks go from values {LEAST} to {MOST} to classes 0 to {max(allowed - {IGNORE})} or "
                    f"{IGNORE}; found {wrong or dict(self.ids)}."
                )
        if self.colours is not None and len(set(self.colours)) < len(self.colours):
            twice = next(colour for colour in self.colours if self.colours.count(colour) > 1)
            raise ConfigError(f"Two classes have the colour {twice}, so RGB masks cannot be read with it.")

    def classes(self, codes: np.ndarray, coloured: bool) -> np.ndarray:
        """Map values to classes.

        Args:
            codes: Values, or packed colours (see `pack`), of any shape.
            coloured: Whether they are colours.

        Returns:
            int16 classes, `IGNORE` or `OUTSIDE`, in the same shape.
        """
        if coloured:
            return self._by_colour(codes)
        if codes.dtype in (np.uint8, np.uint16):
            return self._table[codes]
        inside = (codes >= 0) & (codes < CODES)
        found = np.where(inside, self._table[np.where(inside, codes, 0)], np.int16(OUTSIDE))
        for value, index in self._far.items():
            found[codes == value] = index
        return found

    def decode(self, codes: np.ndarray, name: str) -> Tensor:
        """Map the result of `read_codes` to classes.

        Args:
            codes: Indices (H, W) or colours (H, W, 3).
            name: Name of the mask in messages.

        Returns:
            uint8 classes or `IGNORE` (H, W).

        Raises:
            DataError: If a value or colour maps to no class.
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
        """Class by value, for all 16-bit values."""
        table = np.full(CODES, OUTSIDE, np.int16)
        table[IGNORE] = IGNORE
        if self.ids is None:
            count = self.num_classes + self.reduce_zero_label
            table[: min(count, IGNORE)] = np.arange(min(count, IGNORE))
        else:
            near = {value: index for value, index in self.ids.items() if 0 <= value < CODES}
            table[list(near)] = list(near.values())
        known = table != OUTSIDE
        if self.reduce_zero_label:
            table[known] = reduce_zero_label(torch.from_numpy(table[known])).numpy()
        return table

    @cached_property
    def _far(self) -> dict[int, int]:
        """Class by value, for values that are negative or of more than 16 bits."""
        return {value: index for value, index in (self.ids or {}).items() if not 0 <= value < CODES}

    def _by_colour(self, codes: np.ndarray) -> np.ndarray:
        if not self.colours:
            return np.full(codes.shape, OUTSIDE, np.int16)
        keys = pack(np.array(self.colours))
        order = keys.argsort()
        near = order[np.searchsorted(keys[order], codes).clip(max=len(keys) - 1)]
        return np.where(keys[near] == codes, near, OUTSIDE).astype(np.int16)


def own_coding(
    owner: str,
    names: Sequence[str],
    palette: Sequence[Sequence[int]] | None,
    *,
    rgb_masks: bool = False,
    ids: Mapping[int, int] | None = None,
    reduce_zero_label: bool = False,
) -> MaskCoding:
    """Make the mapping for masks of one's own.

    Args:
        owner: The object with the settings, for messages.
        names: Names of the classes.
        palette: Colour of each class, if it is given.
        rgb_masks: Whether masks hold these colours.
        ids: Class by mask value, if they differ.
        reduce_zero_label: Whether 0 marks unlabelled pixels and classes start at 1.

    Raises:
        ConfigError: If a setting is invalid.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{owner}(class_names={list(names)}): two or more different names are needed.")
    if rgb_masks and (not palette or ids or reduce_zero_label):
        raise ConfigError(
            f"{owner}(rgb_masks=True) reads masks by the colours of palette, which has to be given, without ids and "
            "reduce_zero_label."
        )
    known = read_palette(palette, len(names), owner) if palette else None
    colours = known if rgb_masks else None
    return MaskCoding(num_classes=len(names), ids=ids, reduce_zero_label=reduce_zero_label, colours=colours)


def show_code(code: int, coloured: bool) -> str:
    """Format a value or a colour for messages.

    Args:
        code: A value, or a packed colour (see `pack`).
        coloured: Whether it is a colour.
    """
    return f"({code >> 16}, {code >> 8 & 255}, {code & 255})" if coloured else f"value {code}"


# ------------------------------------------------------------------ facts about a mask


@dataclass(frozen=True)
class MaskFacts(ImageFacts):
    """Facts about one mask."""

    codes: Sequence[tuple[int, int]] = ()
    """Values or packed colours with their pixel counts, most frequent first, at most `KEPT`."""
    coloured: bool = False
    """Whether `codes` are colours."""
    white_is_zero: bool = False
    """Whether the file says that 0 is white, so that other programs show, and may give, the values the other way
    round."""
    by_colour: bool = False
    """Whether its colours were wanted, also those of a palette and of grey values."""
    more: int = 0
    """Number of further values left out of `codes`."""
    classes: Mapping[int, int] = field(default_factory=dict)
    """Pixel counts by class, including `IGNORE`."""
    outside: Sequence[tuple[int, int]] = ()
    """Values or colours that map to no class, with their pixel counts."""

    def read_with(self, coding: MaskCoding) -> MaskFacts:
        """Return the facts with classes, mapped from the values.

        Args:
            coding: The mapping.
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


def look_at_mask(file: BinaryIO, full: bool, by_colour: bool = False, reading: Reading = PLAIN) -> MaskFacts:
    """Inspect one mask.

    Args:
        file: Its open file.
        full: Whether to decode it and count its values, instead of reading only the header.
        by_colour: Whether its colours are wanted, also those of a palette and of grey values.
        reading: The limit on pixels.
    """
    file.seek(0)
    if not file.read(1):
        return MaskFacts(problem="empty")
    try:
        with open_image(file, reading.max_pixels) as image:
            reversed_ = image.mode == "1" if image.format == "PPM" else getattr(image, "white_is_zero", False)
            header = MaskFacts(**header_facts(image), white_is_zero=reversed_ and not by_colour, by_colour=by_colour)
            refuse_mask(image, by_colour)
            if not full:
                return header
            try:
                codes = _codes(image, file, by_colour)
            except OSError as error:
                return replace(header, problem="truncated", reason=why(error))
    except PixelError as error:
        width, height = error.size
        return MaskFacts(problem=error.problem, reason=why(error), width=width, height=height)
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
    """Mask files; `read` returns classes (H, W) instead of an image."""

    def __init__(self, paths: Iterable[str | Path], root: str | Path, coding: MaskCoding) -> None:
        """Store the paths.

        Args:
            paths: The files.
            root: Folder that names in messages are relative to.
            coding: Mapping from values to classes.
        """
        super().__init__(paths, root)
        self.coding = coding

    def read(self, index: int) -> Tensor:
        """Read a mask as uint8 classes or `IGNORE` (H, W)."""
        try:
            codes = read_codes(self.paths[index], self.coding.colours is not None, self.reading)
        except UNREADABLE as error:
            raise DataError(f"{self.paths[index]} cannot be read as a mask ({why(error)}).") from error
        return self.coding.decode(codes, self.paths[index])

    def take(self, indices: Sequence[int]) -> MaskFiles:
        """Return a source of some of the files."""
        paths = [self.paths[index] for index in indices]
        return MaskFiles(paths, self.root, self.coding).read_with(self.reading)

    def facts(self, full: bool) -> list[MaskFacts]:  # type: ignore[override]
        """Inspect every file that has changed since the last time."""
        by_colour, reading = self.coding.colours is not None, self.reading
        level = f"mask{'-colours' if by_colour else ''}{'' if full else '-fast'}"
        found = self.look(level, lambda file: look_at_mask(file, full, by_colour, reading), MaskFacts)
        return [known.read_with(self.coding) for known in found]


class ListedMasks(ListedSplit):
    """Images of a split and their masks."""

    masks: Source
    """Source of the masks."""

    def __init__(self, source: Source, masks: Source) -> None:
        """Combine images and masks.

        Args:
            source: Source of the images.
            masks: Source of one mask per image.
        """
        # Splits are drawn without reading masks, so all images count as one class.
        super().__init__(source, torch.zeros(len(source), dtype=torch.long))
        self.masks = masks
        self._facts: tuple[bool, list[MaskFacts]] | None = None

    def read_with(self, reading: Reading) -> None:
        """Set how the pixels of images are read, and the limit on those of masks."""
        super().read_with(reading)
        self.masks.read_with(reading)

    def mask_facts(self, full: bool) -> list[MaskFacts]:
        """Inspect every mask, once.

        Args:
            full: Whether to decode them and count their values; otherwise stored facts or headers suffice.
        """
        if self._facts is not None and (self._facts[0] or not full):
            return self._facts[1]
        found: list[MaskFacts] = self.masks.facts(full)  # type: ignore[assignment]
        self._facts = full, found
        return found

    def label(self, index: int) -> str:
        """Return a string that identifies the mask of an image, by its values if they were read."""
        return self.mask_facts(full=False)[index].digest

    def take(self, indices: Tensor) -> ListedMasks:
        """Select some of the images."""
        return ListedMasks(self.source.take(indices.tolist()), self.masks.take(indices.tolist()))

    def join(self, other: ListedSplit) -> ListedMasks:
        """Append the images of another split."""
        assert isinstance(other, ListedMasks)
        joined = JoinedSource([self.source, other.source])
        return ListedMasks(joined, JoinedSource([self.masks, other.masks]))
