"""Losses of metric learning against the authors' public code: ``vptsp_losses`` and ``vptsp_peer_losses``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.test_parity import FOLDER, read
from vispeft.losses import Hist, Hyperbolic, RecallAtK
from vispeft.tasks.metric_criterion import MetricCriterion
from vispeft.tasks.metric_losses import metric_loss, metric_miner

CLAIMED = {FOLDER / name for name in ("vptsp_losses.safetensors", "vptsp_peer_losses.safetensors")}
LOSSES, PEERS = sorted(CLAIMED)

needs_losses = pytest.mark.skipif(not LOSSES.is_file(), reason=f"{LOSSES} is not there")
needs_peers = pytest.mark.skipif(not PEERS.is_file(), reason=f"{PEERS} is not there")

CASES: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any], str | None]] = {
    "proxy_anchor": ("ProxyAnchorLoss", {"margin": 0.1, "alpha": 32}, None, {}, "proxies"),
    "multi_similarity_mined": (
        "MultiSimilarityLoss",
        {"alpha": 2, "beta": 50, "base": 0.5},
        "MultiSimilarityMiner",
        {"epsilon": 0.1},
        None,
    ),
    "contrastive": ("ContrastiveLoss", {"neg_margin": 0.5}, None, {}, None),
    "triplet_semihard": (
        "TripletMarginLoss",
        {"margin": 0.1},
        "TripletMarginMiner",
        {"margin": 0.1, "type_of_triplets": "semihard"},
        None,
    ),
    "norm_softmax": ("NormalizedSoftmaxLoss", {"temperature": 0.05}, None, {}, "W"),
    "arcface": ("ArcFaceLoss", {"margin": 28.6, "scale": 64}, None, {}, "W"),
    "softtriple": (
        "SoftTripleLoss",
        {"centers_per_class": 2, "la": 20, "gamma": 0.1, "margin": 0.01},
        None,
        {},
        "fc",
    ),
    "proxy_nca": ("ProxyNCALoss", {"softmax_scale": 32}, None, {}, "proxies"),
}


def compare(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    wanted = wanted.reshape(found.shape)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def weigh(loss: nn.Module, name: str, tensors: dict[str, Tensor], case: str) -> None:
    """Copy the reference's proxies into a loss, transposed where it stores columns."""
    own = getattr(loss, name)
    given = tensors.get(f"{case}.fc", tensors["proxies"])
    own.data.copy_(given if given.shape == own.shape else given.T)


@needs_losses
@pytest.mark.parametrize("case", CASES)
def test_losses_of_the_library_are_those_of_the_references(case: str) -> None:
    meta, tensors = read(LOSSES)
    name, arguments, miner, chosen, weights = CASES[case]
    dim, classes = tensors["embeddings"].shape[1], int(meta["num_classes"])
    loss = metric_loss(name, classes, dim, **arguments)
    if weights is not None:
        weigh(loss, weights, tensors, case)
    criterion = MetricCriterion(loss, None if miner is None else metric_miner(miner, **chosen))
    embeddings = tensors["embeddings"].clone().requires_grad_()
    found = criterion(embeddings, tensors["labels"].long())
    found.backward()
    compare(found.detach(), tensors[f"{case}.loss"], 1e-4)
    compare(embeddings.grad, tensors[f"{case}.grad_embeddings"], 1e-4)
    if f"{case}.grad_proxies" in tensors:
        compare(loss.proxies.grad, tensors[f"{case}.grad_proxies"], 1e-4)


@needs_peers
@pytest.mark.parametrize("case", ["hyp", "sphere", "rsk"])
def test_hyperbolic_and_recall_at_k(case: str) -> None:
    meta, tensors = read(PEERS)
    meta = meta["meta"]
    loss = {
        "hyp": lambda: Hyperbolic(meta["hyp"]["c"], meta["hyp"]["clip_r"], meta["hyp"]["tau"]),
        "sphere": lambda: Hyperbolic(curvature=0, temperature=meta["sphere"]["tau"]),
        "rsk": lambda: RecallAtK(
            meta["rsk"]["k_vals"], meta["rsk"]["sigmoid_temperature"], float(meta["rsk"]["k_temperature"])
        ),
    }[case]()
    labels = torch.arange(meta["num_classes"]).repeat_interleave(meta["samples_per_class"])
    features = tensors["features"].requires_grad_()
    order = torch.arange(len(labels)).view(meta["num_classes"], -1).T.flatten()  # classes in turn, which is sorted out
    found = loss(features[order], labels[order])
    found.backward()
    compare(found.detach(), tensors[f"{case}.loss"], 1e-3)
    compare(features.grad, tensors[f"{case}.grad_features"], 1e-3)


@needs_peers
def test_hist() -> None:
    meta, tensors = read(PEERS)
    settings = meta["meta"]["hist"]
    loss = Hist(
        settings["num_classes"],
        settings["dim"],
        settings["tau"],
        settings["alpha"],
        settings["hidden"],
        settings["lambda_s"],
    )
    own = {
        "means": "means",
        "log_vars": "log_vars",
        "first.weight": "hgnn.theta1.weight",
        "first.bias": "hgnn.theta1.bias",
        "second.weight": "hgnn.theta2.weight",
        "second.bias": "hgnn.theta2.bias",
        "norm.weight": "hgnn.bn1.weight",
        "norm.bias": "hgnn.bn1.bias",
    }
    loss.load_state_dict({name: tensors[f"hist.{key}"] for name, key in own.items()}, strict=False)
    features, labels = tensors["hist.features"].requires_grad_(), tensors["hist.labels"].long()
    distances = loss.distances(features)
    incidence = loss.memberships(distances, labels)
    compare(incidence.detach(), tensors["hist.incidence"], 1e-3)
    compare(loss.classify(features, incidence).detach(), tensors["hist.logits"], 1e-3)
    compare(loss.distribution_loss(distances, labels).detach(), tensors["hist.dist_loss"], 1e-3)
    found = loss(features, labels)
    found.backward()
    compare(found.detach(), tensors["hist.loss"], 1e-3)
    for tensor, key in ((features, "features"), (loss.means, "means"), (loss.log_vars, "log_vars")):
        compare(tensor.grad, tensors[f"hist.grad_{key}"], 1e-3)
    compare(loss.first.weight.grad, tensors["hist.grad_theta1"], 1e-3)
