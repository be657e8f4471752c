"""More time for the tests where more cases are asked for."""

import os
from pathlib import Path

import pytest

from tests.fuzz.common import SECONDS


def pytest_collection_modifyitems(items):
    asked = os.environ.get("FUZZ_CASES")
    if asked is None:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            # The limit of a case is in seconds of the processor; twice as many pass on one that others use too.
            item.add_marker(pytest.mark.timeout(max(300, 2 * SECONDS * int(asked))))
