"""Shared settings of all tests."""

import os

import torch

import vispeft  # noqa: F401  (makes torchvision importable before any test imports it)

# Workers of pytest-xdist share the processors; alone, a test may use two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
