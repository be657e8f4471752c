import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from vispeft.errors import ConfigError, DataError
from vispeft.metrics import RetrievalScores, clustering_scores, ranking, retrieval_scores
from vispeft.metrics.retrieval import BOTH, GALLERY, QUERY

LIBRARY = {
    "mean_average_precision_at_r": "map@r",
    "r_precision": "r_precision",
    "mean_reciprocal_rank": "mrr",
    "precision_at_1": "recall@1",
}


def samples(count=90, classes=12, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + 0.8 * torch.randn(count, dim, generator=generator), labels


def by_definition(scores, labels, gallery_labels, ks, own=None, lone="count_as_miss"):
    """Sort the whole gallery for each query, in plain Python."""
    rows, alone = [], 0
    for query, row in enumerate(scores.tolist()):
        others = [index for index in range(len(row)) if own is None or index != own[query]]
        others.sort(key=lambda index: (-row[index], index))
        hits = [bool(gallery_labels[index] == labels[query]) for index in others]
        r = sum(hits)
        alone += r == 0
        if r == 0 and lone == "drop":
            continue
        found = {f"recall@{k}": float(any(hits[:k])) for k in ks}
        found["r_precision"] = sum(hits[:r]) / max(r, 1)
        found["map@r"] = sum(sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]) / max(r, 1)
        found["mrr"] = 1 / (1 + hits.index(True)) if r else 0.0
        rows.append(found)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {"queries": len(scores), "lone_queries": alone}


@pytest.mark.parametrize("lone", ["count_as_miss", "drop"])
@pytest.mark.parametrize("block", [1, 9000, 2**27])
def test_equals_the_definition_whatever_the_size_of_a_block(monkeypatch, block, lone):
    monkeypatch.setattr(ranking, "BLOCK", block)
    embeddings, labels = samples()
    labels[:3] = torch.tensor([20, 21, 22])  # queries without a relevant neighbour
    embeddings[10:14] = embeddings[5].clone()
    embeddings[30:60] = (2 * embeddings[30:60]).round()
    embeddings = embeddings.mul(4).round()  # of whole numbers products are exact, and many of them equal
    ks = (1, 3, 10, 200)
    found = retrieval_scores(embeddings, labels, ks=ks, lone=lone, similarity="dot")
    scores = embeddings @ embeddings.T
    assert len(scores.unique()) < scores.numel() / 10
    assert found == pytest.approx(by_definition(scores, labels, labels, ks, range(len(labels)), lone), abs=1e-9)
    assert found["lone_queries"] == 3


@pytest.mark.parametrize("similarity", ["cosine", "dot", "hyperbolic"])
def test_agrees_with_the_definition_for_queries_in_a_gallery_of_their_own(similarity):
    (queries, labels), (gallery, gallery_labels) = samples(20, seed=1), samples(50, seed=2)
    gallery_labels[gallery_labels == 1] = 4
    scorer = ranking.make_similarity(similarity)
    scores = scorer.scores(scorer.prepare(queries), scorer.prepare(gallery))
    found = retrieval_scores(queries, labels, gallery, gallery_labels, ks=(1, 5), similarity=similarity)
    assert found == pytest.approx(by_definition(scores, labels, gallery_labels, (1, 5)), abs=1e-9)
    assert found["lone_queries"] == (labels == 1).sum() > 0


def test_agrees_with_pytorch_metric_learning_on_data_without_ties():
    embeddings, labels = samples(120, classes=20)
    calculator = AccuracyCalculator(include=tuple(LIBRARY), k=len(labels) - 1, knn_func=CustomKNN(CosineSimilarity()))
    theirs = calculator.get_accuracy(embeddings, labels)
    ours = retrieval_scores(embeddings, labels, lone="drop")
    assert {name: ours[name] for name in LIBRARY.values()} == pytest.approx(
        {ours: theirs[name] for name, ours in LIBRARY.items()}, abs=1e-6
    )


def test_copies_of_the_query_do_not_stand_for_itself():
    embeddings = torch.eye(4).repeat(2, 1)
    found = retrieval_scores(embeddings, torch.arange(8), ties=True)
    assert found["recall@1_high"] == found["mrr"] == 0  # each query's copy is of another class
    labels = torch.arange(4).repeat(2)
    found = retrieval_scores(embeddings, labels, ties=True)
    assert found["recall@1_low"] == found["map@r"] == 1


def test_ties_are_ordered_by_index_and_bounded_by_both_orders():
    gallery = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    for labels, first in (([7, 0, 0, 0], 1), ([0, 7, 0, 0], 2), ([0, 0, 7, 7], 3)):
        labels = torch.tensor(labels)
        found = retrieval_scores(gallery[:1], torch.tensor([7]), gallery, labels, ks=(1, 2, 3), ties=True)
        assert found["mrr"] == 1 / first
        assert [found[f"recall@{k}"] for k in (1, 2, 3)] == [float(k >= first) for k in (1, 2, 3)]
        assert [found[f"recall@{k}_low"] for k in (1, 2, 3)] == [0, 0, 1]
        assert [found[f"recall@{k}_high"] for k in (1, 2, 3)] == [1, 1, 1]


