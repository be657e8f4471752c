"""Splits for metric learning, as a reader lists them: the role of each image, and one table of classes for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vispeft.data.listing import ListedSplit, Listing
from vispeft.data.sources import FileSource, JoinedSource, Source

__all__ = ["BOTH", "GALLERY", "QUERY", "ListedRoles", "RetrievalListing", "numbered", "roles_of"]

BOTH, QUERY, GALLERY = 0, 1, 2
"""Roles of an image: query and gallery at once (it is never its own neighbour), query alone, gallery alone."""


class ListedRoles(ListedSplit):
    """Images of a split, their classes and their roles."""

    roles: Tensor
    """Role of each image (N,), int64."""

    def __init__(self, source: Source, targets: Tensor, roles: Tensor) -> None:
        """Combine images, classes and roles.

        Args:
            source: Source of the images.
            targets: Class indices (N,).
            roles: `BOTH`, `QUERY` or `GALLERY` of each image (N,).
        """
        super().__init__(source, targets)
        self.roles = roles

    @classmethod
    def of(cls, queries: ListedSplit, gallery: ListedSplit) -> ListedRoles:
        """Join queries and gallery, in this order; a file in both, with one class, becomes one image that is both.

        Args:
            queries: Images that ask.
            gallery: Images that are searched; their classes have the numbers of those of the queries.
        """
        first: dict[tuple[str, int], int] = {}
        for index, file in enumerate(_files(queries)):
            first.setdefault(file, index)
        if first:  # a file that is listed twice asks once, as it would find itself among the others otherwise
            queries = queries.take(torch.tensor(list(first.values())))
        places = {file: index for index, file in enumerate(first)}
        again = {index: places[file] for index, file in enumerate(_files(gallery)) if file in places}
        rest = torch.tensor([index for index in range(len(gallery)) if index not in again], dtype=torch.long)
        roles = torch.full((len(queries) + len(rest),), GALLERY)
        roles[: len(queries)] = QUERY
        roles[list(again.values())] = BOTH
        joined = queries.join(gallery.take(rest))
        return cls(joined.source, joined.targets, roles)

    def take(self, indices: Tensor) -> ListedRoles:
        """Select some of the images."""
        return ListedRoles(self.source.take(indices.tolist()), self.targets[indices], self.roles[indices])

    def join(self, other: ListedSplit) -> ListedRoles:
        """Append the images of another split."""
        targets, roles = torch.cat([self.targets, other.targets]), torch.cat([self.roles, roles_of(other)])
        return ListedRoles(JoinedSource([self.source, other.source]), targets, roles)


def _files(split: ListedSplit) -> list[tuple[str, int]]:
    """Return path and class of each image; none where images are no files."""
    paths = split.source.paths if isinstance(split.source, FileSource) else []
    return list(zip(paths, split.targets.tolist(), strict=False))


def roles_of(split: ListedSplit) -> Tensor:
    """Return the role of each image of a split (N,); `BOTH` where a reader gives none.

    Args:
        split: The split.
    """
    return split.roles if isinstance(split, ListedRoles) else torch.full((len(split),), BOTH)


@dataclass
class RetrievalListing(Listing):
    """Splits whose classes are told apart by embeddings; the classes of the training split come first."""

    images_per_class: int = 1
    """Images of each class in a training batch."""

    @property
    def train_classes(self) -> int:
        """Number of classes of the training split."""
        return len(self.splits["train"].targets.unique())


def numbered(
    names: tuple[str, ...], splits: Mapping[str, ListedSplit]
) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Number the classes that occur: those of train first, then those of validation and test, each in their old order.

    Args:
        names: Names of the classes by their old numbers.
        splits: The splits; those given twice stay one object.

    Returns:
        Names and splits with the new numbers.
    """
    order: dict[int, int] = {}
    for split in splits.values():
        for label in split.targets.unique().tolist():
            order.setdefault(label, len(order))
    table = torch.full((len(names),), -1)
    table[torch.tensor([*order], dtype=torch.long)] = torch.arange(len(order))
    found = {id(split): _with_targets(split, table[split.targets]) for split in splits.values()}
    return tuple(names[label] for label in order), {name: found[id(split)] for name, split in splits.items()}


def _with_targets(split: ListedSplit, targets: Tensor) -> ListedSplit:
    if isinstance(split, ListedRoles):
        return ListedRoles(split.source, targets, split.roles)
    return ListedSplit(split.source, targets)
