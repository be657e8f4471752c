"""The number type of sums over many images."""

from __future__ import annotations

import torch

__all__ = ["sum_type"]


def sum_type() -> torch.dtype:
    """Return the most precise floating-point type that every device here has."""
    return torch.float32 if torch.backends.mps.is_available() else torch.double  # Apple's GPUs have no doubles
