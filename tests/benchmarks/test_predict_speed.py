"""The benchmark of `vispeft predict` measures both sides, and makes the page from its record."""

import sys

import common
import predict_speed
import pytest


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path, monkeypatch):
    for name, value in {"WIDTH": 320, "HEIGHT": 240, "DIFFERENT": 8, "BATCH": 4, "WORKERS": 1}.items():
        monkeypatch.setattr(predict_speed, name, value)
    monkeypatch.setattr(predict_speed, "picture", lambda number, *_, draw=predict_speed.picture: draw(number, 320, 240))
    monkeypatch.setattr(predict_speed, "in_a_process", predict_speed.memory)
    images = predict_speed.make_images(tmp_path / "images", 10)
    run = predict_speed.make_run(tmp_path, "full")
    rows = predict_speed.measure(tmp_path, images, dict.fromkeys(predict_speed.WAYS, run), 1)
    assert {name: [row["rows"] for row in found] for name, found in rows.items()} == {
        name: [10] for name in ("timm", "full", "reduced")
    }
    assert all(row["seconds"] > 0 and row["processor_seconds"] > 0 for found in rows.values() for row in found)
    assert predict_speed.broken(tmp_path, images, run) == 8
    assert min(predict_speed.memory(run, images).values()) > 2**20
    levels = predict_speed.pixels(images)
    assert 0 < levels["32"]["mean"] < 8
    assert levels["224"] == {"mean": 0, "largest": 0}  # twice 224 are more pixels than there are


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    (tmp_path / "benchmarks.md").write_text("a\n<!-- predict_speed: begin -->\nold\n<!-- predict_speed: end -->\nb\n")
    monkeypatch.setattr(common, "PAGE", tmp_path / "benchmarks.md")
    for module in (common, predict_speed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    seconds = {"timm": (4.0, 5.0, 9.0), "full": (4.2, 5.5, 5.6), "reduced": (2.0, 2.5, 3.0)}
    rounds = {name: [{"seconds": s, "processor_seconds": 2 * s} for s in values] for name, values in seconds.items()}
    peaks = {"800": {"process": 400 * 2**20, "worker": 2**28}, "8000": {"process": 410 * 2**20, "worker": 2**28}}
    pixels = {"32": {"mean": 0.5, "largest": 9.0}}
    record = {"images": 800, "rounds": rounds, "rows_with_two_broken": 798, "peak_bytes": peaks, "pixels": pixels}
    common.write("predict_speed", record)
    monkeypatch.setattr(sys, "argv", ["predict_speed.py", "--table"])
    predict_speed.main()
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| a loop of timm | 5.0 | 1.00 | 10.0 | 1.00 |" in text
    assert "| `predict` | 5.5 | 1.10 (bar 1.10) | 11.0 | 1.10 |" in text
    assert "| `predict`, `decode: reduced` | 2.5 | 0.50 (bar 0.60) | 5.0 | 0.50 |" in text
    assert "798 rows" in text
    assert "1.02 of the first (bar 1.05)" in text
    assert "old" not in text
