"""Random numbers that depend on their purpose, not on earlier draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["draw_seed", "seeded"]


def draw_seed(*numbers: int) -> int:
    """Mix several numbers into one seed, so that neighbouring epochs and images have unrelated random numbers.

    Args:
        numbers: Numbers such as seed, epoch and index.

    Returns:
        A seed for `torch.Generator.manual_seed`.
    """
    state = 0x9E3779B97F4A7C15  # SplitMix64 (Steele et al., OOPSLA 2014), one round per number
    for number in numbers:
        state = (state + (number & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed all global CPU generators inside the context, and restore their state afterwards.

    torchvision draws from torch's generator, timm from those of Python, numpy and torch; neither accepts a generator
    argument. GPU generators are untouched: images are prepared on the CPU.

    Args:
        numbers: Numbers the seed is mixed from, such as seed, epoch and index.
    """
    seed = draw_seed(*numbers)
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(pytorch)
