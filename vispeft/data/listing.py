"""Results of a reader before any image is opened: splits of images with targets, and first findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vispeft.data.images import PLAIN, Reading
from vispeft.data.sources import JoinedSource, Source
from vispeft.errors import is_utf8, printable

__all__ = ["PER_PIXEL", "Finding", "ListedSplit", "Listing", "Published", "Target"]

Target = Literal["class", "multilabel", "regression", "mask", "tasks", "embedding"]
"""Kinds of targets: one class per image, any number of labels, numbers, a class per pixel, several dense tasks, or
classes that are told apart by embeddings, of which those of the test split are never trained on."""
PER_PIXEL = ("mask", "tasks")
"""Kinds of targets that every pixel has."""


@dataclass(frozen=True)
class Finding:
    """One observation about data."""

    level: Literal["error", "warning", "fact"]
    """Severity: the data are unusable (``error``), look wrong (``warning``), or neither (``fact``)."""
    code: str
    """Short name of its kind, such as ``empty-file``."""
    text: str
    """The observation and its remedy, one or two sentences without a final full stop."""
    places: tuple[str, ...] = ()
    """Files, lines or classes it concerns."""

    def line(self, at_most: int = 5) -> str:
        """Format it as one line.

        Args:
            at_most: Largest number of places to name.
        """
        named = ", ".join(self.places[:at_most])
        more = f", and {len(self.places) - at_most} more" if len(self.places) > at_most else ""
        return printable(f"{self.text}: {named}{more}." if named else f"{self.text}.")


@dataclass(frozen=True)
class Published:
    """Published sizes of a data set."""

    title: str
    """Its name."""
    classes: int
    """Number of classes."""
    images: Mapping[str, int]
    """Number of images per split, where known."""


@dataclass
class ListedSplit:
    """Images of a split and their targets."""

    source: Source
    """Source of the images."""
    targets: Tensor
    """Class indices (N,), or 0 and 1 or numbers (N, C)."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.source)

    def read_with(self, reading: Reading) -> None:
        """Set how pixels become RGB.

        Args:
            reading: The settings.
        """
        self.source.read_with(reading)

    def label(self, index: int) -> str:
        """Return a string that identifies the target of an image.

        Args:
            index: Its position.
        """
        return str(self.targets[index].tolist())

    def take(self, indices: Tensor) -> ListedSplit:
        """Select some of the images.

        Args:
            indices: Their positions.
        """
        return ListedSplit(self.source.take(indices.tolist()), self.targets[indices])

    def join(self, other: ListedSplit) -> ListedSplit:
        """Append the images of another split.

        Args:
            other: The other split.
        """
        return ListedSplit(JoinedSource([self.source, other.source]), torch.cat([self.targets, other.targets]))


@dataclass
class Listing:
    """Splits as a reader found them."""

    place: str
    """Location of the data, for messages."""
    class_names: tuple[str, ...]
    """Names of the classes, the labels, or the numbers."""
    splits: dict[str, ListedSplit]
    """``train`` and, if given, ``validation`` and ``test``."""
    target: Target = "class"
    """Kind of targets."""
    findings: list[Finding] = field(default_factory=list)
    """First findings."""
    published: Published | None = None
    """Published sizes, if it is a known data set."""
    settled: bool = False
    """Whether it is a published data set to be used unchanged, although its published sizes are not known here."""
    repeats: frozenset[str] = frozenset()
    """Splits that contain images of other splits by protocol."""
    drawn: frozenset[str] = frozenset()
    """Splits that were drawn at random."""
    reading: Reading = PLAIN
    """How pixels become RGB."""

    @property
    def blame(self) -> Literal["error", "warning"]:
        """Severity of faults that users cannot fix in a published data set, such as equal images in train and test."""
        return "error" if self.published is None and not self.settled else "warning"

    @property
    def broken(self) -> bool:
        """Whether there is an error among the findings, or a class whose name cannot be saved."""
        return bool(self.unwritable) or any(finding.level == "error" for finding in self.findings)

    def repeated_by(self, name: str) -> str | None:
        """Return the split whose images another one shows by protocol, where it has none of its own.

        Args:
            name: The other one.

        Returns:
            ``test`` or ``train``; None for a split with images of its own.
        """
        if name not in self.repeats:
            return None
        named = {key: {split.source.name(i) for i in range(len(split))} for key, split in self.splits.items()}
        return next((key for key in ("test", "train") if named[name] <= named.get(key, set())), None)

    @property
    def unwritable(self) -> list[str]:
        """Names of classes that are empty, or no text in UTF-8."""
        return [name for name in self.class_names if not name.strip() or not is_utf8(name)]


def gather(level: Literal["error", "warning", "fact"], found: Mapping[tuple[str, str], Iterable[str]]) -> list[Finding]:
    """Turn places sorted by (code, text) into findings.

    Args:
        level: Severity of all findings.
        found: Places by code and text; kinds without a place are left out.
    """
    listed: list[tuple[tuple[str, str], Sequence[str]]] = [(key, tuple(places)) for key, places in found.items()]
    return [Finding(level, code, text, tuple(places)) for (code, text), places in listed if places]
