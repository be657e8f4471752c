"""Search of an index: neighbours of embedded queries, and how they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispeft.errors import DataError, FileError, check_count, counted
from vispeft.metrics.ranking import Ranking, nearest
from vispeft.metrics.similarity import make_similarity
from vispeft.retrieval.approximate import find
from vispeft.retrieval.collection import Collection, file_digest
from vispeft.retrieval.index import Index
from vispeft.storage.tables import as_csv

__all__ = ["Found", "Hit", "neighbours_of", "picture_name", "search_table"]

COLUMNS = ["query", "query_label", "rank", "path", "label", "score", "right"]


@dataclass(frozen=True)
class Hit:
    """One neighbour of a query."""

    path: str
    """Its image file."""
    label: str
    """Its label; empty if not known."""
    score: float
    """Its score, the larger the more similar."""
    right: bool | None
    """Whether it has the query's label; None if one of them is not known."""


@dataclass(frozen=True)
class Found:
    """The neighbours of a query."""

    query: str
    """Its image file."""
    label: str
    """Its label; empty if not known."""
    hits: tuple[Hit, ...]
    """The neighbours, the nearest first."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def neighbours_of(
    index: Index, queries: Collection, embeddings: Tensor, count: int = 10, exact: bool = False
) -> list[Found]:
    """Find the neighbours of queries in an index.

    A query that is an image of the index is no neighbour of itself, and has the label it has there.

    Args:
        index: The index.
        queries: The query images.
        embeddings: Their embeddings (Q, d).
        count: Number of neighbours.
        exact: Whether to compute all scores although the index is an approximate one.

    Raises:
        ConfigError: If the count is out of range.
        DataError: If embeddings do not fit or are not finite.
        FileError: If an image that was found has changed since it was embedded, or is gone.
    """
    check_count("--neighbours", count)
    places = {path: place for place, path in enumerate(map(str, index.collection.paths))}
    own = torch.tensor([places.get(str(path), -1) for path in queries.paths])
    scores, indices = _nearest(index, embeddings, count, own, exact)
    found = []
    for query, path in enumerate(queries.paths):
        label = queries.labels[query] or (index.collection.labels[own[query]] if own[query] >= 0 else "")
        pairs = zip(indices[query].tolist(), scores[query].tolist(), strict=True)
        hits = [_hit(index, place, score, label) for place, score in pairs if score > -torch.inf]
        found.append(Found(str(path), label, tuple(hits)))
    _check_unchanged(index, indices[scores > -torch.inf].unique().tolist())
    return found


def _nearest(index: Index, embeddings: Tensor, count: int, own: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    similarity, gallery = make_similarity(index.model.similarity), index.embeddings
    if exact or index.kind == "exact":
        return nearest(embeddings, gallery, count, similarity, own)
    Ranking(queries=embeddings, gallery=gallery, similarity=similarity)  # checks both
    wide = min(count + 1, len(gallery))
    scores, indices = find(index.kind, index.approximate, similarity.prepare(embeddings.float()), wide)
    few = (indices < 0).any(1)  # lists that were searched, or the part of a graph that was reached, hold too few
    if few.any():
        scores[few], indices[few] = nearest(embeddings[few], gallery, wide, similarity)
    scores = scores.masked_fill(indices == own[:, None], -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, order), indices.gather(1, order)


def _hit(index: Index, place: int, score: float, label: str) -> Hit:
    other = index.collection.labels[place]
    right = other == label if other and label else None
    return Hit(str(index.collection.path(place)), other, score, right)


def _check_unchanged(index: Index, places: Sequence[int]) -> None:
    changed, gone = [], []
    for place in places:
        path = index.collection.path(place)
        try:
            changed += [] if file_digest(path) == index.digests[place] else [str(path)]
        except DataError:
            gone.append(str(path))
    told = [
        f"{counted(len(paths), 'neighbour')} {what} ({', '.join(paths[:5])})"
        for paths, what in ((changed, "changed"), (gone, "cannot be read any more"))
        if paths
    ]
    if told:
        raise FileError(
            f"Since the images were embedded, {' and '.join(told)}, so {index.place} no longer fits them. Embed them "
            "again, or put the files back where they were."
        )


def search_table(found: Sequence[Found]) -> str:
    """Write neighbours as CSV, a line for each.

    Args:
        found: The neighbours of each query.
    """
    words = {None: "", True: "yes", False: "no"}
    rows = [
        [entry.query, entry.label, rank, hit.path, hit.label, f"{hit.score:.6f}", words[hit.right]]
        for entry in found
        for rank, hit in enumerate(entry.hits, start=1)
    ]
    return as_csv([COLUMNS, *rows])


def picture_name(query: str, taken: set[str]) -> str:
    """Choose the name of a query's picture, which no other query has.

    Args:
        query: Its image file.
        taken: Names that are in use; the new one is added.
    """
    stem, number = Path(query).stem, 1
    name = f"{stem}.png"
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    taken.add(name)
    return name