def test_large_labels_and_other_types_of_embeddings_change_nothing():
    embeddings, labels = samples()
    wanted = retrieval_scores(embeddings.half().float(), labels)
    assert retrieval_scores(embeddings.half(), labels + 2**24) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_scores(embeddings.half(), labels) == wanted
    close = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert retrieval_scores(close, 2**24 + torch.tensor([0, 1, 0, 1]))["recall@1"] == 0


def collected(order, **settings):
    (queries, labels), (gallery, gallery_labels) = samples(20, seed=1), samples(50, seed=2)
    embeddings, labels = torch.cat([queries, gallery]), torch.cat([labels, gallery_labels])
    roles = torch.tensor([QUERY] * 20 + [GALLERY] * 50)
    metric = RetrievalScores(**settings)
    for part in order.split(16):
        metric.update(embeddings[part], labels[part], roles[part], part)
    return metric


def test_the_accumulator_gives_the_figures_of_all_samples_once():
    (queries, labels), (gallery, gallery_labels) = samples(20, seed=1), samples(50, seed=2)
    wanted = retrieval_scores(queries, labels, gallery, gallery_labels, ks=(1, 10))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    metric = collected(torch.cat([order, order[:9]]), ks=(1, 10))  # a sampler gave nine of them twice
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(wanted, abs=1e-6)
    metric.reset()
    metric.update(queries, labels, torch.full((20,), BOTH))
    alone = {name: value.item() for name, value in metric.compute().items()}
    assert alone == pytest.approx(retrieval_scores(queries, labels, ks=(1, 10)), abs=1e-6)


def test_queries_that_are_in_the_gallery_too_are_left_out_by_index():
    metric = RetrievalScores(ks=(1,))
    vectors = torch.tensor([[1.0, 0.1], [1, 0], [0, 1], [1, 0]])
    metric.update(vectors, torch.tensor([1, 5, 1, 5]), torch.tensor([GALLERY, BOTH, QUERY, BOTH]))
    found = metric.compute()
    assert found["queries"] == 3
    assert found["recall@1"].item() == pytest.approx(1)
    metric = RetrievalScores(ks=(1,))
    metric.update(vectors, torch.tensor([1, 5, 1, 6]), torch.tensor([GALLERY, BOTH, QUERY, BOTH]))
    assert metric.compute()["lone_queries"] == 2


def test_clusters_are_those_of_the_classes_where_these_are_far_apart():
    labels = torch.arange(5).repeat_interleave(6) + 100
    embeddings = torch.eye(5)[labels - 100] + 0.01 * torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    assert clustering_scores(embeddings, labels) == pytest.approx({"nmi": 1, "ami": 1})
    metric = RetrievalScores(clusters=True)
    metric.update(embeddings, labels.flip(0).roll(3))
    assert 0 < metric.compute()["nmi"] < 1


def test_nothing_to_count_gives_nan():
    found = retrieval_scores(torch.eye(3), torch.arange(3), lone="drop")
    assert math.isnan(found["recall@1"])
    assert math.isnan(found["map@r"])
    assert found["lone_queries"] == 3


def test_input_that_cannot_work_is_refused():
    embeddings, labels = samples(6)
    broken = embeddings.clone()
    broken[2, 1] = math.nan
    for arguments, error, message in (
        ((embeddings, labels, embeddings), ConfigError, "labels"),
        ((embeddings, labels, None, labels), ConfigError, "labels"),
        ((embeddings, labels[:5]), DataError, r"shape \(5,\)"),
        ((embeddings, labels.float()), DataError, "integers"),
        ((broken, labels), DataError, "1 of 6 embeddings of the queries are not finite"),
        ((embeddings, labels, embeddings[:, :3], labels), DataError, "8 dimensions and the gallery has 3"),
        ((embeddings[:0], labels[:0]), DataError, "at least one"),
    ):
        with pytest.raises(error, match=message):
            retrieval_scores(*arguments)
    for settings in (
        {"ks": ()},
        {"ks": (0,)},
        {"ks": (1.5,)},
        {"ks": 1},
        {"lone": "keep"},
        {"similarity": "cosin"},
        {"similarity": {"name": "dot", "c": 1}},
    ):
        with pytest.raises(ConfigError):
            retrieval_scores(embeddings, labels, **settings)
    assert retrieval_scores(embeddings, labels, ks=torch.tensor([1, 2])).keys() >= {"recall@1", "recall@2"}
    for arguments, message in (((broken, labels), "not finite"), ((embeddings, labels[:5]), "6 integers")):
        with pytest.raises(DataError, match=message):
            clustering_scores(*arguments)
    metric = RetrievalScores()
    with pytest.raises(DataError, match="No embeddings"), pytest.warns(UserWarning, match="before the ``update``"):
        metric.compute()
    with pytest.raises(DataError, match="roles"):
        metric.update(embeddings, labels, labels + 3)
    metric.update(embeddings, labels, torch.full_like(labels, QUERY))
    with pytest.raises(DataError, match="no gallery"):
        metric.compute()
