"""Images whose outputs are not finite: counted, said, and kept out of every decision."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OutputCount", "finite_rows"]


class OutputCount:
    """Counts the images of a split, and those whose outputs are not finite."""

    def __init__(self) -> None:
        """Start at zero."""
        self.reset()

    def reset(self) -> None:
        """Set both counts to zero."""
        self.images = 0
        """Images so far."""
        self.broken = 0
        """Those with an output that is not finite."""

    def known(self, outputs: Tensor) -> Tensor:
        """Count a batch.

        Args:
            outputs: Outputs of a batch (B, ...).

        Returns:
            Whether all outputs of each image are finite (B,).
        """
        known = outputs.flatten(1).isfinite().all(1)
        self.add(known)
        return known

    def add(self, known: Tensor) -> None:
        """Count images.

        Args:
            known: Whether all outputs of each image are finite (B,).
        """
        self.images += len(known)
        self.broken += int((~known).sum())

    def says(self, split: str) -> str:
        """Compose a warning.

        Args:
            split: validation or test.
        """
        return (
            f"The outputs for {self.broken} of {self.images} images of the {split} split are not finite. These images "
            "are left out of its figures, and do not decide about the best epoch or the temperature. Try a lower "
            "learning rate, or trainer.precision 32."
        )


def finite_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Keep the rows in which the first tensor is finite.

    Args:
        tensors: Tensors with the same number of rows (N, ...).
    """
    kept = torch.isfinite(tensors[0].flatten(1)).all(1)
    return tuple(tensor[kept] for tensor in tensors)
