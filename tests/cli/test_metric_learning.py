"""A run of metric learning from the command line: train, stop, go on, finish, measure, predict, merge, export."""

import csv
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import TINY
from vispeft.cli import merge, train
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_run, load_task
from vispeft.cli.evaluation import row_name
from vispeft.cli.runs import Run
from vispeft.cli.start import start_from
from vispeft.data import MetricFolderData
from vispeft.errors import ConfigError
from vispeft.tasks import base

CLASSES, IMAGES = 12, 4


def paint(root):
    """Make patterns under noise, whose classes can be told apart."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"c{label:02d}").mkdir(parents=True)
        pattern = random.random((16, 16, 3))
        for number in range(IMAGES):
            image = 0.6 * pattern + 0.4 * random.random(pattern.shape)
            Image.fromarray((255 * image).astype(np.uint8)).save(root / f"c{label:02d}/{number}.png")


def config_of(folder, **settings):
    tree = {
        "model": {
            "class_path": "MetricLearning",
            "init_args": {
                "backbone": "vit_tiny_patch16_224",
                "backbone_args": dict(TINY),
                "method": "lora",
                "loss": {"class_path": "SoftTripleLoss", "init_args": {"centers_per_class": 2}},
                "dim": 8,
                "lr": 1e-2,
                "proxy_lr": 0.1,
                **settings,
            },
        },
        "data": {
            "class_path": "MetricFolderData",
            "init_args": {"root": str(folder / "images"), "batch_size": 8, "images_per_class": 2, "augment": None},
        },
        "trainer": {"max_epochs": 2},
    }
    (folder / "metric.yaml").write_text(yaml.safe_dump(tree))
    return folder / "metric.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metric")
    paint(folder / "images")
    return folder


@pytest.fixture(scope="module")
def run(place, call_cli):
    result = call_cli("train", config_of(place), "--out", place / "run")
    assert result.status == 0, result.err
    return place / "run"


# ------------------------------------------------------------------ config


def test_losses_and_miners_of_a_config_and_its_overrides(place, tmp_path, capsys):
    config = config_of(place)
    library = "pytorch_metric_learning"
    made = ConfigCLI(
        config,
        [
            "--model.loss=TripletMarginLoss",
            "--model.loss.margin=0.3",
            "--model.loss.distance={class_path: LpDistance, init_args: {p: 1}}",
            "--model.miner=MultiSimilarityMiner",
            "--model.miner.epsilon=0.2",
            "--model.memory=16",
        ],
    )
    criterion = made.model.criterion
    assert (criterion.loss.loss.margin, criterion.loss.loss.distance.p, criterion.loss.miner.epsilon) == (0.3, 1, 0.2)
    written = yaml.safe_load(made.resolved())["model"]["init_args"]
    assert written["miner"] == {"name": f"{library}.miners.MultiSimilarityMiner", "init_args": {"epsilon": 0.2}}
    assert written["loss"]["init_args"]["distance"]["name"] == f"{library}.distances.LpDistance"
    (tmp_path / "again.yaml").write_text(made.resolved())
    assert ConfigCLI(tmp_path / "again.yaml", []).resolved() == made.resolved()


@pytest.mark.slow
def test_what_is_refused_before_a_run_directory_is_made(place, run_cli):
    config = config_of(place)
    for override, told in (
        ("--model.loss=VICRegLoss", "two views"),
        ("--model.loss.num_classes=3", "decided by the data"),
        ("--model.miner.epsilon=0.1", "no miner is named"),
        ("--model.loss={class_path: os.system}", "Unknown loss"),
        ("--model.memory=16", "SoftTripleLoss cannot compare"),
        ("--data.batch_size=64", "batch_size"),
    ):
        result = run_cli("train", config, "--out", place / "refused", override)
        assert result.status == 2, override
        assert told in result.err, result.err
        assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.batch_size=64"], "batch_size"),
        (["--data.root", "DAMAGED"], "c00/0.png"),
    ],
    ids=["folder", "batch", "damage"],
)
def test_data_are_checked_before_the_backbone_is_made(place, run_cli, tmp_path, monkeypatch, overrides, told):
    def make(*_, **__):
        raise AssertionError("the backbone was made")

    monkeypatch.setattr(base, "create_model", make)
    if "DAMAGED" in overrides:
        shutil.copytree(place / "images", tmp_path / "images")
        (tmp_path / "images/c00/0.png").write_bytes((place / "images/c00/0.png").read_bytes()[:100])
        overrides = ["--data.root", tmp_path / "images"]
    result = run_cli("train", config_of(place), "--out", tmp_path / "run", *overrides)
    assert result.status == 2
    assert told in result.err
    assert not (tmp_path / "run").exists()


def test_validation_that_shows_the_test_images_is_named_by_them(place, capsys):
    settings = {"root": str(place / "images"), "batch_size": 8, "images_per_class": 2}
    data = MetricFolderData(validation=None, **settings)
    train._tell_repeated(data)
    assert capsys.readouterr().out.startswith("Validation shows the test images, since there are none for it alone.")
    assert [row_name(data, split) for split in ("validation", "test")] == ["validation (test images)", "test"]
    train._tell_repeated(MetricFolderData(**settings))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------ a run


@pytest.mark.slow
def test_what_a_run_leaves(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["test"]) == {*(f"recall@{k}" for k in (1, 2, 4, 8)), "map@r", "r_precision", "mrr"}
    assert metrics["test_queries"] == CLASSES // 2 * IMAGES
    assert metrics["parameters"]["decoder"] == 32 * 8 + 8
    pictures = {path.name for path in (run / "plots").iterdir()}
    assert pictures == {
        *(f"neighbours_epoch_{number:03d}.png" for number in (1, 2)),
        "neighbours_test.png",
        "embeddings_test.png",
        "learning_curves.png",
    }
    head = load_file(run / "adapter/head.safetensors")
    assert set(head) == {"decoder/head.proj.weight", "decoder/head.proj.bias"}
    header = json.loads((run / "adapter/adapter.json").read_text())
    assert header["output"]["similarity"] == {"name": "cosine"}


@pytest.mark.slow
def test_commands_on_a_finished_run(run, place, run_cli, tmp_path):
    result = run_cli("evaluate", run)
    assert result.status == 0, result.err
    cli = load_run(Run.open(run))
    [found] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert found["test/map@r"] == pytest.approx(Run.open(run).figures("test")["map@r"], abs=1e-6)
    assert run_cli("inspect", run).status == 0
    assert run_cli("doctor", config_of(place)).status == 0
    result = run_cli("predict", run, place / "images/c00", "--out", tmp_path / "found")
    assert result.status == 0, result.err
    rows = list(csv.reader((tmp_path / "found/predictions.csv").open()))
    assert rows[0] == ["path", *(f"e{number}" for number in range(8))]
    lengths = np.linalg.norm(np.array([row[1:] for row in rows[1:]], dtype=float), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


@pytest.mark.slow
def test_a_merged_model_is_timms_and_gives_the_embedding(run, run_cli, tmp_path):
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = load_task(Run.open(run))[0](images)
    result = run_cli("merge", run, "--out", tmp_path / "merged.safetensors")
    assert result.status == 0, result.err
    info = json.loads((tmp_path / "merged.json").read_text())
    model = timm.create_model(info["architecture"], **info["args"]).eval()
    model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    with torch.no_grad():
        plain = torch.nn.functional.normalize(model(images), dim=1)
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-5)
    assert info["decoder_file"] is None
    assert info["head_file"] is None
    result = run_cli("export", run, "--out", tmp_path / "model.onnx")
    assert result.status == 0, result.err
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [exported] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), wanted, rtol=1e-4, atol=1e-5)


def test_a_head_with_a_norm_lies_beside_the_merged_model_under_its_own_name(place, tmp_path, monkeypatch):
    task = ConfigCLI(config_of(place, head_norm="affine", loss="ContrastiveLoss", proxy_lr=None), []).model.eval()
    task.bank.annotate(class_names=["a"], preprocessing=task.preprocessing.to_dict(), output=task.output(), metrics={})
    task.save_adapter(tmp_path / "run/adapter")
    monkeypatch.setattr(merge, "load_task", lambda _: (task, None))
    (tmp_path / "b.head.safetensors").touch()
    with pytest.raises(ConfigError, match=r"b\.head\.safetensors exists already"):
        merge.merge_run(Run(tmp_path / "run", {}), tmp_path / "b.safetensors")
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = task(images)
    about = merge.merge_run(Run(tmp_path / "run", {}), tmp_path / "a.safetensors")
    assert about["head_file"] == about["decoder_file"] == "a.head.safetensors"
    model = timm.create_model(about["architecture"], **about["args"]).eval()
    model.load_state_dict(load_file(tmp_path / "a.safetensors"))
    head = {name.removeprefix("head."): tensor for name, tensor in load_file(tmp_path / about["head_file"]).items()}
    with torch.no_grad():
        features = torch.nn.functional.layer_norm(model(images), (32,), head["norm.weight"], head["norm.bias"])
        plain = torch.nn.functional.linear(features, head["proj.weight"], head["proj.bias"])
    torch.testing.assert_close(torch.nn.functional.normalize(plain), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_is_gone_on_with_and_finished_early(run, place, run_cli, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped here")

    config = config_of(place)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_run", fail)
        with pytest.raises(RuntimeError, match="stopped here"):
            train.train(config, ["--trainer.max_epochs=1"], out=place / "short")
    result = run_cli("train", "--finish", place / "short")
    assert result.status == 0, result.err
    assert Run.open(place / "short").number("epochs") == 1
    result = run_cli("train", "--resume", place / "short", "--trainer.max_epochs=2")
    assert result.status == 0, result.err
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, place / "short")]
    assert metrics[1]["steps"] == metrics[0]["steps"]


@pytest.mark.slow
def test_a_start_from_an_adapter_of_other_classes_keeps_the_head(place, run):
    task = ConfigCLI(config_of(place), []).model
    said = start_from(task, str(run / "adapter"), ("other", "classes"))
    assert said.endswith(", with its embedding head.")
    saved = load_file(run / "adapter/head.safetensors")
    assert torch.equal(task.head.proj.weight, saved["decoder/head.proj.weight"])
