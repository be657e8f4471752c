"""The benchmark of sliding windows measures a peak, says whether the bar is met, and makes the page from its record."""

import sys

import common
import pytest
import sliding_window
import torch

GIB = 2**30


@pytest.mark.slow
def test_a_small_image_is_measured(monkeypatch):
    for name, value in (("WIDTH", 96), ("CLASSES", 3), ("WINDOW", 64), ("STRIDE", 32)):
        monkeypatch.setattr(sliding_window, name, value)
    found = sliding_window.measure(64, torch.get_num_threads())
    assert 0 < found["before_bytes"] <= found["peak_bytes"]


def test_the_largest_round_counts_and_the_highest_image_has_the_bar():
    rounds = [{"before_bytes": 1, "peak_bytes": peak} for peak in (2 * GIB, 4 * GIB, GIB)]
    assert sliding_window.largest(rounds)["peak_bytes"] == 4 * GIB
    assert sliding_window.largest(rounds)["peaks"] == [2 * GIB, 4 * GIB, GIB]
    figures = {"512": {"peak_bytes": 5 * GIB}, "4096": {"peak_bytes": 2 * GIB}}
    assert "2.00 GiB, below the bar of 3.00 GiB" in sliding_window.verdict(figures)
    figures["4096"]["peak_bytes"] = 3 * GIB
    assert "BAR MISSED" in sliding_window.verdict(figures)


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    page = tmp_path / "segmentation.md"
    page.write_text("before\n<!-- sliding_window: begin -->\nold\n<!-- sliding_window: end -->\nafter\n")
    monkeypatch.setattr(common, "PAGE", tmp_path / "benchmarks.md")
    for module in (common, sliding_window):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    figures = {str(height): {"before_bytes": GIB // 2, "peak_bytes": 2 * GIB} for height in (1024, 4096)}
    common.write("sliding_window", {"figures": figures})
    monkeypatch.setattr(sys, "argv", ["sliding_window.py", "--table"])
    sliding_window.main()
    text = page.read_text()
    assert "| 1,024 x 4,096 | 0.50 | 2.00 |" in text
    assert "| 4,096 x 4,096 | 0.50 | 2.00 (bar 3.00) |" in text
    assert "old" not in text
