"""The pairwise cross entropy of Hyp-ViT in hyperbolic space or on the sphere (CVPR 2022, arXiv 2203.10833)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vispeft.losses.base import MetricLoss, by_class, check_positive
from vispeft.metrics.similarity import Hyperbolic as HyperbolicSimilarity

__all__ = ["Hyperbolic"]

NEARLY_ONE = 1 - 1e-5
"""Largest argument of artanh, as in the public code (htdt/hyp_metric at c89de04)."""
SMALLEST = 1e-15
"""Squared distance below which the root has no gradient."""
ITSELF = -1e9
"""Score of an image against itself."""


class Hyperbolic(MetricLoss):
    """Cross entropy of each pair of images of a class against all other classes, by hyperbolic distance.

    Images number i and j of every class make one term for each ordered pair i, j: image i of a class is compared with
    image j of all classes and with image i of the other classes; the right answer is image j of its own class. Terms
    are summed. The distance is that of `vispeft.metrics.similarity.Hyperbolic`, by which neighbours are found too.
    """

    least_per_class: ClassVar[int] = 2

    def __init__(self, curvature: float = 0.1, clip: float = 2.3, temperature: float | None = None) -> None:
        """Store the settings; the defaults are those of the paper.

        Args:
            curvature: Negative curvature of the ball. With 0, embeddings are compared by their cosine (Sph in the
                paper).
            clip: Length to which embeddings are cut in front of the map into the ball.
            temperature: Divisor of distances; None for 0.2, or 0.1 on the sphere.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        temperature = (0.2 if curvature else 0.1) if temperature is None else temperature
        check_positive("Hyperbolic", clip=clip, temperature=temperature)
        if curvature:
            check_positive("Hyperbolic", curvature=curvature)
        self.temperature = temperature
        self.space = HyperbolicSimilarity(curvature=curvature, clip=clip) if curvature else None

    @property
    def similarity(self) -> str | Mapping[str, Any]:
        """The negative hyperbolic distance, or the cosine."""
        return "cosine" if self.space is None else self.space.to_dict()

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            embeddings: (B, d), of any length.
            labels: int64 (B,).
            indices_tuple: Not used.

        Raises:
            DataError: If a class has one image only.
        """
        points = F.normalize(embeddings, dim=1) if self.space is None else self.space.prepare(embeddings)
        grouped = by_class(points, labels)
        classes = torch.arange(len(grouped), device=labels.device)
        itself = torch.eye(len(grouped), dtype=torch.bool, device=labels.device)
        terms = []
        for first, second in permutations(grouped.unbind(1), 2):
            others = self._scores(first, first).masked_fill(itself, ITSELF)
            scores = torch.cat([self._scores(first, second), others], dim=1)
            terms.append(F.cross_entropy(scores / self.temperature, classes))
        return torch.stack(terms).sum()

    def _scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute cosines, or ``-2/sqrt(c) artanh(sqrt(c) |-x (+) y|)`` with its gradient, for each pair."""
        if self.space is None:
            return x @ y.T
        c, product = self.space.curvature, x @ y.T
        squares = (x[:, None] - y).square().sum(2).clamp(min=SMALLEST)
        below = 1 - 2 * c * product + c**2 * x.square().sum(1)[:, None] * y.square().sum(1)
        inside = math.sqrt(c) * (squares / below).sqrt()
        return -2 / math.sqrt(c) * inside.clamp(max=NEARLY_ONE).atanh()
