"""The benchmark of sliding windows measures a peak, says whether the bar is met, and makes the page from its record."""

import sys

import common
import pytest
import sliding_window
import torch

GIB = 2**30


def row(what, height, *peaks):
    found = sliding_window.largest([{"before_bytes": GIB // 2, "peak_bytes": peak} for peak in peaks])
    return {"what": what, "height": height, "windows": 15, "windows_seen": 18, **found}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["predict", "evaluate"])
def test_a_small_picture_is_measured(monkeypatch, what):
    for name, value in (("WIDTH", 96), ("CLASSES", 3), ("WINDOW", 64), ("STRIDE", 32)):
        monkeypatch.setattr(sliding_window, name, value)
    found = sliding_window.measure(what, 64, torch.get_num_threads())
    assert 0 < found["before_bytes"] <= found["peak_bytes"]
    assert (found["windows"], found["windows_seen"]) == (2, 2)


def test_the_largest_round_counts_and_the_largest_row_has_the_bar():
    assert row("predict", 9, GIB, 4 * GIB, 2 * GIB)["peak_bytes"] == 4 * GIB
    figures = [row("predict", 1000, GIB), row("evaluate", 3000, 3 * GIB // 2)]
    assert "evaluate, 3000 x 5000 pixels, 150 classes: 1.50 GiB, below the bar of 2.00" in sliding_window.verdict(
        figures
    )
    assert "BAR MISSED" in sliding_window.verdict([*figures, row("predict", 3000, 2 * GIB)])


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    page = tmp_path / "segmentation.md"
    page.write_text("before\n<!-- sliding_window: begin -->\nold\n<!-- sliding_window: end -->\nafter\n")
    monkeypatch.setattr(common, "PAGE", tmp_path / "benchmarks.md")
    for module in (common, sliding_window):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    common.write("sliding_window", {"figures": [row("predict", 1000, GIB), row("evaluate", 3000, GIB, 2 * GIB)]})
    monkeypatch.setattr(sys, "argv", ["sliding_window.py", "--table"])
    sliding_window.main()
    text = page.read_text()
    assert "| 150 classes, largest of 2 | before there is a picture, GiB | peak, GiB (bar 2.00) | windows" in text
    assert "| predict, 1,000 x 5,000 pixels | 0.50 | 1.00 | 15, 3 |" in text
    assert "| evaluate, 3,000 x 5,000 pixels | 0.50 | 2.00 | 15, 3 |" in text
    assert "old" not in text
