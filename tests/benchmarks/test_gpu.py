"""The GPU benchmark runs without a GPU, keeps no figure of a CPU, and says so where figures are missing."""

import sys

import common
import gpu
import pytest
import torch


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()


@pytest.fixture
def results(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PAGE", page)
    return tmp_path


@pytest.mark.slow
def test_variants_take_steps_and_nothing_is_kept_of_a_cpu(results, monkeypatch, capsys):
    variants = ("full", "peft lora", "lora")
    start(
        monkeypatch,
        *("--device", "cpu", "--model", "vit_tiny_patch16_224", "--size", "32", "--batch", "2"),
        *("--rounds", "1", "--compile", "off", "--variants", *variants),
    )
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    trained = {row[1].strip(): row[2].strip() for row in rows if row[1:2] and row[1].strip() in variants}
    assert trained["peft lora"] == trained["lora"] != trained["full"]
    assert not (results / "gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_to_do(results, monkeypatch):
    with pytest.raises(SystemExit, match="--device cpu"):
        start(monkeypatch)


def test_the_page_says_that_no_figures_exist(results, monkeypatch):
    start(monkeypatch, "--table")
    text = (results / "page.md").read_text()
    assert "No figures exist yet" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_the_table_is_made_from_the_record(results, monkeypatch):
    figures = {
        "full": {"trained": 1000, "peak_bytes": 2**30, "seconds": {"median": 0.2}},
        "ssf": {"trained": 10, "peak_bytes": 2**29, "seconds": {"median": 0.1}},
    }
    common.write("gpu", {"arguments": {"model": "some_model", "batch": 4}, "figures": {"classification": figures}})
    start(monkeypatch, "--table")
    assert "| ssf | 10 | 512 | 100.0 | 0.50 |" in (results / "page.md").read_text()
