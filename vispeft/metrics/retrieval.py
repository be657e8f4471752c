"""Exact retrieval scores on torch: R@K, MAP@R, R-precision and MRR, in blocks of bounded memory.

Definitions: R@K as in the literature of metric learning (Proxy-Anchor, Hyp-ViT), over all queries; MAP@R and
R-precision as in Musgrave et al., A Metric Learning Reality Check, ECCV 2020. All of them follow from the ranks of the
relevant neighbours, so that no list of K neighbours is made: the scores above that of the first relevant one are
counted, which takes the same time for any K.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vispeft.data.metric_listing import BOTH, GALLERY, QUERY
from vispeft.errors import ConfigError, DataError
from vispeft.metrics.ranking import Ranking, first_in_order
from vispeft.metrics.similarity import Similarity, make_similarity
from vispeft.metrics.sums import sum_type

__all__ = ["BOTH", "GALLERY", "QUERY", "RetrievalScores", "check_figures", "clustering_scores", "retrieval_scores"]

Lone = Literal["count_as_miss", "drop"]
"""Treatment of queries without a relevant neighbour."""
CACHED = 2**20
"""Scores that are compared at once on a CPU, so that the comparison stays in its cache: four times as fast as whole
blocks, and as narrow columns of them. Fewer take longer where threads wait for each other on a busy machine."""


def retrieval_scores(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    similarity: str | Similarity = "cosine",
    lone: Lone = "count_as_miss",
    ties: bool = False,
) -> dict[str, float]:
    """Measure how well neighbours have the label of their query.

    Neighbours are ordered by score, the largest first, and by index among equal scores. Without a gallery each query is
    compared with all others, and left out by its index.

    Args:
        queries: Embeddings (Q, d) of any floating-point type; they are ranked in float32.
        labels: Integer labels (Q,).
        gallery: Embeddings (N, d); None for the queries themselves.
        gallery_labels: Integer labels (N,), of the same table as those of the queries.
        ks: The K of R@K.
        similarity: ``cosine``, ``dot``, ``hyperbolic``, or a similarity.
        lone: How to treat queries without a relevant neighbour: ``count_as_miss`` counts them as 0 in each figure, as
            the literature does in R@K; ``drop`` leaves them out, as pytorch-metric-learning does.
        ties: Whether to give also the least and the largest R@K over all orders of equal scores.

    Returns:
        From 0 to 1: ``recall@K``, the share of queries with a relevant one among the first K neighbours (with ties also
        ``recall@K_low`` and ``recall@K_high``); ``map@r``, ``r_precision`` and ``mrr`` (mean reciprocal rank of the
        first relevant one); NaN if no query counts. And the numbers ``queries`` and ``lone_queries``.

    Raises:
        ConfigError: If settings cannot work, or labels of the gallery are missing.
        DataError: If embeddings or labels do not fit, or are not finite.
    """
    ks, own = check_figures(ks, lone), None
    if gallery is None and gallery_labels is None:
        gallery, gallery_labels = queries, labels
        own = torch.arange(len(queries), device=queries.device)
    if gallery is None or gallery_labels is None:
        raise ConfigError("A gallery needs both embeddings and labels; only one of them was given.")
    ranking = Ranking(queries=queries, gallery=gallery, own=own, similarity=make_similarity(similarity))
    return _figures(_ranks(ranking, labels, gallery_labels), ks, lone, ties)


@dataclass
class _Ranks:
    """What the figures need of each query (Q,)."""

    relevant: Tensor
    """Number of relevant neighbours."""
    first: Tensor
    """Rank of the first relevant one, from 1; meaningless where there is none, like the next two."""
    low: Tensor
    """Its smallest rank over all orders of equal scores."""
    high: Tensor
    """Its largest rank over all orders of equal scores."""
    map_at_r: Tensor
    """Sum over the first R ranks of precision where a relevant one stands, divided by R."""
    r_precision: Tensor
    """Share of relevant ones among the first R."""


def check_figures(ks: Sequence[int], lone: str) -> tuple[int, ...]:
    """Return the K, once each, if the settings of the figures can work.

    Args:
        ks: The K of R@K.
        lone: How to treat queries without a relevant neighbour.

    Raises:
        ConfigError: If they cannot.
    """
    try:
        found = tuple(dict.fromkeys(operator.index(k) for k in ks))
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"ks={ks!r}: whole numbers from 1 on are needed, such as (1, 2, 4, 8).")
    if lone not in ("count_as_miss", "drop"):
        raise ConfigError(f"lone={lone!r}: choose 'count_as_miss' or 'drop'.")
    return found


def _figures(ranks: _Ranks, ks: Sequence[int], lone: Lone, ties: bool) -> dict[str, float]:
    """Average over queries."""
    met = ranks.relevant > 0
    counted = met if lone == "drop" else torch.ones_like(met)

    def mean(values: Tensor) -> float:
        values = values.to(sum_type()).where(met, 0)[counted]
        return float(values.mean()) if len(values) else math.nan

    found = {}
    for k in ks:
        found[f"recall@{k}"] = mean(ranks.first <= k)
        if ties:
            found |= {f"recall@{k}_low": mean(ranks.high <= k), f"recall@{k}_high": mean(ranks.low <= k)}
    found |= {"map@r": mean(ranks.map_at_r), "r_precision": mean(ranks.r_precision)}
    found["mrr"] = mean(1 / ranks.first.to(sum_type()))
    return found | {"queries": float(len(met)), "lone_queries": float((~met).sum())}


def _check_labels(side: str, labels: Tensor, rows: Tensor) -> None:
    if labels.shape != rows.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"The labels of the {side} have the shape {tuple(labels.shape)} and the type {labels.dtype}; "
            f"{len(rows)} integers are needed."
        )


def _ranks(ranking: Ranking, labels: Tensor, gallery_labels: Tensor) -> _Ranks:
    """Rank relevant neighbours, block by block."""
    _check_labels("queries", labels, ranking.queries)
    _check_labels("gallery", gallery_labels, ranking.gallery)
    device = ranking.gallery.device
    _, numbers = torch.cat([labels.to(device).long(), gallery_labels.to(device).long()]).unique(return_inverse=True)
    labels, gallery_labels = numbers[: len(labels)], numbers[len(labels) :]
    members = _Members(gallery_labels, int(numbers.max()) + 1)
    parts = []
    for place, scores in ranking.blocks():
        own = None if ranking.own is None else ranking.own[place]
        parts.append(_rank_block(scores, labels[place], gallery_labels, members.of(labels[place], own)))
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in _Ranks.__dataclass_fields__)
    return _Ranks(*columns)


class _Members:
    """The samples of each class in the gallery."""

    def __init__(self, labels: Tensor, classes: int) -> None:
        self._order = labels.argsort(stable=True)  # within a class by index
        self._counts = labels.bincount(minlength=classes)
        self._starts = self._counts.cumsum(0) - self._counts

    def of(self, labels: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the indices of each query's relevant ones (rows, P), and whether an entry is one."""
        counts = self._counts[labels]
        places = torch.arange(max(1, int(counts.max())), device=labels.device).expand(len(labels), -1)
        last = len(self._order) - 1
        indices = self._order[(self._starts[labels][:, None] + places).clamp_(max=last)]
        valid = places < counts[:, None]
        return indices, valid if own is None else valid & (indices != own[:, None])


