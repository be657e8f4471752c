"""Kills and overhead of several processes, and what fits where: tables from records, and how figures are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fits
import process_kills
import process_overhead
import pytest

from vispeft.cli.memory import MemoryEstimate

MIB = 2**20


def estimate(**changes: Any) -> MemoryEstimate:
    settings: dict[str, Any] = {"parameters": 400 * MIB, "gradients": 4 * MIB, "optimizer": 8 * MIB, "constant": MIB}
    settings |= {"per_image": 20 * MIB, "temporary": 5 * MIB, "batch": 2}
    return MemoryEstimate(**{**settings, **changes})


def test_kills_are_counted_by_phase_and_runs_by_equality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_kills, "RESULTS", tmp_path)
    (tmp_path / process_kills.FOLDER).mkdir()
    attempts = [
        {"phase": "training", "killed": True, "gone": 2.0},
        {"phase": "starting", "killed": True, "gone": 5.25},
        {"phase": "finishing", "killed": False, "gone": 99.0},
    ]
    record = {"attempts": attempts, "runs": [{"differences": []}, {"differences": ["metrics.json"]}]}
    for kind in process_kills.KILLS:
        (tmp_path / process_kills.FOLDER / f"{kind}.json").write_text(json.dumps(record))
    assert process_kills.table()[2] == "| one of two processes | 2 | 1, 1, 0 | 2 | 1 | 5.2 s |"


def test_processes_of_a_session_are_found_and_those_that_ended_are_not() -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('on', flush=True); time.sleep(60)"
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    leader.stdout.readline()
    found = process_kills._session(leader.pid)
    assert len(found) == 2
    assert leader.pid in found
    os.killpg(leader.pid, 9)
    leader.wait()
    leader.stdout.close()


def test_overhead_is_the_median_of_rounds_compared_with_themselves() -> None:
    first = {"together": [1.1, 2.4, 1.2], "apart": [1.0, 2.0, 1.0]}
    found = process_overhead._compared([first, first])
    assert found["overhead"] == pytest.approx(0.2)
    assert found["together"] == 1.2


def test_shared_weights_are_divided_and_two_blocks_stay_whole() -> None:
    found = estimate()
    assert fits.sharded(found, 10 * MIB, 1) == found
    shared = fits.sharded(found, 10 * MIB, 4)
    assert shared.parameters == 4 * MIB + (396 // 2 // 4) * MIB + MIB // 2 + 20 * MIB
    assert shared.optimizer == found.optimizer


def test_the_tables_say_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "RESULTS", tmp_path)
    values = {name: getattr(estimate(), name) for name in vars(estimate())}
    record = {"steps": {"ViT-S/16": {"lora": values}}, "blocks": {"ViT-S/16": 10 * MIB}}
    (tmp_path / "fits.json").write_text(json.dumps(record))
    page = "\n".join(fits.tables())
    largest = [estimate().largest_batch(gib) for gib in fits.CARDS]
    assert f"| ViT-S/16 | `lora` | 413 | 25.0 | {' | '.join(f'{count:,}' for count in largest)} |" in page
    assert f"| ViT-S/16 | 8 nodes of 8 | {64 * largest[2]:,} | 413 | 40 |" in page
