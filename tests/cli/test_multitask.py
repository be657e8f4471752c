"""A run of several dense tasks from its config to predictions, exports and merges."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tasks.dense_toy import TARGETS
from vispeft.building.config_files import read_config
from vispeft.cli.config import build_data, build_task
from vispeft.cli.config_keys import check_config
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.resources import config_names, find_config
from vispeft.tasks.dense_outputs import target_notes

TOY = Path(__file__).resolve().parents[1] / "tasks" / "dense_toy.py"
CONFIG = """
model:
  class_path: vispeft.tasks.MultiTaskDense
  init_args:
    backbone: swin_tiny_patch4_window7_224
    backbone_args:
      {pretrained: false, img_size: 32, patch_size: 2, window_size: 2, embed_dim: 8, depths: [1, 1, 2, 1],
       num_heads: [1, 1, 2, 2]}
    method: {class_path: vispeft.MTLoRA, init_args: {rank: 2, task_rank: 1}}
    decoder_args: {channels: [2, 3, 4, 5]}
    baselines: {parts: 0.5, depth: 1.0, sal: 0.5, slope: 20.0}
    lr: 1e-2
data:
  class_path: ToyTasks
  init_args: {batch_size: 4}
trainer:
  max_epochs: 2
"""
COPIES = ["--method", "lora", "--model.method.rank=2", "--trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, call_cli: Any) -> Path:
    folder = tmp_path_factory.mktemp("multitask")
    (folder / "config.yaml").write_text(CONFIG)
    result = call_cli("train", folder / "config.yaml", "--code", TOY, "--out", folder / "run")
    assert result.status == 0, result.err
    (folder / "said.txt").write_text(result.out)
    return folder / "run"


@pytest.fixture(scope="module")
def copies(run: Path, call_cli: Any) -> Path:
    """A run of the same tasks with one copy of LoRA for each."""
    out = run.parent / "copies"
    result = call_cli("train", run.parent / "config.yaml", "--code", TOY, "--out", out, *COPIES)
    assert result.status == 0, result.err
    return out


@pytest.mark.slow
def test_the_run_has_figures_tables_and_strips(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"parts/miou", "depth/rmse", "sal/maxf", "slope/mean", "delta_m", "score", "loss"} <= set(metrics["test"])
    assert metrics["main_figures"] == {"parts": "miou", "depth": "rmse", "sal": "miou", "slope": "mean"}
    assert set(metrics["test_iou"]["parts"]) == {"ground", "square"}
    assert metrics["baselines"]["test"]["slope"] == 20.0
    plots = {path.name for path in (run / "plots").iterdir()}
    assert plots == {"learning_curves.png", "strips_epoch_001.png", "strips_epoch_002.png", "strips_test.png"}
    said = (run.parent / "said.txt").read_text()
    assert "validation/delta_m" in said
    row = next(line for line in said.splitlines() if "│ slope/mean" in line)
    assert row.split("│")[4].strip() == "20.0000"
    header = json.loads((run / "adapter" / "adapter.json").read_text())
    assert header["class_names"] == list(TARGETS)
    assert header["output"]["tasks"]["parts"]["palette"] == [[0, 0, 0], [255, 0, 0]]
    assert header["output"]["decoder"]["name"] == "hrnet"
    stored = load_file(run / "adapter" / "head.safetensors")
    assert {name.split(".")[1] for name in stored} == set(TARGETS)
    assert "targets" not in (run / "config.yaml").read_text().split("data:")[0]


@pytest.mark.slow
def test_the_run_is_measured_again_to_the_same_figures(run: Path, run_cli: Any) -> None:
    result = run_cli("evaluate", run, "--data.tasks=[slope, sal, depth, parts]")  # names decide, not their order
    assert result.status == 0, result.err
    rows = [line.split("│")[1:4] for line in result.out.splitlines() if "/" in line and "│" in line]
    assert len(rows) > 8
    assert all(now == then for _, now, then in rows)
    result = run_cli("evaluate", run, "--data.tasks=[sal, depth]")
    assert "parts" in result.err
    assert "there alone" in result.err


@pytest.mark.slow
def test_baselines_are_runs_of_the_same_data_and_may_be_gone_later(run: Path, run_cli: Any, tmp_path: Path) -> None:
    out, alone = tmp_path / "run", tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "metrics.json", alone)
    given = ["train", run.parent / "config.yaml", "--code", TOY, "--out", out, f"--model.baselines={alone}"]
    result = run_cli(*given, "--data.image_size=64")
    assert result.status == 2
    assert f"{alone} (depth): images of 32 x 32 pixels there and 64 x 64 here" in result.err
    assert not out.exists()
    assert run_cli(*given, "--trainer.max_epochs=1").status == 0
    shutil.rmtree(alone)
    for split in ("test", "validation"):
        result = run_cli("evaluate", out, "--split", split)
        assert result.status == 0, result.err
        rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in result.out.splitlines() if "│" in line}
        wanted = json.loads((run / "metrics.json").read_text())[split]["depth/rmse"]
        assert float(rows["depth/rmse"][2]) == pytest.approx(wanted, abs=1e-4)
        assert rows["delta_m"][0] == rows["delta_m"][1]
    result = run_cli("evaluate", out, "--data.image_size=64")
    assert "32 x 32 pixels there and 64 x 64 here" in result.out
    row = next(line for line in result.out.splitlines() if "│ delta_m" in line)
    assert not row.split("│")[2].strip()
    load_task(Run.open(out))


@pytest.mark.slow
def test_predictions_are_written_for_each_task(run: Path, run_cli: Any, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    (tmp_path / "new").mkdir()
    Image.fromarray(image).save(tmp_path / "new" / "a.jpg")
    out = tmp_path / "out"
    result = run_cli("predict", run, tmp_path / "new", "--out", out)
    assert result.status == 0, result.err
    written = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    names = {f"{task}/a.png" for task in (*TARGETS, "depth_mm", "strips")}
    assert written == {*names, "depth/a.npy", "predictions.csv"}
    modes = {task: Image.open(out / task / "a.png").mode for task in TARGETS}
    assert modes == {"parts": "P", "depth": "RGB", "sal": "L", "slope": "RGB"}
    assert Image.open(out / "strips" / "a.png").size == (48 * 5, 40)
    depth, mask = np.load(out / "depth" / "a.npy"), np.asarray(Image.open(out / "parts" / "a.png"))
    assert (depth.shape, depth.dtype) == ((40, 48), np.float32)
    whole = np.asarray(Image.open(out / "depth_mm" / "a.png"))
    assert np.array_equal(whole, np.where(depth > 0, np.rint(depth.astype(float) * 1000), 0))
    with (out / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [int(row[f"parts: {name}"]) for name in ("ground", "square")] == np.bincount(mask.ravel(), None, 2).tolist()
    assert float(row["depth: mean"]) == pytest.approx(float(depth.mean()), rel=1e-4)
    assert "exists already" in run_cli("predict", run, tmp_path / "new", "--out", out).err
    task, _ = load_task(Run.open(run))
    assert task.bank.tasks() == list(TARGETS)


@pytest.mark.slow
def test_exports_have_an_output_per_task_or_one(run: Path, copies: Path, run_cli: Any, tmp_path: Path) -> None:
    task, _ = load_task(Run.open(run))
    assert task.mergeable() is None  # the layers in front of the branches
    assert "weights of its own" in str(load_task(Run.open(copies))[0].mergeable())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = task(images)
    result = run_cli("export", run, "--format", "export", "--out", tmp_path / "all.pt2")
    assert result.status == 0, result.err
    found = torch.export.load(tmp_path / "all.pt2").module()(images)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
    out = tmp_path / "depth.pt2"
    result = run_cli("export", copies, "--format", "export", "--out", out, "--task", "depth")
    assert result.status == 0, result.err
    assert "yes" in next(line for line in result.out.splitlines() if "merged" in line)
    assert torch.export.load(out).module()(images).shape == (2, 1, 32, 32)
    assert "dept" in run_cli("export", run, "--out", tmp_path / "x.onnx", "--task", "dept").err


@pytest.mark.slow
def test_what_branches_is_no_plain_model_and_a_copy_is_one(
    run: Path, copies: Path, run_cli: Any, tmp_path: Path
) -> None:
    result = run_cli("merge", run, "--out", tmp_path / "branches.safetensors")
    assert result.status == 2
    assert f"`vispeft export {run} --out FILE` writes the whole model with all of its tasks" in result.err
    assert not list(tmp_path.iterdir())
    result = run_cli("merge", copies, "--out", tmp_path / "plain.safetensors")
    assert "Name it by --task" in result.err
    result = run_cli("merge", copies, "--out", tmp_path / "plain.safetensors", "--task", "sal")
    assert result.status == 0, result.err
    decoder = load_file(tmp_path / "plain.decoder.safetensors")
    assert {name.split(".")[1] for name in decoder} == {"sal"}


@pytest.mark.slow
def test_resumed_runs_end_bit_equal(run: Path, run_cli: Any, tmp_path: Path) -> None:
    cut, config = tmp_path / "cut", run.parent / "config.yaml"
    stopped = run_cli("train", config, "--code", TOY, "--out", cut, "--checkpoints.every_n_steps=1")
    assert stopped.status == 0, stopped.err
    for path in (cut / "metrics.json", sorted((cut / "checkpoints").glob("step-*.ckpt"))[-1]):
        path.unlink()
    resumed = run_cli("train", config, "--code", TOY, "--resume", cut, "--checkpoints.every_n_steps=1")
    assert resumed.status == 0, resumed.err
    for name in ("adapter.safetensors", "head.safetensors"):
        first, second = load_file(run / "adapter" / name), load_file(cut / "adapter" / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_going_on_from_the_run(run: Path, run_cli: Any, tmp_path: Path) -> None:
    settings = ["--trainer.max_epochs=1", "--init", run]
    result = run_cli("train", run.parent / "config.yaml", "--code", TOY, *settings, "--out", tmp_path / "same")
    assert "with its decoder" in result.out, result.err
    assert run_cli("inspect", run).status == 0


def test_what_does_not_go_together_is_refused_before_training(run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    given = ["train", tmp_path / "config.yaml", "--code", TOY, "--out", tmp_path / "run"]
    for override, says in (
        ("--model.targets={}", "decided by the data"),
        ("--model.baselines={depth: 1.0}", "no figure for parts, sal, slope"),
        ("--model.loss_weights={dept: 1.0}", "depth"),
        ("--model.weights={depth: 1.0}", "Did you mean model.loss_weights?"),
        ("--model.lr={depth: 1.0}", "takes none"),
        ("--model.weighting=uncertain", "Did you mean 'uncertainty'?"),
        ("--data.tasks=depth", "a list is needed, such as [depth]"),
        (f"--model.baselines={tmp_path / 'nothing'}", "Give the directory of a finished run"),
    ):
        result = run_cli(*given, override)
        assert result.status == 2
        assert says in result.err, result.err
        assert not (tmp_path / "run").exists()


CONFIGS = sorted(name for name in config_names() if name.startswith("multitask/"))
SIZES = {"r16": (4_953_146, 1_946_624), "plus": (3_469_370, 1_946_624)}
SIZES |= {"polyhistor": (6_410_684 + 2_549_024, 2_549_024), "polyhistor_lite": (413_552 + 2_549_024, 2_549_024)}
"""All trained parameters and those of the decoders, of the tables in arXiv 2403.20320 and 2210.03265 (Swin-T)."""


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_name_their_command_and_fit_their_data(name: str) -> None:
    path = find_config(name)
    assert path.read_text().splitlines()[0] == f"# vispeft train {name}"
    tree = read_config(path)
    check_config(tree, [], name)
    data = build_data(tree["data"], [], name)
    baselines = tree["model"]["init_args"].get("baselines")
    assert baselines is None or set(baselines) == set(data.targets)
    assert tree["data"]["init_args"]["image_size"] % 32 == 0


@pytest.mark.slow
@pytest.mark.parametrize("short", SIZES)
def test_shipped_configs_have_the_published_sizes(short: str) -> None:
    name = next(name for name in CONFIGS if name.endswith((f"pascal_{short}", f"mtlora_{short}")))
    tree = read_config(find_config(name))
    check_config(tree, [], name)
    targets = target_notes(build_data(tree["data"], [], name).targets)
    tree["model"]["init_args"]["backbone_args"] = {"pretrained": False}
    report = build_task(tree["model"], lambda cls: {"targets": targets}, name).report()
    assert (report.trainable + report.decoder, report.decoder) == SIZES[short]
