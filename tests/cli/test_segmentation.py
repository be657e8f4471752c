"""A segmentation run from its config to masks of new images."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vispeft.cli.evaluate import load_task, match_names
from vispeft.cli.runs import Run
from vispeft.data import MaskFolderData
from vispeft.heads.pyramid import MapReader
from vispeft.tasks import Segmentation, SegmentationNetwork

CONFIG = """
model:
  class_path: vispeft.tasks.Segmentation
  init_args:
    backbone: vit_tiny_patch16_224
    backbone_args: {pretrained: false, img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
    method: {class_path: vispeft.SSF}
    decoder_args: {channels: 16}
    lr: 1e-2
data:
  class_path: vispeft.data.MaskFolderData
  init_args:
    root: ROOT
    class_names: [ground, square]
    palette: [[0, 0, 0], [255, 0, 0]]
    batch_size: 4
    augment: {scale: [1.0, 1.0], photometric: false}
trainer:
  max_epochs: 2
"""


def picture(folder: Path, name: str, seed: int) -> None:
    """Write an image with a bright square, and its mask."""
    numbers = np.random.default_rng(seed)
    image, mask = numbers.integers(0, 60, (40, 48, 3), dtype=np.uint8), np.zeros((40, 48), np.uint8)
    top, left = numbers.integers(0, 20, 2)
    image[top : top + 16, left : left + 16] += 150
    mask[top : top + 16, left : left + 16] = 1
    mask[:2] = 255
    for part, content in (("images", image), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / part / f"{name}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, call_cli: Any) -> Path:
    folder = tmp_path_factory.mktemp("segmentation")
    for seed in range(20):
        picture(folder / "data", f"square {seed}", seed)
    (folder / "config.yaml").write_text(CONFIG.replace("ROOT", str(folder / "data")))
    result = call_cli("train", folder / "config.yaml", "--out", folder / "run")
    assert result.status == 0, result.err
    # A table of all classes follows the one of the splits.
    assert [
        line.split("│")[1].strip() for line in result.out.splitlines() if "│ ground" in line or "│ square" in line
    ] == [
        "ground",
        "square",
    ]
    return folder / "run"


def test_the_run_has_everything(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["test"]) == {"miou", "macc", "aacc", "mdice"}
    assert set(metrics["test_iou_per_class"]) == {"ground", "square"}
    pictures = {path.name for path in (run / "plots").iterdir()}
    assert pictures == {
        "confusion_matrix.png",
        "iou_per_class.png",
        "learning_curves.png",
        "overlays_epoch_001.png",
        "overlays_epoch_002.png",
        "overlays_test.png",
    }
    header = json.loads((run / "adapter" / "adapter.json").read_text())
    assert header["output"]["decoder"]["name"] == "segformer"
    assert header["output"]["palette"] == [[0, 0, 0], [255, 0, 0]]
    assert all(name.startswith("decoder/") for name in load_file(run / "adapter" / "head.safetensors"))


def test_the_run_is_measured_again_to_the_same_figures(run: Path, run_cli: Any) -> None:
    result = run_cli("evaluate", run)
    assert result.status == 0, result.err
    rows = [line.split("│")[2:] for line in result.out.splitlines() if "measured now" in line or "metrics.json" in line]
    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_masks_of_the_classes_in_another_order_give_the_same_figures(
    run: Path, run_cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = ["--data.class_names=[square, ground]", "--data.ids={0: 1, 1: 0}", "--data.palette=null"]
    result = run_cli("evaluate", run, *swapped)
    assert result.status == 0, result.err
    assert "another order than the model, and are matched by name: square, ground here, ground, square" in result.out
    rows = _table(result.out)
    assert rows["measured now"] == rows["metrics.json"]
    colours = [(255, 0, 0), (0, 0, 0)]
    for palette, told in ((colours, False), (colours[::-1], True)):
        data = MaskFolderData(
            root=str(run.parent / "data"), class_names=["square", "ground"], palette=palette, rgb_masks=True
        )
        match_names(Run.open(run), data, 2)
        assert ("[0, 0, 0] is square here and ground there" in capsys.readouterr().out) == told
        assert data.palette == tuple(palette[::-1])


def _table(text: str) -> dict[str, list[str]]:
    """Read the rows of a printed table by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_masks_overlays_and_areas_are_written(run: Path, run_cli: Any, tmp_path: Path) -> None:
    picture(tmp_path / "new", "a", 100)
    (tmp_path / "new" / "masks" / "a.png").unlink()
    Image.fromarray(np.full((30, 20), 7, np.uint8)).save(tmp_path / "new" / "grey.jpg")
    out = tmp_path / "out"
    result = run_cli("predict", run, tmp_path / "new", "--out", out)
    assert result.status == 0, result.err
    mask = Image.open(out / "masks" / "images" / "a.png")
    assert (mask.mode, mask.size) == ("P", (48, 40))
    assert mask.getpalette()[:6] == [0, 0, 0, 255, 0, 0]
    assert Image.open(out / "overlays" / "images" / "a.png").size == (48, 40)
    with (out / "areas.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [set(row) for row in rows] == [{"path", "ground", "square"}] * 2
    counts = np.bincount(np.asarray(mask).ravel(), minlength=2)
    assert [int(rows[1][name]) for name in ("ground", "square")] == counts.tolist()
    assert sum(int(rows[0][name]) for name in ("ground", "square")) == 30 * 20
    again = run_cli("predict", run, tmp_path / "new", "--out", out)
    assert again.status != 0
    assert "areas.csv exists already" in again.err


def test_two_images_of_one_name_are_refused_before_any_is_predicted(run: Path, run_cli: Any, tmp_path: Path) -> None:
    for ending in ("png", "jpg"):
        Image.fromarray(np.zeros((30, 20), np.uint8)).save(tmp_path / f"a.{ending}")
    result = run_cli("predict", run, tmp_path, "--out", tmp_path / "out")
    assert "only their endings differ" in result.err
    assert not (tmp_path / "out").exists()


def test_an_image_smaller_than_the_window_is_refused_before_any_is_predicted(
    run: Path, run_cli: Any, tmp_path: Path
) -> None:
    slide = ["--model.inference={mode: slide, window: 32, stride: 20}", "--data.evaluation=whole"]
    result = run_cli("train", run.parent / "config.yaml", "--out", tmp_path / "run", "--trainer.max_epochs=1", *slide)
    assert result.status == 0, result.err
    for name, side in (("a", 40), ("b", 30), ("c", 32)):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((side, 50), np.uint8)).save(tmp_path / "new" / f"{name}.png")
    result = run_cli("predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "out")
    assert "1 of 3 images is smaller than the sliding window of 32 pixels" in result.err, result.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "new" / "b.png").unlink()
    assert run_cli("predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "out").status == 0


@pytest.mark.slow
def test_going_on_from_the_run(run: Path, run_cli: Any, tmp_path: Path) -> None:
    config = run.parent / "config.yaml"
    result = run_cli("train", config, "--init", run, "--out", tmp_path / "same", "--trainer.max_epochs=1")
    assert "with its decoder" in result.out, result.err
    other = yaml.safe_load(config.read_text())
    other["data"]["init_args"]["class_names"] = ["earth", "box"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    result = run_cli("train", tmp_path / "other.yaml", "--init", run, "--out", tmp_path / "o", "--trainer.max_epochs=1")
    assert "the decoder is a fresh one (other classes)" in result.out, result.err


@pytest.mark.slow
def test_a_decoder_that_read_other_maps_starts_anew(run: Path, run_cli: Any, tmp_path: Path) -> None:
    config = run.parent / "config.yaml"
    arguments = ["--model.backbone_args.depth=4", "--trainer.max_epochs=1"]
    first = run_cli("train", config, "--out", tmp_path / "first", "--model.taps=[0, 3]", *arguments)
    assert first.status == 0, first.err
    for taps, says in (("[0, 3]", "with its decoder"), ("[1, 3]", "the decoder is a fresh one (it read other maps)")):
        out = tmp_path / says[:4]
        result = run_cli(
            "train", config, "--init", tmp_path / "first", "--out", out, f"--model.taps={taps}", *arguments
        )
        assert says in result.out, result.err


@pytest.mark.slow
def test_masks_are_predicted_in_the_precision_of_the_run(
    run: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace("precision: null", "precision: bf16"))
    seen, predict = [], Segmentation.predict

    def watched(task: Segmentation, *arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return predict(task, *arguments)

    monkeypatch.setattr(Segmentation, "predict", watched)
    for folder in (run, copy):
        out = tmp_path / folder.parent.name / "out"
        result = run_cli("predict", folder, run.parent / "data" / "images" / "square 0.png", "--out", out)
        assert result.status == 0, result.err
    assert seen == [False, True]


def test_what_does_not_go_together_is_refused_at_once(run: Path, run_cli: Any, tmp_path: Path) -> None:
    config = run.parent / "config.yaml"
    for override, says in (
        ("--method=vqt", "changes the backbone's last feature"),
        ("--model.decoder=uper", "needs a pyramid"),
        ("--model.decoder=segfromer", "segformer"),
    ):
        result = run_cli("train", config, "--out", tmp_path / "x", override)
        assert result.status != 0
        assert says in result.err, result.err
        assert not (tmp_path / "x" / "metrics.json").exists()
    swapped = yaml.safe_load(config.read_text())
    swapped["data"] = {"class_path": "vispeft.data.DigitsData"}
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(swapped))
    result = run_cli("train", tmp_path / "digits.yaml", "--out", tmp_path / "z")
    assert "targets of the kind 'class', and Segmentation needs 'mask'" in result.err, result.err
    slide = ["--model.inference={mode: slide, window: 64, stride: 32}"]
    result = run_cli("train", config, "--out", tmp_path / "y", *slide)
    assert "The smallest image has 32 x 32 pixels, and the sliding window has 64" in result.err, result.err


@pytest.mark.slow
def test_resumed_runs_end_bit_equal(run: Path, run_cli: Any, tmp_path: Path) -> None:
    config = run.parent / "config.yaml"
    cut = tmp_path / "cut"
    stopped = run_cli("train", config, "--out", cut, "--checkpoints.every_n_steps=1")
    assert stopped.status == 0, stopped.err
    checkpoints = sorted((cut / "checkpoints").glob("step-*.ckpt"))
    for path in (cut / "metrics.json", checkpoints[-1]):
        path.unlink()
    resumed = run_cli("train", config, "--resume", cut, "--checkpoints.every_n_steps=1")
    assert resumed.status == 0, resumed.err
    for name in ("adapter.safetensors", "head.safetensors"):
        first, second = load_file(run / "adapter" / name), load_file(cut / "adapter" / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_backbone_is_merged_and_the_decoder_lies_beside_it(run: Path, run_cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "plain.safetensors"
    result = run_cli("merge", run, "--out", out)
    assert result.status == 0, result.err
    info = json.loads((tmp_path / "plain.json").read_text())
    plain = timm.create_model(info["architecture"], **info["args"]).eval()
    plain.load_state_dict(load_file(out))
    task, _ = load_task(Run.open(run))
    beside = load_file(tmp_path / info["decoder_file"])
    assert set(beside) == {f"decoder.{name}" for name in task.decoder.state_dict()}
    images = torch.randn(2, 3, 32, 32)
    merged = SegmentationNetwork(plain, MapReader(plain, **_taps(info)), copy.deepcopy(task.decoder))
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(images), task(images), rtol=1e-4, atol=1e-4)
    assert "exists already" in run_cli("merge", run, "--out", out).err
    (tmp_path / "other.decoder.safetensors").touch()
    assert (
        "other.decoder.safetensors exists already" in run_cli("merge", run, "--out", tmp_path / "other.safetensors").err
    )


def _taps(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info["output"]["decoder"][name] for name in ("taps", "levels")}


def test_a_run_is_inspected(run: Path, run_cli: Any) -> None:
    result = run_cli("inspect", run)
    assert result.status == 0, result.err
    task, _ = load_task(Run.open(run))
    for wanted in ("blocks.0.attn.qkv", f"{task.bank.report().trainable:,}", f"{task.report().decoder:,}", "decoder"):
        assert wanted in result.out
    assert "no run directory. Name a method too" in run_cli("inspect", "vit_tiny_patch16_224").err
    assert "Leave it out" in run_cli("inspect", run, "--rank", "4").err


@pytest.mark.slow
def test_the_network_is_exported_for_another_size(run: Path, run_cli: Any, tmp_path: Path) -> None:
    result = run_cli("export", run, "--format", "export", "--out", tmp_path / "a.pt2", "--size", "36", "40")
    assert result.status == 0, result.err
    notes = json.loads((tmp_path / "a.json").read_text())
    assert notes["output"]["inference"]["mode"] == "whole"
    assert notes["input"]["shape"] == ["batch", 3, 36, 40]
