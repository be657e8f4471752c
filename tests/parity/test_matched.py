"""Every reference file is compared by one of the tests."""

from __future__ import annotations

import re
from pathlib import Path

from tests.parity import test_metric_losses, test_multitask, test_retrieval, test_vptsp
from tests.parity.test_modules import CLAIMED
from tests.parity.test_mtlora import CLAIMED as TASKS
from tests.parity.test_networks import NETWORKS
from tests.parity.test_parity import FILES, FOLDER, WITH_FEATURES, source_of
from tests.parity.test_polyhistor import HYPERNETS
from tests.parity.test_token_merging import CLAIMED as MERGING

TESTS = (
    *Path(__file__).parent.glob("*.py"),
    *(Path(__file__).parents[1] / name for name in ("tasks/test_layer_schedules.py", "cli/test_import_official.py")),
)
NAMED = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in TESTS)))
"""Words of the tests; those of parts E and F name each file that they read."""


def test_every_file_is_matched() -> None:
    assert FILES, f"{FOLDER} has no reference files"
    modules = (test_metric_losses, test_multitask, test_retrieval, test_vptsp)
    claimed = {*CLAIMED, *(path for module in modules for path in module.CLAIMED), *TASKS.values(), *HYPERNETS}
    claimed |= set(MERGING.values())
    others = set(FILES) - {*WITH_FEATURES, *NETWORKS, *claimed}
    unmatched = sorted(path.name for path in others if path.stem not in NAMED)
    assert not unmatched, f"no test reads {unmatched}"
    unclaimed = [path.name for path in (*WITH_FEATURES, *NETWORKS) if source_of(path) is None]
    assert not unclaimed, f"no source claims {unclaimed}"
