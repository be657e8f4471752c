"""A plugin of pytest: each test begins with one thread, whatever a conftest or an earlier test has set.

Suites with planted faults run beside each other; with two threads each they would wait for each other in every small
operation.
"""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Set the number of threads."""
    torch.set_num_threads(1)
