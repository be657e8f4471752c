"""What a reader finds before any image is opened: splits of images with targets, and what is wrong already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vispeft.data.sources import JoinedSource, Source

__all__ = ["Finding", "ListedSplit", "Listing", "Published", "Target"]

Target = Literal["class", "multilabel", "regression", "mask"]
"""One class per image, any number of labels, numbers, or a class for each pixel."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found in data."""

    level: Literal["error", "warning", "fact"]
    """Whether data with it cannot be used, can be used but look wrong, or are just so."""
    code: str
    """Short name of the kind of finding, such as ``empty-file``."""
    text: str
    """What was found and what to do, one sentence or two without a full stop at the end."""
    places: tuple[str, ...] = ()
    """Where: files, lines, classes."""

    def line(self, at_most: int = 5) -> str:
        """Write it on one line.

        Args:
            at_most: How many places to name.
        """
        named = ", ".join(self.places[:at_most])
        more = f", and {len(self.places) - at_most} more" if len(self.places) > at_most else ""
        return f"{self.text}: {named}{more}." if named else f"{self.text}."


@dataclass(frozen=True)
class Published:
    """Numbers published for a data set."""

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
    """Gives the images."""
    targets: Tensor
    """Class indices (N,), or 0 and 1 or numbers (N, C)."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.source)

    def label(self, index: int) -> str:
        """Tell the target of an image from others.

        Args:
            index: Its position.
        """
        return str(self.targets[index].tolist())

    def take(self, indices: Tensor) -> ListedSplit:
        """Give some of the images.

        Args:
            indices: Their positions.
        """
        return ListedSplit(self.source.take(indices.tolist()), self.targets[indices])

    def join(self, other: ListedSplit) -> ListedSplit:
        """Put the images of another split behind these.

        Args:
            other: The other split.
        """
        return ListedSplit(JoinedSource([self.source, other.source]), torch.cat([self.targets, other.targets]))


@dataclass
class Listing:
    """Splits as a reader found them."""

    place: str
    """Where the data are, for messages."""
    class_names: tuple[str, ...]
    """Names of the classes, of the labels, or of the numbers."""
    splits: dict[str, ListedSplit]
    """``train``, and where given ``validation`` and ``test``."""
    target: Target = "class"
    """What kind of targets there are."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong or worth knowing already."""
    published: Published | None = None
    """What is known about the data set, if it is a known one."""
    settled: bool = False
    """Whether it is a published set that is used as it is, although nothing is known here about its numbers."""
    repeats: frozenset[str] = frozenset()
    """Splits that have images of other splits because the protocol says so."""

    @property
    def blame(self) -> Literal["error", "warning"]:
        """How bad faults are that nobody can mend in a published set, such as equal images in train and test."""
        return "error" if self.published is None and not self.settled else "warning"

    @property
    def broken(self) -> bool:
        """Whether something is wrong with it."""
        return any(finding.level == "error" for finding in self.findings)


def gather(level: Literal["error", "warning", "fact"], found: Mapping[tuple[str, str], Iterable[str]]) -> list[Finding]:
    """Turn places sorted by (code, text) into findings.

    Args:
        level: Of all of them.
        found: Places by code and text; kinds without a place are left out.
    """
    listed: list[tuple[tuple[str, str], Sequence[str]]] = [(key, tuple(places)) for key, places in found.items()]
    return [Finding(level, code, text, tuple(places)) for (code, text), places in listed if places]
