"""Host time: the page is made from the record."""

import sys

import common
import host_time


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    for module in (host_time, common):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    seconds = {name: {"median": value} for name, value in (("floor", 0.02), ("peft", 0.05), ("lora", 0.033))}
    record = {"arguments": {"busy": True}, "seconds": {"autocast": seconds, "float32": seconds}}
    monkeypatch.setattr(sys, "argv", ["host_time.py"])
    common.write("host_time", record)
    page = "\n".join(host_time.table_lines())
    assert "CPU time of the process" in page
    assert "| LoRA, all linear layers | 33.0 | 1.65 (bar 1.70: met) | 0.66 (bar 0.70: met) |" in page
    assert "| LoRA, all linear layers | 33.0 | 1.65 | 0.66 (bar 0.80: met) |" in page
