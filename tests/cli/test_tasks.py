"""Every task from config to predictions."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.cli.conftest import call
from tests.data.published import Painter, make_vtab_task
from tests.tiny import CONFIG
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_run
from vispeft.cli.evaluation import evaluate
from vispeft.cli.runs import Run

NAMES = {"MultiLabel": ["even", "prime", "closed loop", "above four"], "Regression": ["digit"]}
PLOTS = {"MultiLabel": "average_precision.png", "Regression": "predicted.png"}
DETAILS = {"MultiLabel": "test_average_precision_per_class", "Regression": "test_per_target"}
HEADS = {"MultiLabel": ["labels", *NAMES["MultiLabel"]], "Regression": ["digit"]}


@pytest.fixture(scope="module", params=["MultiLabel", "Regression"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    text = CONFIG.replace("tasks.Classification", f"tasks.{request.param}")
    text = text.replace("batch_size: 256", f"batch_size: 256\n    target: {request.param.lower()}")
    (folder / "tiny.yaml").write_text(text)
    result = call("train", folder / "tiny.yaml", "--out", folder / "run")
    assert result.status == 0, result.err
    return request.param, Run.open(folder / "run")


def test_a_run_holds_what_its_task_says(run):
    task, finished = run
    assert list(finished.metrics[DETAILS[task]]) == NAMES[task]
    described = json.loads((finished.adapter / "adapter.json").read_text())
    assert described["class_names"] == NAMES[task]
    assert described["output"]["target"] == task.lower()
    assert {path.name for path in (finished.path / "plots").iterdir()} == {"learning_curves.png", PLOTS[task]}


def test_evaluating_from_files_gives_the_same(run):
    _, finished = run
    cli = load_run(finished)
    for split in ("validation", "test"):
        assert evaluate(cli.trainer, cli.model, cli.datamodule, split) == finished.metrics[split]


def test_predictions_are_in_the_targets_own_terms(run, tmp_path):
    task, finished = run
    for index in range(3):
        grey = (load_digits().images[index] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    result = call("predict", finished.path, tmp_path, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", *HEADS[task]]
    cli = load_run(finished)
    cli.datamodule.fit_to(cli.model.preprocessing)
    grey = torch.from_numpy(load_digits().images[:3] * 255 / 16).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        scores = cli.model(cli.datamodule.preprocessing.transform()(grey))
    if task == "MultiLabel":
        expected = scores.sigmoid()
        labels = [";".join(n for n, p in zip(NAMES[task], row, strict=True) if p >= 0.5) for row in expected]
        assert [row[1] for row in rows] == labels
    else:
        # A constant model predicts the mean of the training targets, which is near 4.5 and not near 0.
        data = cli.datamodule
        data.setup()
        targets = data.split("train").targets
        expected = scores * targets.std(0, correction=0) + targets.mean(0)
    found = [[float(value) for value in row[-len(NAMES[task]) :]] for row in rows]
    assert np.allclose(found, expected.numpy(), atol=1e-4)


def test_data_of_another_kind_are_refused_before_training(config, run_cli, tmp_path):
    result = run_cli("train", config, "--data.target=regression", "--out", tmp_path / "run")
    assert result.status == 2
    assert "targets of the kind 'regression', and Classification needs 'class'. Use the task Regression" in result.err
    assert not (tmp_path / "run").exists()


def test_settings_of_the_base_are_known_and_near_ones_are_named(config, run_cli):
    cli = ConfigCLI(config, ["--model.class_weights=balanced", "--model.label_smoothing=0.1", "--model.warmup=0.2"])
    assert (cli.model.class_weights, cli.model.label_smoothing, cli.model.warmup) == ("balanced", 0.1, 0.2)
    assert "Did you mean 'model.warmup'" in run_cli("train", config, "--model.warmupp=1").err
    assert "give 'balanced', or one finite number" in run_cli("train", config, "--model.class_weights=[1,2]").err


@pytest.mark.slow
def test_the_last_epoch_is_kept_also_where_it_is_not_validated(run_cli, tmp_path):
    make_vtab_task(tmp_path, "kitti", Painter())
    text = CONFIG.replace("vispeft.data.DigitsData", "Vtab1kData").replace(
        "batch_size: 256", f"batch_size: 4\n    root: {tmp_path}\n    task: kitti"
    )
    (tmp_path / "vtab.yaml").write_text(text)
    seldom = "--trainer.check_val_every_n_epoch=2"
    result = run_cli("train", tmp_path / "vtab.yaml", seldom, "--trainer.max_epochs=3", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert "Last of 3 epochs: epoch 3" in result.out
    result = run_cli("train", tmp_path / "vtab.yaml", seldom, "--data.protocol=tune", "--out", tmp_path / "tune")
    assert result.status == 0, result.err
    result = run_cli("train", tmp_path / "vtab.yaml", seldom, "--out", tmp_path / "final")
    assert result.status == 0, result.err
    assert "Last of 2 epochs: epoch 2" in result.out


@pytest.mark.slow
def test_predictions_need_no_training_data(run_cli, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(noise // (1 if name == "cat" else 3)).save(tmp_path / "data" / name / f"{index}.png")
    text = CONFIG.replace("vispeft.data.DigitsData", "ImageFolderData").replace(
        "batch_size: 256", f"batch_size: 4\n    root: {tmp_path / 'data'}"
    )
    (tmp_path / "folder.yaml").write_text(text)
    result = run_cli("train", tmp_path / "folder.yaml", "--out", tmp_path / "run", "--model.method=linear_probe")
    assert result.status == 0, result.err
    (tmp_path / "data/cat").rename(tmp_path / "images")
    (tmp_path / "data").rename(tmp_path / "gone")
    result = run_cli("predict", tmp_path / "run", tmp_path / "images", "--out", tmp_path / "out")
    assert result.status == 0, result.err
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    merged = run_cli("merge", tmp_path / "run", "--out", tmp_path / "plain.safetensors")
    assert merged.status == 0, merged.err
