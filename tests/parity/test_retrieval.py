"""Retrieval scores and hyperbolic distances (reference part D) against the authors' public evaluators."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.test_parity import FILES, read
from vispeft.metrics import Hyperbolic, nearest, retrieval_scores

CLAIMED = [path for path in FILES if path.stem.startswith("retrieval_")]
"""The files checked here."""
EXACT = 1e-6
"""Scores are counts and ratios of counts."""
OURS = {
    "mean_average_precision_at_r": "map@r",
    "r_precision": "r_precision",
    "mean_reciprocal_rank": "mrr",
    "precision_at_1": "recall@1",
}
"""Our names for those of pytorch-metric-learning."""


def contents(stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = next((path for path in FILES if path.stem == stem), None)
    if path is None:
        pytest.skip(f"there is no {stem}.safetensors")
    return read(path)


def check_recall(found: dict[str, float], wanted: dict[str, float]) -> None:
    for k, value in wanted.items():
        assert found[f"recall@{k}"] == pytest.approx(value, abs=EXACT), k


def check_library(found: dict[str, float], wanted: dict[str, float]) -> None:
    for theirs, ours in OURS.items():
        assert found[ours] == pytest.approx(wanted[theirs], abs=EXACT), theirs


def test_zero_shot() -> None:
    meta, tensors = contents("retrieval_zeroshot")
    embeddings, labels, results = tensors["embeddings"], tensors["labels"], meta["results"]
    found = retrieval_scores(embeddings, labels, ks=[1, 2, 4, 8, 16, 32])
    check_recall(found, results["recall_all_queries"])
    check_recall(found, {k.partition("@")[2]: v for k, v in results["vptsp"].items() if k.startswith("e_recall@")})
    assert found["lone_queries"] == results["singletons"]
    check_library(retrieval_scores(embeddings, labels, lone="drop"), results["pml"])
    scores, indices = nearest(embeddings, embeddings, 10, own=torch.arange(len(embeddings)))
    assert torch.equal(indices, tensors["knn_indices"])
    torch.testing.assert_close(scores, tensors["knn_scores"], rtol=0, atol=EXACT)


def test_large_k() -> None:
    meta, tensors = contents("retrieval_large_k")
    results = meta["results"]
    found = retrieval_scores(tensors["embeddings"], tensors["labels"], ks=[1, 10, 100, 1000], ties=True)
    check_recall(found, results["proxy_anchor_SOP_R"])
    for bound in ("low", "high"):
        check_recall(found, {f"{k}_{bound}": value for k, value in results[f"recall_{bound[:2]}"].items()})
    check_library(retrieval_scores(tensors["embeddings"], tensors["labels"], lone="drop"), results["pml"])


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("source", ["embeddings", "lattice"])
def test_ties(source: str, scale: float) -> None:
    meta, tensors = contents("retrieval_ties")
    low, high = meta["results"]["recall_lo"], meta["results"]["recall_hi"]
    found = retrieval_scores(tensors[source] * scale, tensors["labels"], ks=list(map(int, low)), ties=True)
    for k in low:
        bounds = [low[k], found[f"recall@{k}_low"], found[f"recall@{k}"], found[f"recall@{k}_high"], high[k]]
        assert all(one <= other + EXACT for one, other in pairwise(bounds)), (k, bounds)


@pytest.mark.parametrize("gallery", ["gallery", "gallery_lone"])
def test_query_and_gallery(gallery: str) -> None:
    meta, tensors = contents("retrieval_query_gallery")
    sides = [tensors[name] for name in ("query", "query_labels", gallery, f"{gallery}_labels")]
    results = meta["results"] if gallery == "gallery" else meta["results_lone"]
    found = retrieval_scores(*sides, ks=[1, 2, 4, 8, 10, 20, 30, 40, 50])
    check_recall(found, results["vptsp_R"])
    check_recall(found, results.get("recall") or results["recall_all_queries"])
    check_recall(found, results.get("proxy_anchor_inshop_R", {}))
    assert found["lone_queries"] == results.get("lone_queries", 0)
    check_library(retrieval_scores(*sides, lone="drop"), results["pml"])


def test_hyperbolic_distances() -> None:
    _, tensors = contents("vptsp_peer_losses")
    similarity = Hyperbolic()
    points = similarity.prepare(tensors["features"])
    torch.testing.assert_close(points, tensors["hyp.points"], rtol=1e-5, atol=1e-6)
    distances = -similarity.scores(points, points)
    off = ~torch.eye(len(points), dtype=torch.bool)
    torch.testing.assert_close(distances[off], tensors["hyp.dist"][off], rtol=1e-3, atol=1e-5)
