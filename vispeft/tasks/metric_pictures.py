"""Pictures of metric learning: queries with their nearest neighbours, and embeddings of some classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vispeft.metrics import Similarity, nearest
from vispeft.metrics.retrieval import GALLERY, QUERY
from vispeft.viz import Neighbour, NeighbourRow, embedding_plot

__all__ = ["Retrieved", "draw_classes", "neighbour_rows"]

QUERIES, NEIGHBOURS = 6, 6
"""Rows of a picture, and neighbours in each."""
CLASSES = 20
"""Classes in a plot of embeddings, as many as its legend names."""


class Retrieved(NamedTuple):
    """The embeddings of a split in its order."""

    embeddings: Tensor
    """(N, d)."""
    labels: Tensor
    """(N,)."""
    roles: Tensor
    """(N,)."""
    similarity: Similarity
    """How neighbours are found."""


def neighbour_rows(
    found: Retrieved, image: Callable[[int], Tensor], names: Sequence[str] | None = None
) -> list[NeighbourRow]:
    """Find the neighbours of some queries, evenly spaced in a split.

    Args:
        found: The embeddings of the split.
        image: Gives the picture of an image of the split, uint8 (3, H, W).
        names: Name of each label; None for its number.

    Returns:
        A row for each query; none where the split has no query or no gallery.
    """
    queries = (found.roles != GALLERY).nonzero().flatten()
    gallery = (found.roles != QUERY).nonzero().flatten()
    if not len(queries) or not len(gallery):
        return []
    chosen = queries[torch.linspace(0, len(queries) - 1, min(QUERIES, len(queries))).long()]
    places = torch.full_like(found.roles, -1)
    places[gallery] = torch.arange(len(gallery), device=gallery.device)
    vectors = found.embeddings.float()
    scores, indices = nearest(vectors[chosen], vectors[gallery], NEIGHBOURS, found.similarity, places[chosen])
    rows = []
    for query, values, order in zip(chosen.tolist(), scores.tolist(), gallery[indices].tolist(), strict=True):
        own, *others = (int(found.labels[index]) for index in (query, *order))
        shown = [
            Neighbour(image=image(index), score=score, right=label == own, title=_name(label, names))
            for score, index, label in zip(values, order, others, strict=True)
            if index != query
        ]
        rows.append(NeighbourRow(image=image(query), title=_name(own, names), neighbours=shown))
    return rows


def _name(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None else names[label]


def draw_classes(vectors: Tensor, labels: Tensor, names: Sequence[str] | None, path: Path) -> None:
    """Draw the embeddings of the first classes in two dimensions.

    Args:
        vectors: Embeddings (N, d), prepared as they are compared.
        labels: (N,).
        names: Name of each label; None for its number.
        path: The PNG file.
    """
    some = torch.isin(labels, labels.unique()[:CLASSES])
    if some.sum() >= 3:
        embedding_plot(vectors[some], labels[some], path, names)
