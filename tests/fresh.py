"""Code in fresh interpreters, for what depends on the order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "run"]

ROOT = Path(__file__).resolve().parents[1]

# A fresh interpreter takes seconds to import torch. Cases that need nothing but torch, or timm, share that and are
# forked from there: none of them sees what another one imports.
PRELUDE = """
import os, sys, traceback
def case(body, *folders):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            sys.path[:0] = folders
            body()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, body.__name__
"""


def run(code: str) -> list[str]:
    """Run code in a fresh interpreter, with the checkout in front of everything else.

    Args:
        code: The code. ``case(function, *folders)`` runs a function in a process that is forked from there, with
            folders put first on its path.

    Returns:
        The lines it prints.
    """
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