def _rank_block(scores: Tensor, labels: Tensor, gallery_labels: Tensor, relevant: tuple[Tensor, Tensor]) -> _Ranks:
    """Rank the relevant ones of some queries by their scores (rows, N)."""
    indices, valid = relevant
    own = scores.gather(1, indices).masked_fill_(~valid, -torch.inf)
    best = own.amax(1, keepdim=True)
    among = valid & (own == best)
    above, equal = _count_above(scores, best)
    low = 1 + above
    high = low + equal - among.sum(1)
    first = low.clone()
    index = indices.masked_fill(~among, scores.shape[1]).amin(1)
    for row in (high > low).nonzero().flatten().tolist():  # a tie with others: those of lower index stand in front
        first[row] += (scores[row, : index[row]] == best[row]).sum()
    counts = valid.sum(1)
    nothing = torch.zeros(len(scores), dtype=sum_type(), device=scores.device)
    ranks = _Ranks(counts, first, low, high, nothing, nothing.clone())
    rows = ((counts > 0) & (first <= counts)).nonzero().flatten()  # the others have no relevant one among the first R
    if len(rows):
        most = int(counts[rows].max())
        few = 2 * len(rows) < len(scores)  # a copy of more rows takes longer than the search in all of them
        found = first_in_order(scores[rows], most) if few else first_in_order(scores, most)[rows]
        hits = gallery_labels[found] == labels[rows, None]
        ranks.map_at_r[rows], ranks.r_precision[rows] = _precisions(hits, counts[rows])
    return ranks


