"""Order of training images for metric learning: batches of a few images from each of several classes."""

from __future__ import annotations

from torch import Tensor

from vispeft.data.base import EpochSampler, Index
from vispeft.data.randomness import seeded

__all__ = ["PerClassSampler"]


class PerClassSampler(EpochSampler):
    """Yield batches of different classes with the same number of images each, side by side.

    The classes of a batch are drawn without replacement, and so are the images of a class unless it has too few. An
    epoch has as many batches as the images fill, and may leave images out and repeat others.

    pytorch-metric-learning's `MPerClassSampler` draws from numpy's global generator and goes on from the order of its
    epoch before. Here, each epoch gets a new one and numbers of its own, so the order depends on seed and epoch alone,
    and the global generator stays as it was.
    """

    def __init__(
        self, labels: Tensor, per_class: int, batch_size: int, seed: int, start: tuple[int, int] = (0, 0)
    ) -> None:
        """Store the settings of the order.

        Args:
            labels: Class of each training image (N,).
            per_class: Images of each class in a batch; it divides the batch size.
            batch_size: Images per batch; at most N, and at most `per_class` times the number of classes.
            seed: Seed of the order.
            start: The first epoch, and the number of its images to skip, as they were already served.
        """
        super().__init__(len(labels) - len(labels) % batch_size, seed, start)
        self.labels, self.per_class, self.batch_size = labels, per_class, batch_size

    def order(self, epoch: int) -> list[Index]:
        """Return the indices of a whole epoch, in their order.

        The first number of each is that of the draw, over all epochs, in place of the epoch: an image that is drawn
        twice in an epoch is augmented differently.
        """
        from pytorch_metric_learning.samplers import MPerClassSampler  # slow to import

        with seeded(self.seed, epoch):
            drawn = list(MPerClassSampler(self.labels, self.per_class, self.batch_size, len(self.labels)))
        return [(epoch * self.length + place, int(index)) for place, index in enumerate(drawn)]
