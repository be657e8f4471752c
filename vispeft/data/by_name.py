"""Classes of data in the order of a model's outputs, matched by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from vispeft.data.images import Reading
from vispeft.data.listing import ListedSplit, Listing, Target
from vispeft.data.masks import IGNORE, ListedMasks, MaskFacts
from vispeft.data.palettes import Colour, make_palette
from vispeft.data.sources import Source
from vispeft.errors import DataError, counted, printable

__all__ = ["ClassOrder", "in_order", "names_of"]

SHOWN = 6
"""Names shown in a message."""


def names_of(data: Any, count: int) -> tuple[str, ...]:
    """Return names of a model's outputs, from the data or as numbers.

    Args:
        data: A data module.
        count: Number of outputs.
    """
    names = tuple(getattr(data, "class_names", ()) or ())
    return names if len(names) == count else tuple(str(index) for index in range(count))


@dataclass(frozen=True)
class ClassOrder:
    """The classes of data, and the outputs of a model that they belong to."""

    found: tuple[str, ...]
    """Names of the data's classes, in the order of their numbers."""
    wanted: tuple[str, ...]
    """Names of the model's outputs."""
    target: Target = "class"
    """Kind of the targets."""

    def check_all(self) -> None:
        """Refuse outputs that the model does not know, or that the data lack.

        Raises:
            DataError: If there are any.
        """
        self._compare(self.missing)

    def check(self) -> None:
        """Refuse classes that the model does not know, and a missing number or label where each one is measured.

        Raises:
            DataError: If there are any.
        """
        strange = [name for name in self.found if name not in self.wanted]
        self._compare(self.missing if strange or self.target in ("regression", "multilabel") else [])

    def _compare(self, lacking: Sequence[str]) -> None:
        strange = [name for name in self.found if name not in self.wanted]
        if strange or lacking:
            kind = {"regression": "numbers", "tasks": "tasks"}.get(self.target, "classes")
            raise DataError(
                f"The data have other {kind} than the model was trained for: {_listed(strange)} here alone, and "
                f"{_listed(lacking)} there alone. Measure it on data with its own {len(self.wanted)} {kind}, named as "
                "in the training; `vispeft predict` takes any images."
            )

    @property
    def places(self) -> list[int]:
        """Output of the model for each class of the data."""
        return [self.wanted.index(name) for name in self.found]

    @property
    def missing(self) -> list[str]:
        """Names of outputs that the data do not have."""
        return [name for name in self.wanted if name not in self.found]

    def lines(self) -> list[str]:
        """Say what was matched; nothing if the names are equal and in the same order."""
        said = []
        if self.places != sorted(self.places):
            said.append(
                f"The data have the classes in another order than the model, and are matched by name: "
                f"{_listed(self.found)} here, {_listed(self.wanted)} there."
            )
        if self.missing:
            be, them = ("is", "it") if len(self.missing) == 1 else ("are", "them")
            said.append(
                f"{len(self.missing)} of the model's {counted(len(self.wanted), 'class', 'classes')} {be} not in the "
                f"data, and predictions of {them} count as wrong: {_listed(self.missing)}."
            )
        return said

    def targets(self, targets: Tensor) -> Tensor:
        """Renumber class indices (N,), or sort labels and numbers (N, C) into the columns of the model."""
        places = torch.tensor(self.places)
        if targets.ndim == 1:
            return places[targets]
        columns = targets.new_zeros(len(targets), len(self.wanted))
        columns[:, places] = targets
        return columns

    def colours(self, palette: Sequence[Colour]) -> tuple[Colour, ...]:
        """Sort the colours of the data's classes into the order of the model; the others get generated ones."""
        own = dict(zip(self.found, palette, strict=True))
        return tuple(
            own.get(name, spare) for name, spare in zip(self.wanted, make_palette(len(self.wanted)), strict=True)
        )

    def numbers(self) -> Tensor:
        """Class in the model's order by class in a mask, uint8 (256,); `IGNORE` stays."""
        table = torch.arange(256, dtype=torch.uint8)
        table[: len(self.found)] = torch.tensor(self.places, dtype=torch.uint8)
        table[IGNORE] = IGNORE
        return table


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return printable(f"{', '.join(names[:SHOWN]) or 'none'}{more}")


class RenumberedMasks(Source):
    """Masks of another source, with the classes in the order of a model."""

    def __init__(self, masks: Source, order: ClassOrder) -> None:
        """Store source and order.

        Args:
            masks: The source.
            order: The order.
        """
        self.masks, self.order, self._numbers = masks, order, order.numbers()

    def read_with(self, reading: Reading) -> Self:
        """Set how pixels are read, in the other source."""
        self.masks.read_with(reading)
        return super().read_with(reading)

    def __len__(self) -> int:
        """Count the masks."""
        return len(self.masks)

    def name(self, index: int) -> str:
        """Return the name of a mask."""
        return self.masks.name(index)

    def read(self, index: int) -> Tensor:
        """Read a mask as uint8 classes or `IGNORE` (H, W)."""
        return self._numbers[self.masks.read(index).long()]

    def take(self, indices: Sequence[int]) -> RenumberedMasks:
        """Return a source of some of the masks."""
        return RenumberedMasks(self.masks.take(indices), self.order)

    def facts(self, full: bool) -> list[MaskFacts]:  # type: ignore[override]
        """Inspect every mask."""
        numbers, found = self._numbers.tolist(), cast(list[MaskFacts], self.masks.facts(full))
        return [
            replace(known, classes={numbers[index]: pixels for index, pixels in known.classes.items()})
            for known in found
        ]


def in_order(listing: Listing, order: ClassOrder) -> Listing:
    """Give the classes of a listing the numbers that a model has for them.

    Args:
        listing: The data, with their splits.
        order: Names of both, which were checked.
    """
    splits = {name: _renumbered(split, order) for name, split in listing.splits.items()}
    # The published number of classes is that of the data alone.
    published = listing.published if len(order.found) == len(order.wanted) else None
    return replace(listing, class_names=order.wanted, splits=splits, published=published)


def _renumbered(split: ListedSplit, order: ClassOrder) -> ListedSplit:
    if isinstance(split, ListedMasks):
        return ListedMasks(split.source, RenumberedMasks(split.masks, order))
    return replace(split, targets=order.targets(split.targets))
