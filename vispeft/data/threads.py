"""Reading of many files by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_threads"]

A = TypeVar("A")
B = TypeVar("B")

THREADS = 8
"""Most threads; more of them wait for each other, or for the disk."""
CHUNK = 256
"""Items that are handed out at once, so that an interruption waits for few."""


def in_threads(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """Apply a function in several threads, as Pillow releases the GIL while decoding.

    Args:
        function: Function of one item; an error of it is raised here.
        items: The items.

    Yields:
        The results, in the order of the items.
    """
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), CHUNK):
            yield from pool.map(function, items[start : start + CHUNK])
