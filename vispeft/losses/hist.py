"""HIST: hypergraph-induced semantic tuplets (Lim et al., CVPR 2022), with class distributions and a hypergraph net."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.errors import ConfigError
from vispeft.losses.base import MetricLoss, check_positive

__all__ = ["Hist"]


class Hist(MetricLoss):
    """A loss on distributions of classes, and one of a network on the hypergraph of a batch.

    Each class has a learned mean and log-variance. Squared Mahalanobis distances D of normalised embeddings to the
    normalised means give the first term, the cross entropy of ``-tau D``; rows whose own probability is 0 in float32
    are left out. They also give the memberships of a hypergraph whose edges are the classes of the batch: 1 in the own
    class, else ``exp(-alpha D)``. Two layers on it classify the embeddings, which are not normalised there; their cross
    entropy is the second term.

    Formulas and defaults follow the paper and the public code (ljin0429/HIST at e7d650c). It trains the distributions
    at a high rate (0.1 with Adam on CUB and Cars, 0.01 on SOP) and the network at 5 to 10 times the backbone's.
    """

    proxy_tensors: ClassVar[tuple[str, ...] | None] = ("means", "log_vars")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        tau: float = 32.0,
        alpha: float = 1.1,
        hidden: int = 512,
        network_weight: float = 1.0,
    ) -> None:
        """Create distributions and network.

        Args:
            num_classes: Number of training classes C.
            embedding_size: Width of the embeddings d.
            tau: Scale of the distances; 32 for CUB and Cars, 16 for SOP.
            alpha: Steepness of the memberships; 1.1 for CUB, 0.9 for Cars, 2 for SOP.
            hidden: Width of the network.
            network_weight: Weight of the second term.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        check_positive("Hist", tau=tau, alpha=alpha, hidden=hidden)
        if not 0 <= network_weight < math.inf:
            raise ConfigError(f"Hist(network_weight={network_weight}): a finite number from 0 on is needed.")
        self.tau, self.alpha, self.network_weight = tau, alpha, network_weight
        self.means = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.log_vars = nn.Parameter(torch.empty(num_classes, embedding_size))
        for tensor in (self.means, self.log_vars):
            nn.init.kaiming_normal_(tensor, mode="fan_out")
        self.first, self.second = nn.Linear(embedding_size, hidden), nn.Linear(hidden, num_classes)
        self.norm = nn.BatchNorm1d(hidden)

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the weighted sum of both terms.

        Args:
            embeddings: (B, d), not normalised.
            labels: int64 (B,).
            indices_tuple: Not used.
        """
        distances = self.distances(embeddings)
        scores = self.classify(embeddings, self.memberships(distances, labels))
        return self.distribution_loss(distances, labels) + self.network_weight * F.cross_entropy(scores, labels)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances (B, C) of normalised embeddings to the classes.

        Args:
            embeddings: (B, d).
        """
        points, means = F.normalize(embeddings, dim=1), F.normalize(self.means, dim=1)
        precision = (-F.relu6(self.log_vars)).exp()
        crossed = points @ (means * precision).T
        return points.square() @ precision.T - 2 * crossed + (means.square() * precision).sum(1)

    def distribution_loss(self, distances: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross entropy of ``-tau D``, averaged over rows whose own probability is not 0.

        Args:
            distances: (B, C).
            labels: int64 (B,).
        """
        logs = (-self.tau * distances).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        kept = logs.detach().exp() > 0
        return -logs.where(kept, 0).sum() / kept.sum().clamp(min=1)

    def memberships(self, distances: Tensor, labels: Tensor) -> Tensor:
        """Compute the incidence (B, U) of the hypergraph, whose edges are the U classes of the batch.

        Args:
            distances: (B, C).
            labels: int64 (B,).
        """
        present = labels.unique()
        return (-self.alpha * distances[:, present]).exp().masked_fill(labels[:, None] == present, 1.0)

    def classify(self, embeddings: Tensor, incidence: Tensor) -> Tensor:
        """Compute class scores (B, C) by two layers on the hypergraph.

        With node degrees Dv and edge degrees De, the propagation is ``Dv^-1/2 H De^-1 H^T Dv^-1/2``.

        Args:
            embeddings: (B, d), not normalised.
            incidence: H (B, U).
        """
        scaled = incidence / incidence.sum(1, keepdim=True).sqrt()
        graph = (scaled / incidence.sum(0)) @ scaled.T
        hidden = F.leaky_relu(self.norm(graph @ self.first(embeddings)), 0.1)
        return graph @ self.second(hidden)
