"""Evaluation mode for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode, and restore the mode of each of its submodules on exit, also after an error.

    ``module.train(module.training)`` does not: it gives all submodules one mode, those too that were set apart.

    Args:
        module: The module.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])  # modules that keep something for a mode drop it here
        for part, mode in modes:
            part.training = mode
