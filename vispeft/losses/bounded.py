"""Cosines that never reach 1, for losses of pytorch-metric-learning that fail there."""

from __future__ import annotations

from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

__all__ = ["LARGEST", "BoundedCosine"]

LARGEST = 1 - 1e-6
"""Largest cosine; its angle is 0.08 degrees."""


class BoundedCosine(CosineSimilarity):  # type: ignore[misc]  # the library has no types
    """The cosine, cut to what is a little above -1 and below 1."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Compute the cosines (Q, N) of embeddings of length one.

        Args:
            query_emb: (Q, d).
            ref_emb: (N, d).
        """
        found: Tensor = super().compute_mat(query_emb, ref_emb)
        return found.clamp(-LARGEST, LARGEST)
