"""Compiling under another version of torch, where an environment with one is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

OTHER = os.environ.get("VISPEFT_OTHER_PYTHON")
"""The interpreter of an environment with another torch (2.11 is the oldest that is served) and the other requirements
of ``requirements.lock``."""
ROOT = Path(__file__).parents[1]
FILES = tuple(f"tests/core/test_{name}.py" for name in ("compiling", "graph_counts", "memory", "opaque"))


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="VISPEFT_OTHER_PYTHON names no interpreter with another torch.")
def test_blocks_compile_under_another_torch() -> None:
    assert OTHER is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (
        [OTHER, "-m", "pytest", "-q", "-n", "0", *FILES],
        [OTHER, "-m", "pytest", "-q", "-n", "0", "tests/conformance", "-k", "compiled_by_block"],
    ):
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
