"""Shares of the images of an epoch, one for each of several processes that train or measure together.

Both are of PyTorch's class for such orders, so that Lightning leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler, Sampler

from vispeft.errors import ConfigError, DataError, counted

__all__ = ["EvaluationShare", "TrainingShare", "part_of_batch"]


class TrainingShare(DistributedSampler[Any]):
    """The part of each batch that one process trains on.

    All processes together train on what one process would, in the same order: of each batch of the whole, each process
    gets as many images, which follow each other. The last batch of an epoch, which may be smaller, is filled up with
    the first images of the epoch until it can be divided, so that all processes make the same number of steps with
    batches of one size; at most one image less than there are processes is shown twice.
    """

    def __init__(self, whole: Sampler[Any], batch_size: int, rank: int, processes: int, drop_last: bool) -> None:
        """Store the settings.

        Args:
            whole: The order of all images of an epoch.
            batch_size: Images per batch of one process.
            rank: Number of the process, from 0.
            processes: Number of processes.
            drop_last: Leave out a last batch that is smaller than the others.
        """
        self.whole, self.batch_size, self.rank, self.processes = whole, batch_size, rank, processes
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one.

        Args:
            epoch: Counted from zero.
        """
        whole: Any = self.whole
        whole.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the images of this process."""
        images, together = list(self.whole), self.batch_size * self.processes
        for start in range(0, len(images), together):
            batch = images[start : start + together]
            if len(batch) < together:
                if self.drop_last:
                    return
                batch += self._first(-len(batch) % self.processes)
            each = len(batch) // self.processes
            yield from batch[self.rank * each : (self.rank + 1) * each]

    def _first(self, count: int) -> list[Any]:
        """Return the first images of the epoch."""
        whole: Any = self.whole
        found: list[Any] = whole.order(whole.epoch)
        return found[:count]

    def __len__(self) -> int:
        """Count the images of this process in a whole epoch."""
        whole: Any = self.whole
        batches, rest = divmod(len(whole), self.batch_size * self.processes)
        return batches * self.batch_size + (0 if self.drop_last else -(-rest // self.processes))


class EvaluationShare(DistributedSampler[int]):
    """The images of a split that one process measures: each image once over all processes, in the order of the split.

    Shares may differ by one image; metrics are gathered over the processes when they are computed.
    """

    def __init__(self, length: int, rank: int, processes: int, split: str) -> None:
        """Divide a split.

        Args:
            length: Number of its images.
            rank: Number of the process, from 0.
            processes: Number of processes.
            split: Name of the split, for the message.

        Raises:
            DataError: If there are fewer images than processes.
        """
        if length < processes:
            raise DataError(
                f"The {split} split has {counted(length, 'image')} for {processes} processes, of which each has to "
                "measure one at least. Give more images, or set trainer.devices lower."
            )
        self.images = range(rank * length // processes, (rank + 1) * length // processes)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is the same in all epochs."""

    def __iter__(self) -> Iterator[int]:
        """Iterate over the images of this process."""
        return iter(self.images)

    def __len__(self) -> int:
        """Count them."""
        return len(self.images)


def part_of_batch(together: int, processes: int) -> int:
    """Divide a batch among processes.

    Args:
        together: Images of a batch of all processes.
        processes: Their number.

    Returns:
        Images of a batch of each process.

    Raises:
        ConfigError: If it cannot be divided.
    """
    if together % processes:
        raise ConfigError(
            f"The run was begun with batches of {together} images in all, which {processes} processes cannot divide. "
            f"Give a number of devices that divides {together}."
        )
    return together // processes
