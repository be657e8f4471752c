import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from vispeft.cli import inspect
from vispeft.cli.common import run_tool
from vispeft.cli.evaluate import load_run
from vispeft.cli.evaluation import evaluate
from vispeft.cli.runs import Run
from vispeft.tasks import Classification
from vispeft.tasks.predictions import Prediction


def test_evaluate_equals_what_training_measured(finished, run_cli):
    run = Run.open(finished)
    cli = load_run(run)
    for split in ("validation", "test"):
        assert evaluate(cli.trainer, cli.model, cli.datamodule, split) == run.metrics[split]
    result = run_cli("evaluate", finished, "--data.batch_size=100")
    assert result.status == 0


def test_evaluate_refuses_another_model(finished, run_cli):
    assert "overrides under data and trainer only" in run_cli("evaluate", finished, "--model.lr=1").err
    assert "Did you mean 'data.batch_size'" in run_cli("evaluate", finished, "--data.bath_size=1").err


def test_what_is_no_run_is_refused(finished, run_cli, tmp_path):
    assert "There is no run directory" in run_cli("evaluate", tmp_path / "none").err
    assert "metrics.json" in run_cli("evaluate", tmp_path).err
    shutil.copytree(finished, tmp_path / "runs/1")
    assert f"Did you mean {tmp_path / 'runs/1'}" in run_cli("evaluate", tmp_path / "runs").err
    damaged = tmp_path / "runs/1/adapter/adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "truncated or was altered" in run_cli("evaluate", tmp_path / "runs/1").err


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index in range(5):
        grey = Image.fromarray((load_digits().images[index] * 255 / 16).round().astype(np.uint8))
        mode = ("L", "RGB", "RGBA", "P", "L")[index]
        grey.convert(mode).save(folder / ("more" if index == 4 else "") / f"{index}.png")
    return folder


def test_predict_classifies_a_folder(finished, run_cli, images, tmp_path):
    result = run_cli("predict", finished, images, "--out", tmp_path / "out", "--batch_size=2")
    assert result.status == 0, result.err
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in sorted(images.rglob("*.png"))]
    cli = load_run(Run.open(finished))
    data = cli.datamodule
    data.fit_to(cli.model.preprocessing)
    grey = torch.from_numpy(load_digits().images[:5] * 255 / 16).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        expected = (cli.model(data.preprocessing.transform()(grey)) / cli.model.temperature).softmax(1)
    assert [row["class"] for row in rows] == [str(int(index)) for index in expected.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.max(1).values.tolist(), abs=2e-6)