def _count_above(scores: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Count in each row the scores above one of its scores (rows, 1), and those equal to it."""
    rows = max(1, CACHED // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    compared = torch.empty_like(scores[:rows])
    above, reached = (torch.empty(len(scores), dtype=torch.long, device=scores.device) for _ in range(2))
    for start in range(0, len(scores), rows):
        place = slice(start, start + rows)
        buffer = compared[: len(scores[place])]
        # Floats, of which sums are much faster than those of booleans; they are exact up to 2^24.
        above[place] = torch.gt(scores[place], best[place], out=buffer).sum(1)
        reached[place] = torch.ge(scores[place], best[place], out=buffer).sum(1)
    return above, reached - above


def _precisions(hits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute average and final precision of the first R ranks from hits (rows, k), R (rows,)."""
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (ranks <= counts[:, None])
    precision = hits.cumsum(1).to(sum_type()) / ranks
    return precision.where(hits, 0).sum(1) / counts, hits.sum(1).to(sum_type()) / counts


def _rows_at(values: Tensor, places: Tensor) -> Tensor:
    """Select rows, without a copy where all are selected in their order."""
    whole = len(places) == len(values) and bool((places.diff() > 0).all())
    return values if whole else values[places]


def clustering_scores(
    embeddings: Tensor, labels: Tensor, similarity: str | Similarity = "cosine", seed: int = 0
) -> dict[str, float]:
    """Compare the clusters of k-means with the classes. The figures depend on the seed: report them, choose by others.

    Args:
        embeddings: (N, d).
        labels: Integer labels (N,); k is the number of different ones.
        similarity: Prepares the embeddings (cosine: divides by the length); the distance of k-means is Euclidean.
        seed: Seed of the start (k-means++).

    Returns:
        ``nmi``, normalised mutual information by the arithmetic mean, from 0 to 1, and ``ami``, adjusted for chance, at
        most 1.

    Raises:
        DataError: If embeddings or labels do not fit, or are not finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    chosen = make_similarity(similarity)
    Ranking(queries=embeddings, gallery=embeddings, similarity=chosen)  # checks them
    _check_labels("embeddings", labels, embeddings)
    points = chosen.prepare(embeddings.detach().float()).cpu().numpy()
    _, classes = labels.cpu().unique(return_inverse=True)
    clusters = KMeans(int(classes.max()) + 1, n_init=1, random_state=seed).fit_predict(points)
    scores = {"nmi": normalized_mutual_info_score, "ami": adjusted_mutual_info_score}
    return {name: float(score(classes.numpy(), clusters)) for name, score in scores.items()}


class RetrievalScores(Metric):
    """Collects the embeddings of a split, and gives the figures of `retrieval_scores` on all of them.

    With several processes, each collects its share, and `compute` drops the copies by which a sampler evens the shares
    out, by their index in the split.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    embeddings: list[Tensor]
    labels: list[Tensor]
    roles: list[Tensor]
    index: list[Tensor]

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8),
        similarity: str | Similarity = "cosine",
        lone: Lone = "count_as_miss",
        ties: bool = False,
        clusters: bool = False,
        **settings: Any,
    ) -> None:
        """Create the metric without samples.

        Args:
            ks: The K of R@K.
            similarity: ``cosine``, ``dot``, ``hyperbolic``, or a similarity.
            lone: See `retrieval_scores`.
            ties: Whether to give also the least and the largest R@K over all orders of equal scores.
            clusters: Whether to give also the figures of `clustering_scores`, which take long for many classes.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If settings cannot work.
        """
        super().__init__(**settings)
        self.ks, self.lone, self.ties, self.clusters = check_figures(ks, lone), lone, ties, clusters
        self.similarity = make_similarity(similarity)
        for name in ("embeddings", "labels", "roles", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, embeddings: Tensor, labels: Tensor, roles: Tensor | None = None, index: Tensor | None = None
    ) -> None:
        """Add the samples of a batch.

        Args:
            embeddings: (B, d); kept in float32.
            labels: Integer labels (B,) of one table for all samples.
            roles: `BOTH`, `QUERY` or `GALLERY` of each (B,); None if all are both.
            index: Index of each in the split (B,); None counts them as they come, which several processes cannot.

        Raises:
            ConfigError: If several processes collect without an index.
            DataError: If labels, roles or indices do not fit.
        """
        if index is None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise ConfigError("Several processes collect embeddings: give update() the index of each sample.")
            start = sum(map(len, self.labels))
            index = torch.arange(start, start + len(labels), device=labels.device)
        roles = torch.full_like(labels, BOTH) if roles is None else roles
        for name, found in (("labels", labels), ("roles", roles), ("index", index)):
            if found.shape != embeddings.shape[:1]:
                raise DataError(f"{name} has the shape {tuple(found.shape)}; {len(embeddings)} numbers are needed.")
        if ((roles < BOTH) | (roles > GALLERY)).any():
            raise DataError(
                f"roles has the values {roles.unique().tolist()}; 0 (both), 1 (query) and 2 (gallery) exist."
            )
        self.embeddings.append(embeddings.detach().float())
        self.labels.append(labels.long())
        self.roles.append(roles.long())
        self.index.append(index.long())

    def collected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings (N, d), labels (N,) and roles (N,) by their index in the split, each sample once.

        Raises:
            DataError: If there are none.
        """
        if not len(self.labels):  # a list, or one tensor once several processes have been gathered
            raise DataError("No embeddings were collected, so there is nothing to rank. Is the split empty?")
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        once = torch.ones_like(index, dtype=torch.bool)
        once[1:] = index[order].diff() > 0
        kept = order[once]
        embeddings, labels, roles = (
            _rows_at(dim_zero_cat(s), kept) for s in (self.embeddings, self.labels, self.roles)
        )
        return embeddings, labels, roles

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of `retrieval_scores`, and of `clustering_scores` if wanted.

        Raises:
            DataError: If there are no queries, or no gallery, or embeddings are not finite.
        """
        embeddings, labels, roles = self.collected()
        queries, gallery = (roles != GALLERY).nonzero().flatten(), (roles != QUERY).nonzero().flatten()
        for side, found in (("queries", queries), ("gallery", gallery)):
            if not len(found):
                raise DataError(f"The {len(roles)} samples of the split have no {side}, so nothing can be ranked.")
        places = torch.full_like(roles, -1)
        places[gallery] = torch.arange(len(gallery), device=roles.device)
        ranking = Ranking(
            queries=_rows_at(embeddings, queries),
            gallery=_rows_at(embeddings, gallery),
            own=places[queries],
            similarity=self.similarity,
        )
        found = _figures(_ranks(ranking, labels[queries], labels[gallery]), self.ks, self.lone, self.ties)
        if self.clusters:
            found |= clustering_scores(embeddings, labels, self.similarity)
        return {name: torch.tensor(value, device=embeddings.device) for name, value in found.items()}
