"""The Recall@k surrogate (Patel et al., CVPR 2022, arXiv 2108.11179)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.errors import ConfigError
from vispeft.losses.base import MetricLoss, check_positive

__all__ = ["RecallAtK"]

STEEPEST = 50.0
"""Largest exponent of a sigmoid, as in the public code; beyond it the gradient is zero."""


class RecallAtK(MetricLoss):
    """One minus a smooth Recall@k, averaged over several k and over the queries of the batch.

    Each image is a query. The rank of a positive i is ``1 + sum over j of sigmoid((s_j - s_i) / t)``, over all images j
    of the batch but i, the query itself included (public code, yash0307/RecallatK_surrogate at ed05202). Recall at K
    is ``sum over i of sigmoid((K - rank_i) / t')``, at most K, divided by the smaller of K and the number of positives.
    Images without a positive in the batch are no queries.
    """

    least_per_class: ClassVar[int] = 2

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8, 16),
        similarity_temperature: float = 0.01,
        rank_temperature: float = 1.0,
    ) -> None:
        """Store the settings; the defaults are the paper's.

        Args:
            ks: The values of K.
            similarity_temperature: Width t of the step between similarities.
            rank_temperature: Width t' of the step between ranks.

        Raises:
            ConfigError: If one is out of range.
        """
        super().__init__()
        if not ks or any(type(k) is not int or k < 1 for k in ks):
            raise ConfigError(f"RecallAtK(ks={list(ks)}): whole numbers from 1 on are needed, such as [1, 2, 4].")
        settings = {"similarity_temperature": similarity_temperature, "rank_temperature": rank_temperature}
        check_positive("RecallAtK", **settings)
        self.ks = tuple(ks)
        self.similarity_temperature, self.rank_temperature = similarity_temperature, rank_temperature

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss of a batch; zero where no class has two images.

        Args:
            embeddings: (B, d), of any length.
            labels: int64 (B,).
            indices_tuple: Not used.
        """
        scores = F.normalize(embeddings, dim=1)
        scores = scores @ scores.T
        same = labels[:, None] == labels
        same.fill_diagonal_(False)
        counts = same.sum(1)
        if not counts.any():
            return embeddings.sum() * 0
        indices = same.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        valid = torch.arange(indices.shape[1], device=labels.device) < counts[:, None]
        recalls = self._recalls(self._ranks(scores, indices), valid)
        return (1 - recalls)[counts > 0].mean()

    def _ranks(self, scores: Tensor, indices: Tensor) -> Tensor:
        """Compute the smooth rank of each positive (B, P)."""
        own = scores.gather(1, indices)
        above = _step(scores[:, None, :] - own[:, :, None], self.similarity_temperature)
        # A positive is not compared with itself, where the step is one half.
        return 1 + above.sum(2) - above.gather(2, indices[:, :, None]).squeeze(2)

    def _recalls(self, ranks: Tensor, valid: Tensor) -> Tensor:
        """Compute the smooth recall of each query, averaged over K (B,)."""
        found = []
        for k in self.ks:
            hits = (_step(k - ranks, self.rank_temperature) * valid).sum(1).clamp(max=k)
            found.append(hits / valid.sum(1).clamp(min=1, max=k))
        return torch.stack(found).mean(0)


def _step(values: Tensor, temperature: float) -> Tensor:
    return torch.sigmoid((values / temperature).clamp(-STEEPEST, STEEPEST))
