"""Planting faults: on a toy project, the suite finds what it can, nothing runs twice, and stale faults are named."""

import json
import subprocess
import sys

import common
import planted_faults
import pytest

MATHS = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n\n\ndef third(x):\n    return x / 3\n"
TESTS = """
import pytest
from vispeft.maths import double, half

def test_double():
    assert double(4) == 8

@pytest.mark.slow
def test_half():
    assert half(4) == 2

def test_that_always_fails():
    assert half(0)
"""
FAULTS = """
- name: doubled
  part: toy
  says: double triples
  nearest: [tests/test_maths.py]
  old: &doubled {file: vispeft/maths.py, find: 2 * x, put: 3 * x}
  new: *doubled
- name: halved
  part: toy
  says: half is a third
  nearest: [tests/test_maths.py]
  old: &halved {file: vispeft/maths.py, find: x / 2, put: x / 3}
  new: *halved
- name: thirded
  part: toy
  says: third is a quarter, and nothing tests it
  nearest: [tests/test_maths.py]
  old: {file: vispeft/maths.py, find: x / 3, put: x / 4}
  new: null
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    files = {"vispeft/__init__.py": "", "vispeft/maths.py": MATHS, "tests/test_maths.py": TESTS, "faults.yaml": FAULTS}
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "start")):
        subprocess.run(["git", "-C", str(tmp_path / "project"), *arguments], check=True)
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- planted_faults: begin -->\nold\n<!-- planted_faults: end -->\nafter\n")
    monkeypatch.setattr(common, "PAGE", page)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(planted_faults, "ROOT", tmp_path / "project")
    monkeypatch.setattr(planted_faults, "EARLIER", "HEAD")
    read = planted_faults.read_faults
    monkeypatch.setattr(planted_faults, "read_faults", lambda: read(tmp_path / "project/faults.yaml"))
    return tmp_path


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["planted_faults.py", *arguments])
    planted_faults.main()


@pytest.mark.slow
def test_faults_are_found_once_and_the_table_says_by_what(project, monkeypatch, capsys):
    start(monkeypatch, "--workers", "0")
    results = {path.stem: json.loads(path.read_text()) for path in (project / "results/planted_faults").iterdir()}
    assert set(results) == {"doubled-old", "doubled-new", "halved-old", "halved-new", "thirded-old"}
    found = {name: (facts["stage"], [t.split("::")[-1] for t in facts["failed"]]) for name, facts in results.items()}
    assert results["thirded-old"]["failing_anyway"] == ["tests/test_maths.py::test_that_always_fails"]
    assert found["doubled-old"] == found["doubled-new"] == ("nearest", ["test_double"])
    assert found["halved-old"] == ("nearest", ["test_half"])
    assert found["halved-new"] == ("slow", ["test_half"])  # the fast half was asked first
    assert found["thirded-old"] == ("all", [])
    monkeypatch.setattr(planted_faults, "run_stage", lambda *_, **__: pytest.fail("it was run again"))
    start(monkeypatch, "--workers", "0")
    start(monkeypatch, "--table")
    page = (project / "benchmarks.md").read_text()
    assert "| toy | double triples | `test_double`, " in page
    assert "not found, " in page
    assert "not yet run" in page
    assert "finds 2 and the present one 2; 1 of 6 runs are missing." in page
    assert "LOST" not in page
    assert "old\n" not in page


def test_faults_that_do_not_fit_are_named(project, monkeypatch, capsys):
    faults = project / "project/faults.yaml"
    faults.write_text(FAULTS.replace("find: 2 * x", "find: 5 * x").replace("put: x / 4", "put: x / /"))
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "--check")
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "doubled (old): vispeft/maths.py holds the text to replace 0 times" in said
    assert "thirded (old): vispeft/maths.py no longer compiles" in said
    assert "thirded: no text for the new revision yet" in said
    assert "halved" not in said


def test_a_result_of_another_text_counts_for_nothing(project, monkeypatch):
    fault = planted_faults.read_faults()[0]
    trial = planted_faults.Trial(fault, "old")
    assert trial.result() is None
    outcome = planted_faults.Outcome((), "1 passed", 1.0)
    planted_faults._write(trial, "HEAD", {"all": outcome}, 0)
    assert trial.result()["found"] is False
    changed = planted_faults.Plant(fault.old.file, fault.old.find, "4 * x")
    other = planted_faults.Fault(fault.name, fault.part, fault.says, fault.nearest, changed, None)
    assert planted_faults.Trial(other, "old").result() is None


def test_the_faults_fit_the_present_files():
    for fault in planted_faults.read_faults():
        if fault.new is not None:
            fault.new.planted((planted_faults.ROOT / fault.new.file).read_text(encoding="utf-8"))
