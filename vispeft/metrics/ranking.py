"""Exact ranking of a gallery for each query, a few queries at a time: no approximation, and bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vispeft.errors import ConfigError, DataError, counted
from vispeft.metrics.similarity import Similarity, make_similarity

__all__ = ["Ranking", "exact_copies", "first_in_order", "nearest"]

BLOCK = 128 * 2**20
"""Bytes of the scores that are held at once. A ranking with few classes needs seven times as much, for the indices and
scores of the relevant ones; with many small classes, twice as much."""
SAMPLED = 8
"""Columns by which rows that have no copy are told apart, before whole rows are hashed."""
HASHED = 2**17
"""Numbers that are hashed at once, so that they stay in the processor's cache."""
STEP = 0x9E3779B97F4A7C15 - 2**64
"""Odd constant of the hash of rows: 2^64 divided by the golden ratio (Knuth, TAOCP 3, section 6.4), as int64."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Queries and the gallery in which their neighbours are looked for.

    Scores are computed in float32, whatever the type of the embeddings and the settings of torch (autocast, TF32).
    The order is by score, the largest first, and by the index in the gallery among equal scores. A query that is in the
    gallery itself is no neighbour of itself; it is left out by its index. Copies of an embedding get equal scores.
    """

    queries: Tensor
    """Embeddings (Q, d)."""
    gallery: Tensor
    """Embeddings (N, d)."""
    own: Tensor | None = None
    """Index of each query in the gallery (Q,), -1 for one that is not there; None if none is."""
    similarity: Similarity

    def __post_init__(self) -> None:
        """Check the embeddings.

        Raises:
            DataError: If they have no rows, do not fit, or are not finite, or `own` has other indices.
        """
        for side, found in (("queries", self.queries), ("gallery", self.gallery)):
            if found.ndim != 2 or not found.is_floating_point() or not found.numel():
                raise DataError(
                    f"The {side} have the shape {tuple(found.shape)} and the type {found.dtype}; embeddings (N, d) of "
                    "floating-point numbers are needed, at least one."
                )
            if not all(edge.isfinite() for edge in found.aminmax()):  # one pass; NaN is passed on
                broken = int((~found.isfinite()).any(1).sum())
                raise DataError(
                    f"{broken} of {counted(len(found), 'embedding')} of the {side} are not finite, so they have no "
                    "neighbours. Did the training diverge?"
                )
        if self.queries.shape[1] != self.gallery.shape[1]:
            raise DataError(
                f"Queries have {self.queries.shape[1]} dimensions and the gallery has {self.gallery.shape[1]}. "
                "Were they embedded by the same model?"
            )
        if self.own is not None:
            self._check_own(self.own)

    def _check_own(self, own: Tensor) -> None:
        whole = not (own.is_floating_point() or own.is_complex() or own.dtype == torch.bool)
        if own.shape != self.queries.shape[:1] or not whole or own.min() < -1 or own.max() >= len(self.gallery):
            raise DataError(
                f"own has the shape {tuple(own.shape)} and the type {own.dtype}; {len(self.queries)} indices of a "
                f"gallery of {len(self.gallery)} are needed, -1 for a query that is not there."
            )

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scores of some queries after the others.

        Yields:
            The place of the queries, and their scores (rows, N), float32, -inf for a query itself.
        """
        with _full_precision(self.gallery.device):
            gallery = self.similarity.prepare(self.gallery.float())
            copies, firsts = exact_copies(gallery)
        rows = max(1, BLOCK // (self.similarity.working * len(gallery)))
        for start in range(0, len(self.queries), rows):
            place = slice(start, start + rows)
            with _full_precision(self.gallery.device):  # not around the yield: the caller has settings of its own
                scores = self.similarity.scores(self.similarity.prepare(self.queries[place].float()), gallery)
                if len(copies):
                    scores[:, copies] = scores[:, firsts]
                if self.own is not None:
                    present = (self.own[place] >= 0).nonzero().flatten()
                    scores[present, self.own[place][present]] = -torch.inf
            yield place, scores


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep products of matrices in float32 while a block of code runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_copies(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Find rows that are equal to an earlier row.

    A product of matrices may give equal columns scores that differ in the last digit, depending on their places.

    Args:
        embeddings: (N, d), float32.

    Returns:
        Indices of the copies, and of the first row that each is equal to.
    """
    hashes = _hashes(embeddings[:, :: max(1, embeddings.shape[1] // SAMPLED)])
    _, inverse, counts = hashes.unique(return_inverse=True, return_counts=True)
    suspects = (counts[inverse] > 1).nonzero().flatten()  # ascending; none in most sets of embeddings
    rows = embeddings[suspects]
    hashes = _hashes(rows)
    order = hashes.argsort(stable=True)
    _, inverse, counts = hashes[order].unique_consecutive(return_inverse=True, return_counts=True)
    firsts = order[counts.cumsum(0) - counts][inverse]
    later = (order != firsts).nonzero().flatten()
    copies, firsts = order[later], firsts[later]
    equal = (rows[copies] == rows[firsts]).all(1)
    return suspects[copies[equal]], suspects[firsts[equal]]


def _hashes(rows: Tensor) -> Tensor:
    """Compute a number of 64 bits for each row (N, d) of float32: equal rows have equal ones."""
    factors = torch.arange(1, rows.shape[1] + 1, device=rows.device) * STEP | 1
    hashes = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    count = max(1, HASHED // rows.shape[1])
    for place, part in zip(hashes.split(count), rows.split(count), strict=True):
        bits = (part + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
        torch.sum(bits.mul_(factors), 1, out=place)
    return hashes


def first_in_order(scores: Tensor, count: int) -> Tensor:
    """Find the columns of the largest scores of each row: the largest first, and lower indices first among equal ones.

    Args:
        scores: (Q, N).
        count: Number of columns, 1 to N.

    Returns:
        Indices (Q, count).
    """
    wide = min(count + 1, scores.shape[1])
    values, found = scores.topk(wide, dim=1)
    tied = values[:, 1:] == values[:, :-1]
    for row in tied.any(1).nonzero().flatten().tolist():
        beyond = wide > count and tied[row, count - 1]  # columns that were not found may be as large as the last one
        by_index = (scores[row] >= values[row, -1]).nonzero().flatten() if beyond else found[row, :count].sort().values
        found[row, :count] = by_index[scores[row, by_index].sort(descending=True, stable=True).indices[:count]]
    return found[:, :count]


def nearest(
    queries: Tensor,
    gallery: Tensor,
    count: int,
    similarity: str | Similarity = "cosine",
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours of each query, exactly.

    Args:
        queries: Embeddings (Q, d).
        gallery: Embeddings (N, d).
        count: Number of neighbours; fewer are returned if the gallery has fewer.
        similarity: Name of a similarity, or a similarity.
        own: Index of each query in the gallery (Q,), -1 for one that is not there; it is no neighbour of itself.

    Returns:
        Scores (Q, k), the largest first, and indices in the gallery (Q, k). With `own`, a query gets itself as the last
        neighbour with the score -inf where the gallery has no other.

    Raises:
        ConfigError: If the count is below 1.
        DataError: If embeddings do not fit or are not finite, or `own` has other indices.
    """
    if count < 1:
        raise ConfigError(f"nearest(count={count}): at least one neighbour is needed.")
    ranking = Ranking(queries=queries, gallery=gallery, own=own, similarity=make_similarity(similarity))
    count = min(count, len(gallery))
    values, indices = [], []
    for _, scores in ranking.blocks():
        found = first_in_order(scores, count)
        indices.append(found)
        values.append(scores.gather(1, found))
    return torch.cat(values), torch.cat(indices)
