"""What methods keep for the backward pass stays below what is promised, and the page is made from the record."""

import json
import sys
import time

import activations
import common
import pytest


def test_no_bar_on_what_is_kept_is_missed():
    network = activations.NETWORKS["narrow"]
    figures, left_out = activations.measure(network, list(network.bars), 0, time.perf_counter)
    assert not left_out
    assert set(figures) == {activations.FULL, *network.bars}
    assert list(activations.missed(network, figures)) == []
    assert activations.share(figures, activations.FULL) == (1.0, None)
    figures["ssf"]["saved_bytes"] = figures[activations.FULL]["saved_bytes"]
    assert [line.split(":")[0] for line in activations.missed(network, figures)] == ["ssf"]


@pytest.mark.slow
def test_what_is_kept_is_renewed_beside_the_times(tmp_path, monkeypatch):
    for module in (activations, common):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    network = activations.Network(64, 1, {})
    monkeypatch.setitem(activations.NETWORKS, "narrow", network)
    rows = {name: {"saved_bytes": 1, "seconds": {"median": 2.0}} for name in (activations.FULL, "ssf", "lora")}
    rows = {name: {"trained": 3, **row} for name, row in rows.items()}
    arguments = {"busy": True, "threads": 1, "rounds": 3}
    common.write("activations_narrow", {"arguments": arguments, "figures": rows, "left_out": {"ssf": "old"}})
    monkeypatch.setattr(sys, "argv", ["activations.py", "--rounds", "0", "--methods", "ssf"])
    activations.main()
    record = json.loads((tmp_path / "activations_narrow.json").read_text())
    assert record["figures"]["lora"] == rows["lora"]
    assert record["figures"]["ssf"]["saved_bytes"] > 1
    assert record["figures"]["ssf"]["seconds"] == {"median": 2.0}
    assert record["arguments"] == arguments
    assert record["left_out"] == {}
    command = "python activations.py --rounds 0 --methods ssf"
    assert record["renewed"] == dict.fromkeys([activations.FULL, "ssf"], command)


def test_the_table_is_made_from_the_record(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- activations: begin -->\nold\n<!-- activations: end -->\nafter\n")
    monkeypatch.setattr(activations, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PAGE", page)
    seconds = {"full fine-tuning": 0.4, "lst": 0.1}
    figures = {n: {"trained": 1000, "saved_bytes": 2**20, "seconds": {"median": s}} for n, s in seconds.items()}
    arguments = {"busy": True, "threads": 1, "rounds": 3}
    common.write(
        "activations_vit_s", {"arguments": arguments, "figures": figures, "left_out": {"other": "it needs tasks"}}
    )
    monkeypatch.setattr(sys, "argv", ["activations.py", "--table"])
    activations.main()
    text = page.read_text()
    assert "| lst | 1,000 | 1.0 | 1.000 | 0.250 (bar 0.50) |" in text
    assert "**ViT 384 wide, 12 deep, 224 px, 8 images** (CPU seconds of the process, 1 thread(s), 3 steps" in text
    assert "other (it needs tasks)" in text
    assert text.startswith("before\n")
    assert "old" not in text
