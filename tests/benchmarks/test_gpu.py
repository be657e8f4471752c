"""The GPU benchmark runs without a GPU with every method, keeps no figure of a CPU, and judges its figures."""

from __future__ import annotations

import sys
from pathlib import Path

import common
import gpu
import gpu_bars
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vispeft.core.method import registered_methods


def tiny(name: str, size: int | None, device: str) -> nn.Module:
    """Make a ViT or a Swin of two blocks, in place of the backbones of the benchmark."""
    if name == "swin":
        made: nn.Module = SwinTransformer(
            img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=100
        )
    else:
        made = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=100)
    made.pretrained_cfg = {"input_size": (3, 32, 32)}
    return made


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "PAGE", page)
    monkeypatch.setattr(gpu, "make_model", tiny)
    return tmp_path


def test_every_registered_method_takes_steps_and_nothing_is_kept_of_a_cpu(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {cls.name for cls in registered_methods() if cls.__module__.startswith("vispeft.methods.")}
    chosen = [name for name in gpu.variants() if name in {*names, "floor", "full", gpu.FOUR}]  # peft's import is slow
    start(
        monkeypatch,
        *("--device", "cpu", "--model", "vit", "--batch", "2", "--rounds", "1", "--compile", "off"),
        *("--variants", *chosen),
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vit, eager: ")]
    rows = dict(line.removeprefix("vit, eager: ").split(": ", 1) for line in lines)
    assert set(rows) == {*names, "floor", "full", gpu.FOUR}
    assert not {name: text for name, text in rows.items() if not text.startswith("step ")}
    assert not (results / "gpu.json").exists()


@pytest.mark.slow
def test_compiled_rows_compile_blocks_and_a_swin_has_rows_too(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ("full", "floor", "peft lora", "lora", "ssf", "mtlora", gpu.FOUR)
    start(
        monkeypatch,
        *("--device", "cpu", "--model", "vit", "swin", "--batch", "2", "--rounds", "1", "--backend", "eager"),
        *("--variants", *variants),
    )
    text = capsys.readouterr().out
    for model in ("vit", "swin"):
        for mode in ("eager", "compiled"):
            for name in variants:
                assert f"{model}, {mode}: {name}: step " in text


def test_no_row_is_begun_when_the_minutes_are_over(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(gpu, "measure", lambda *row: found.append(row))
    monkeypatch.setattr(gpu, "write_section", None)
    start(monkeypatch, "--device", "cpu", "--minutes", "-1")
    assert not found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_to_do(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--device cpu"):
        start(monkeypatch)


def test_the_page_says_that_no_figures_exist(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "--table")
    text = (results / "page.md").read_text()
    assert "No figures exist yet" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def row(seconds: float, peak: int, waits: int = 0) -> dict[str, object]:
    times = {"seconds": seconds, "host_seconds": seconds / 2, "first_seconds": 3.0}
    return {"trained": 10, **times, "peak_bytes": peak, "waits": waits}


def test_figures_are_judged_and_shown(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {"full": row(0.2, 2**30), "lora": row(0.1, 2**29, waits=1), "vqt": {"says": "refused"}}
    figures = {gpu_bars.VIT: {"off": eager, "on": {"full": row(0.1, 2**30), "lora": row(0.095, 2**29)}}}
    record = {"arguments": {"batch": 4}, "rate": 1e14, "figures": figures}
    record["bars"] = gpu_bars.judged(record)
    verdicts = {bar["bar"]: (bar["found"], bar["met"]) for bar in record["bars"]}
    compiled = f"{gpu_bars.VIT}, compiled: step of lora at most 0.92 of full's"
    assert verdicts[compiled] == (0.95, False)
    assert verdicts[f"{gpu_bars.VIT}, eager: step of lora at most 1.15 of full's"] == (0.5, True)
    assert verdicts[f"{gpu_bars.VIT}, eager: step of lora at most 0.85 of peft lora's"] == (None, None)
    assert verdicts["no step waits for the device: 0"] == (1, False)
    share = gpu_bars.operations(gpu_bars.VIT) * 4 / 0.095 / 1e14
    assert record["bars"][-1]["found"] == pytest.approx(share)
    common.write("gpu", record)
    start(monkeypatch, "--table")
    text = (results / "page.md").read_text()
    assert "| lora | 10 | 100.0 | 0.50 | 50.0 | 512 | 0.50 | 3.0 | 1 |" in text
    assert "| vqt | refused |" in text
    assert f"- {compiled}: 0.95, not met" in text


def test_operations_are_those_of_the_floor_with_terms() -> None:
    """ViT-L/16: 24 blocks, 197 tokens, width 1024; full fine-tuning takes 72 d^2 + 14 N d."""
    full = 24 * 197 * (72 * 1024**2 + 14 * 197 * 1024)
    assert gpu_bars.operations(gpu_bars.VIT) / full == pytest.approx(0.69, abs=0.005)
