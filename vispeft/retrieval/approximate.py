"""Approximate search by faiss (extra `search`): inverted lists and graphs of neighbours, for very large indices."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vispeft.errors import ConfigError
from vispeft.metrics.similarity import Dot, Similarity

__all__ = ["KINDS", "build", "check_kind", "find"]

KINDS = ("exact", "ivf", "hnsw")
"""Kinds of indices: all scores; lists of near embeddings, some of which are searched; a graph of neighbours."""
LEAST = 39
"""Embeddings for each list, below which faiss warns of a poor k-means."""
PROBED = 8
"""One of this many lists is searched, and at least `LEAST_PROBED`."""
LEAST_PROBED = 8
LINKS, BUILDING, SEARCHING = 32, 200, 128
"""Links of each node, and candidates while the graph is built and searched: values of faiss's own guide for high
recall."""


def check_kind(kind: str, similarity: Similarity) -> None:
    """Refuse an index that cannot be built, before anything is embedded.

    Args:
        kind: One of `KINDS`.
        similarity: How embeddings are compared.

    Raises:
        ConfigError: If it is unknown, faiss is not installed, or cannot compare so.
    """
    if kind not in KINDS:
        raise ConfigError(f"--index {kind}: choose {', '.join(KINDS)}.")
    if kind == "exact":
        return
    if not isinstance(similarity, Dot):
        raise ConfigError(
            f"--index {kind}: faiss ranks by dot products, and this run compares by {similarity.name} distance. Leave "
            "--index out."
        )
    _faiss(kind)


def build(kind: str, vectors: Tensor) -> bytes:
    """Build an index.

    Args:
        kind: ``ivf`` or ``hnsw``.
        vectors: Prepared embeddings (N, d), float32; their dot products are the scores.

    Returns:
        The serialised index.
    """
    faiss = _faiss(kind)
    count, width = vectors.shape
    rows = vectors.cpu().numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILDING
    else:
        lists = max(1, min(int(4 * math.sqrt(count)), count // LEAST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
    index.add(rows)
    return bytes(faiss.serialize_index(index))


def find(kind: str, content: bytes, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Search an index.

    Args:
        kind: ``ivf`` or ``hnsw``.
        content: The serialised index.
        queries: Prepared embeddings (Q, d), float32.
        count: Number of neighbours.

    Returns:
        Scores (Q, count) and indices (Q, count); -inf and -1 where fewer were found.
    """
    faiss = _faiss(kind)
    index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    faiss.omp_set_num_threads(torch.get_num_threads())
    if kind == "hnsw":
        index.hnsw.efSearch = max(SEARCHING, 2 * count)
    else:
        index.nprobe = max(LEAST_PROBED, index.nlist // PROBED)
    scores, indices = (torch.from_numpy(found) for found in index.search(queries.cpu().numpy(), count))
    return scores.masked_fill(indices < 0, -torch.inf), indices


def _faiss(kind: str) -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError(
            f"An index of the kind {kind} needs faiss, which cannot be imported ({error}). Install the extra: "
            'pip install "vispeft[search]". The exact index needs nothing.'
        ) from error
