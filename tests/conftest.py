"""Shared settings of all tests."""

import gc
import os

import pytest
import torch

import vispeft  # noqa: F401  (makes torchvision importable before any test imports it)

# Workers of pytest-xdist share the processors; alone, a test may use two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_finish():
    """Hide what the imports made from the garbage collector, which would look through it thousands of times."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def _number_of_threads():
    """Undo what a test changes: two workers with two threads each wait for each other in every small operation."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread, for results that are compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep what tests look at out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """Let files count as written when the system has them: no test outlives a power cut, and thousands of them wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
