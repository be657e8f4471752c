"""The benchmark of retrieval measures both sides, says whether the bars are met, and makes the page from its record."""

import argparse
import sys

import common
import pytest
import retrieval

pytest.importorskip("faiss")


def test_both_sides_are_measured_and_agree(monkeypatch):
    monkeypatch.setattr(retrieval, "KS", (1, 10, 100))
    monkeypatch.setattr(retrieval, "in_a_process", retrieval.memory)
    args = argparse.Namespace(count=300, width=16, queries=120, rounds=1, threads=1)
    row = retrieval.measure("clustered", args)
    assert row["ratio"] > 0
    assert row["peak_bytes"] >= 0
    assert row["largest_difference"] < 1e-9
    assert 0.3 < row["figures"]["recall@1"] <= row["figures"]["recall@100"] <= 1


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    seconds = {name: {"median": value} for name, value in (("ours", 3.0), ("faiss", 2.0))}
    row = {"kind": "random", "seconds": seconds, "ratio": 1.5, "processor_ratio": 1.25, "peak_bytes": 2**29}
    assert "within 1.5 " in retrieval.verdict(row)
    assert "BAR MISSED" in retrieval.verdict({**row, "ratio": 1.6})
    (tmp_path / "metric_learning.md").write_text("a\n<!-- retrieval: begin -->\nold\n<!-- retrieval: end -->\nb\n")
    monkeypatch.setattr(common, "PAGE", tmp_path / "benchmarks.md")
    for module in (common, retrieval):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    settings = {"count": 60000, "width": 512, "queries": 1024, "rounds": 3, "load": 9.5, "processors": 2}
    common.write("retrieval", {**settings, "rows": [row]})
    monkeypatch.setattr(sys, "argv", ["retrieval.py", "--table"])
    retrieval.main()
    text = (tmp_path / "metric_learning.md").read_text()
    assert "1,024 queries in 60,000 x 512" in text
    assert "| random | 3.00 | 2.00 | 1.50 | 1.25 | 0.50 |" in text
    assert "a load of 9.5 on 2 processors" in text
    assert "old" not in text