def test_predict_says_what_it_leaves_out(finished, run_cli, images, tmp_path):
    for path in images.glob("*.png"):
        path.unlink()
    (images / "a.heic").write_bytes(b"x")
    (images / "more/._4.png").write_bytes(b"\0\5\x16\7")
    result = run_cli("predict", finished, images, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    assert "Left out: 1 file with another ending than" in result.out
    assert "(1 .heic: a.heic); 1 hidden entry (more/._4.png)." in result.out
    assert "1 image predicted: " in result.out


def test_predict_refuses_names_that_the_table_cannot_hold(finished, run_cli, images, tmp_path):
    os.rename(images / "0.png", os.path.join(os.fsencode(images), b"caf\xe9.png"))
    result = run_cli("predict", finished, images, "--out", tmp_path / "out")
    assert result.status == 2
    assert "1 of 5 images cannot be used: " in result.err
    assert "caf\\xe9.png has a name that is no UTF-8" in result.err
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_terminal_cannot_show_stops_no_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_tool(lambda argv: print("caf\xe9 \udce9")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udce9\n"


def test_predict_overwrites_nothing(finished, run_cli, images, tmp_path):
    (tmp_path / "predictions.csv").write_text("mine")
    assert "not overwritten" in run_cli("predict", finished, images, "--out", tmp_path).err
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    assert "no folder" in run_cli("predict", finished, tmp_path / "none", "--out", tmp_path / "out").err
    assert "at least 1" in run_cli("predict", finished, images, "--out", tmp_path / "out", "--batch_size=0").err


def test_merge_writes_a_plain_timm_model(finished, run_cli, tmp_path):
    result = run_cli("merge", finished, "--out", tmp_path / "plain.safetensors")
    assert result.status == 0, result.err
    described = json.loads((tmp_path / "plain.json").read_text())
    model = timm.create_model(described["architecture"], **described["args"]).eval()
    model.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    images = torch.randn(3, 3, 16, 16)
    task = load_run(Run.open(finished)).model
    with torch.inference_mode():
        expected = task(images)
        assert torch.allclose(model(images), expected, atol=1e-5 * float(expected.abs().max()))
    assert described["class_names"] == list("0123456789")
    assert described["output"] == json.loads((finished / "adapter/adapter.json").read_text())["output"]
    assert described["output"]["temperature"] > 0
    again = run_cli("merge", finished, "--out", tmp_path / "plain.safetensors")
    assert "not overwritten" in again.err
    assert "should end in .safetensors" in run_cli("merge", finished, "--out", tmp_path / "plain.pth").err


@pytest.mark.slow
def test_merge_refuses_what_timm_has_no_place_for(run_cli, config, tmp_path):
    config.write_text(config.read_text().replace("num_heads: 2}", "num_heads: 2, qkv_bias: false}"))
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
    assert run_cli("train", config, *short, "--out", tmp_path / "run").status == 0
    result = run_cli("merge", tmp_path / "run", "--out", tmp_path / "plain.safetensors")
    assert result.status == 2
    assert "had to create blocks.0.attn.qkv.bias" in result.err
    assert not (tmp_path / "plain.safetensors").exists()


def test_inspect_prints_the_plan(config, capsys):
    inspect.main(["vit_tiny_patch16_224", "lora", "--rank", "2", "--roles", "[attn.qkv]", "--blocks=[0]"])
    printed = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in printed
    assert "1,536" in printed  # 2 x 192 + 576 x 2
    inspect.main(["vit_tiny_patch16_224", str(config)])
    assert "SSF on vit: 51,456 parameters" in capsys.readouterr().out  # 192 (4 + 22 x 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_tiny_patch16_224", "sff"), "Did you mean 'ssf'"),
        (("vit_tinny_patch16_224", "ssf"), "Unknown backbone"),
        (("resnet18", "ssf"), "does not support"),
        (("vit_tiny_patch16_224", "lora", "--rnk=3"), "Did you mean 'LoRA.rank'"),
        (("vit_tiny_patch16_224", "lora", "--rank=x"), "Expected a <class 'int'>. Got value: x"),
        (("vit_tiny_patch16_224", "lora", "--rank"), "needs a value"),
        (("vit_tiny_patch16_224", "none.yaml"), "could not be read"),
        (("zoo:swin_tiny", "mtlora"), "Name them: --tasks '[seg, depth]'"),
    ],
)
def test_inspect_refuses(run_cli, arguments, message):
    result = run_cli("inspect", *arguments)
    assert result.status == 2
    assert message in result.err


class Brightness:
    """A predictor of one's own: a number and a picture of each image."""

    table, columns, folders, at_once = "brightness.csv", ["mean"], ("thumbnails",), 2

    def check(self, paths, reading):
        """Take all."""

    def __call__(self, images):
        assert 1 <= len(images) <= self.at_once
        small = Image.new("RGB", (4, 4))
        return [Prediction([f"{image.float().mean():.1f}"], {"thumbnails": small}) for image in images]


def test_predict_writes_the_rows_and_pictures_a_task_makes(finished, run_cli, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "predictor", lambda task: Brightness())
    result = run_cli("predict", finished, images, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    with open(tmp_path / "out/brightness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"path", "mean"}
    pictures = {path.relative_to(tmp_path / "out/thumbnails") for path in (tmp_path / "out").rglob("*.png")}
    assert pictures == {Path(row["path"]).relative_to(images).with_suffix(".png") for row in rows}
    (tmp_path / "out/brightness.csv").unlink()
    again = run_cli("predict", finished, images, "--out", tmp_path / "out")
    assert "exists already and is not overwritten" in again.err
    long = run_cli("predict", finished, tmp_path, "--out", "a" * 300)
    assert "where nothing can be written (File name too long)" in long.err
