"""The base of losses on embeddings and labels, and the order of a batch by classes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vispeft.errors import ConfigError, DataError

__all__ = ["MetricLoss", "by_class", "check_positive"]


class MetricLoss(nn.Module, ABC):
    """Base of losses on the embeddings and labels of a batch.

    A subclass that takes ``num_classes`` or ``embedding_size`` gets the number of training classes and the width of the
    embeddings. A config may name a subclass of one's own after `vispeft.building.known.register_class`.
    """

    proxy_tensors: ClassVar[tuple[str, ...] | None] = None
    """Parameters that the learning rate of proxies is for; None for all."""

    least_per_class: ClassVar[int] = 1
    """Smallest number of images of each class in a training batch."""

    @property
    def similarity(self) -> str | Mapping[str, Any]:
        """Similarity by which neighbours are found, as `vispeft.metrics.make_similarity` takes it."""
        return "cosine"

    @abstractmethod
    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            embeddings: Outputs of the head (B, d) in float32, not normalised.
            labels: Training classes from 0 on, int64 (B,).
            indices_tuple: Pairs or triplets that a miner chose; None without a miner.

        Returns:
            A scalar.
        """


def check_positive(loss: str, **values: float) -> None:
    """Refuse settings of a loss that are not finite numbers above 0.

    Args:
        loss: Name of the loss, for the message.
        values: The settings by name.

    Raises:
        ConfigError: If one is zero, negative, infinite or NaN.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{loss}({name}={value}): a finite number above 0 is needed.")


def by_class(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Sort a batch by class, with the same number of images of each: the smallest number among its classes.

    Args:
        embeddings: (B, d).
        labels: int64 (B,).

    Returns:
        (classes, images, d), classes in rising order; surplus images of a class, its last ones, are left out.

    Raises:
        DataError: If a class has one image only.
    """
    counts = labels.unique(return_counts=True)[1]
    fewest = int(counts.min())
    if fewest < 2:
        raise DataError(
            "A training batch has one image only of some class, and the loss compares images of the same class. Set "
            "data.images_per_class to 2 or more."
        )
    starts = counts.cumsum(0) - counts
    order = labels.argsort(stable=True)
    return embeddings[order[starts[:, None] + starts.new_tensor(range(fewest))]]
