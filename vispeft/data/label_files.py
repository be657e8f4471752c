"""Label files of dense tasks that are no masks of class indices: numbers and vectors for each pixel.

A label is read as a tensor (C, H, W) at the size of its image, in the form in which geometry can change it: classes,
saliency, edges and values have `IGNORE` where there is no label, normals a vector of length zero, depths 0.
`vispeft.data.joint_tasks` turns it into the form of a batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from vispeft.data.dense_targets import TargetKind
from vispeft.data.facts import ImageFacts
from vispeft.data.formats import PixelError, open_image, too_large
from vispeft.data.images import GREY, PLAIN, UNREADABLE, Reading, rgb_pixels, why
from vispeft.data.masks import IGNORE, MaskCoding, MaskFacts
from vispeft.data.pixels import grey_values
from vispeft.data.sources import Source, file_key, look_all
from vispeft.data.trees import open_regular
from vispeft.errors import DataError

__all__ = [
    "Decode",
    "LabelFacts",
    "LabelFiles",
    "class_facts",
    "find_borders",
    "label_facts",
    "labelled",
    "read_array",
    "read_colours",
    "read_shades",
]

Decode = Callable[[Sequence[str], Reading], Tensor]
"""Function that reads the files of one label and returns it (C, H, W); a function at the top of a module."""


@dataclass(frozen=True)
class LabelFacts(ImageFacts):
    """Facts about the label of one image."""

    pixels: int = 0
    """Number of pixels with a label."""
    least: float = 0.0
    """Smallest labelled value; of normals, the smallest component."""
    most: float = 0.0
    """Largest labelled value; of normals, the largest component."""
    total: float = 0.0
    """Sum of the labelled values: of saliency and edges, the number of pixels that are 1."""


def labelled(label: Tensor, kind: TargetKind) -> Tensor:
    """Find the pixels that have a label.

    Args:
        label: As read (C, H, W).
        kind: Its kind.

    Returns:
        bool (H, W).
    """
    if kind == "normals":
        return (label != 0).any(0)
    return label[0] > 0 if kind == "depth" else label[0] != IGNORE


def find_borders(surface: np.ndarray) -> np.ndarray:
    """Find pixels whose neighbour to the right or below has another value.

    Args:
        surface: Values (H, W).

    Returns:
        bool (H, W).
    """
    borders = np.zeros(surface.shape, bool)
    borders[:, :-1] |= surface[:, :-1] != surface[:, 1:]
    borders[:-1] |= surface[:-1] != surface[1:]
    return borders


def label_facts(label: Tensor, kind: TargetKind) -> LabelFacts:
    """Describe a label of another kind than classes.

    Args:
        label: As read (C, H, W).
        kind: Its kind.
    """
    known = labelled(label, kind)
    values = label[:, known].double()
    some = values.numel() > 0
    return LabelFacts(
        **_shape(label),
        pixels=int(known.sum()),
        least=float(values.min()) if some else 0.0,
        most=float(values.max()) if some else 0.0,
        total=float(values.sum()),
    )


def class_facts(label: Tensor) -> MaskFacts:
    """Describe a label of classes, as those of mask files are described; `MaskFacts.read_with` adds the classes.

    Args:
        label: Classes or `IGNORE`, uint8 (1, H, W).
    """
    counts = label.flatten().int().bincount().tolist()
    codes = sorted(((value, count) for value, count in enumerate(counts) if count), key=lambda pair: -pair[1])
    return MaskFacts(**_shape(label), codes=codes)


def _shape(label: Tensor) -> dict[str, int | str]:
    """Size and hash of a label, as fields of its facts."""
    height, width = label.shape[-2:]
    digest = hashlib.blake2b(label.contiguous().numpy().tobytes(), digest_size=16)
    digest.update(f"{label.dtype} {tuple(label.shape)}".encode())
    return {"width": width, "height": height, "digest": digest.hexdigest()}


class LabelFiles(Source):
    """Labels of a dense task in files, one or several for each image; `read` returns the label (C, H, W)."""

    def __init__(
        self,
        groups: Iterable[Sequence[str | os.PathLike[str]]],
        root: str | os.PathLike[str],
        kind: TargetKind,
        decode: Decode,
        coding: MaskCoding | None = None,
    ) -> None:
        """Store the paths.

        Args:
            groups: Files of the label of each image; the first one names the label in messages.
            root: Folder that names in messages are relative to.
            kind: Kind of the labels.
            decode: Function that reads them.
            coding: The classes, for the kind ``classes`` alone.
        """
        self.groups = [tuple(map(os.fspath, group)) for group in groups]
        self.root, self.kind, self.decode, self.coding = str(root), kind, decode, coding
        self._made: type[ImageFacts] = LabelFacts if coding is None else MaskFacts

    def __len__(self) -> int:
        """Count the labels."""
        return len(self.groups)

    def name(self, index: int) -> str:
        """Return the path of the first file, relative to the root if it lies inside."""
        return self._short(self.groups[index][0])

    def read(self, index: int) -> Tensor:
        """Read a label (C, H, W)."""
        try:
            return self.decode(self.groups[index], self.reading)
        except UNREADABLE as error:
            raise DataError(f"{self.name(index)} cannot be read as a label of {self.kind} ({why(error)}).") from error

    def take(self, indices: Sequence[int]) -> LabelFiles:
        """Return a source of some of the labels."""
        chosen = [self.groups[index] for index in indices]
        return LabelFiles(chosen, self.root, self.kind, self.decode, self.coding).read_with(self.reading)

    def facts(self, full: bool) -> list[ImageFacts]:
        """Inspect every label that has changed since the last time; without `full`, only look for its files."""
        if not full:
            return [self._missing(group) or self._made() for group in self.groups]
        level = f"label {self.kind} {self.decode.__module__}.{self.decode.__qualname__}"
        keys = [self._key(group, level) for group in self.groups]
        found = look_all(keys, self._look, self._made, self.reading)
        return [known.read_with(self.coding) if isinstance(known, MaskFacts) else known for known in found]  # type: ignore[arg-type]

    def _short(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/\\") or path

    def _key(self, group: Sequence[str], level: str) -> tuple[object, ...]:
        """Identify the content of all files of a label, those behind the first by the level."""
        others = [file_key(path, "") for path in group[1:]]
        return file_key(group[0], f"{level} {others}" if others else level) if all(others) else ()

    def _missing(self, group: Sequence[str]) -> ImageFacts | None:
        """Find files that are not there, or have no content."""
        for path in group:
            problem = "missing" if not os.path.isfile(path) else "empty" if not os.path.getsize(path) else ""
            if problem:
                return self._made(problem=problem, reason="" if path == group[0] else self._short(path))
        return None

    def _look(self, index: int) -> ImageFacts:
        group = self.groups[index]
        if (missing := self._missing(group)) is not None:
            return missing
        try:
            label = self.decode(group, self.reading)
            return label_facts(label, self.kind) if self.coding is None else class_facts(label)
        except PixelError as error:
            return self._made(problem=error.problem, reason=why(error), width=error.size[0], height=error.size[1])
        except UNREADABLE as error:
            return self._made(problem="broken", reason=why(error))


# ------------------------------------------------------------------ what decoders read


def read_shades(path: str, reading: Reading = PLAIN) -> np.ndarray:
    """Read a grey image as shares of white.

    Args:
        path: Its file.
        reading: The limit on pixels.

    Returns:
        float32 (H, W) in [0, 1].

    Raises:
        PixelError: If it is not grey, or the range of its values is not known.
    """
    with open_image(path, reading.max_pixels) as image:
        if image.mode not in GREY:
            raise PixelError("unsupported", f"its pixels are {image.mode}, and this label is a grey image", image.size)
        grey = grey_values(image)
    if not grey.white:
        raise PixelError("unsupported", f"its numbers ({grey.values.dtype.name}) have no known range; save 8 bits")
    shades = grey.values.astype(np.float32) / grey.white
    return 1 - shades if grey.inverted else shades


def read_colours(path: str, reading: Reading = PLAIN) -> np.ndarray:
    """Read an RGB image of 8 bits.

    Args:
        path: Its file.
        reading: The limit on pixels.

    Returns:
        uint8 (H, W, 3).

    Raises:
        PixelError: If it is of another kind.
    """
    with open_image(path, reading.max_pixels) as image:
        if image.mode not in ("RGB", "RGBA"):
            text = f"its pixels are {image.mode}, and this label has three components, stored as RGB"
            raise PixelError("unsupported", text, image.size)
        return rgb_pixels(image, path, replace(reading, transparency=None, value_range=None))


def read_array(path: str, channels: int, reading: Reading = PLAIN, whole: str = "") -> np.ndarray:
    """Read a file of numpy.

    Args:
        path: Its file, which ends in ``.npy``.
        channels: Number of values per pixel; of one, the last axis may be missing.
        reading: The limit on pixels.
        whole: Reason for which whole numbers are refused; empty if they are not.

    Returns:
        float32 (H, W, channels), without infinite values and NaN.

    Raises:
        PixelError: If it has another shape, too many pixels, no numbers, or numbers that are not finite.
    """
    with open_regular(path) as file:
        values = np.load(file, allow_pickle=False)
    values = values[..., None] if channels == 1 and values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != channels or values.dtype.kind not in "biuf":
        wanted = f"(height, width{'' if channels == 1 else f', {channels}'})"
        raise PixelError(
            "unsupported", f"its array is {values.dtype.name} {values.shape}, and numbers {wanted} are needed"
        )
    size = values.shape[1], values.shape[0]
    if whole and values.dtype.kind != "f":
        raise PixelError("unsupported", f"its numbers are {values.dtype.name}, {whole}", size)
    if size[0] * size[1] > reading.max_pixels:
        raise too_large(size, reading.max_pixels)
    if not np.isfinite(values).all():
        raise PixelError("unsupported", "it has values that are not finite", size)
    return values.astype(np.float32)
