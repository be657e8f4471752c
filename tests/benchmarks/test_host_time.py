"""Host time: the page is made from the record, and frozen matrices are not cast at each step."""

import sys

import common
import host_time
import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast, by their number of entries."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_a_step_casts_no_frozen_matrix_twice(monkeypatch):
    monkeypatch.setattr(host_time, "DEPTH", 2)
    width = host_time.WIDTH
    matrices = {3 * width * width, width * width, 4 * width * width}
    for name, expected in (("floor", 8), ("lora", 0), ("ssf", 0)):
        step = host_time.Step(host_time.network(name), True)
        step()
        with Casts() as casts:
            step()
        assert sum(size in matrices for size in casts.sizes) == expected, name
