import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import vispeft
from vispeft.building.classes import class_path
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method, method_node, method_presets
from vispeft.cli import train as train_tool
from vispeft.cli.common import run_tool
from vispeft.cli.config import ConfigCLI
from vispeft.cli.config_keys import check_config
from vispeft.errors import FileError
from vispeft.viz import read_history

ROOT = Path(__file__).resolve().parents[2]


def test_a_finished_run_holds_what_it_promises(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["command"].startswith("vispeft train")
    assert metrics["epochs"] == 2
    assert metrics["steps"] == 10
    assert metrics["parameters"]["trainable"] == 2 * (2 * 32 + 2 * 11 * 32)
    assert metrics["adapter_bytes"]["adapter.safetensors"] == (finished / "adapter/adapter.safetensors").stat().st_size
    assert metrics["versions"]["torch"] == version("torch")
    assert metrics["seconds"]["total"] > metrics["seconds"]["training"] > 0
    assert set(metrics["test_accuracy_per_class"]) == set("0123456789")
    described = json.loads((finished / "adapter/adapter.json").read_text())
    assert described["class_names"] == list("0123456789")
    assert described["preprocessing"]["input_size"] == [3, 16, 16]
    assert described["metrics"]["test/accuracy"] == metrics["test"]["accuracy"]
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    best = metrics["best_epoch"]
    assert {name for name in names if name.startswith("step-")} == {"step-0000005.ckpt", "step-0000010.ckpt"}
    assert (
        max(names - {"step-0000005.ckpt", "step-0000010.ckpt"}) == f"best-epoch{best - 1:03d}-step{5 * best:07d}.ckpt"
    )
    for picture in ("learning_curves.png", "confusion_matrix.png"):
        with Image.open(finished / "plots" / picture) as image:
            image.load()
            assert min(image.size) > 300
    assert list((finished / "logs/tensorboard").glob("events.*"))


def test_the_best_epoch_is_chosen_on_validation(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    curve = read_history(finished / "logs/csv/metrics.csv")["validation/accuracy"]
    best = max(value for _, value in curve)
    assert dict(curve)[metrics["best_epoch"] - 1] == best
    assert metrics["validation"]["accuracy"] == pytest.approx(best)


def test_the_adapter_loads_without_the_run(finished):
    torch.manual_seed(0)
    cli = ConfigCLI(finished / "config.yaml", [])
    model = cli.model.model
    cli.model.bank.detach("default")
    bank = vispeft.load(model, finished / "adapter")
    assert bank.notes()["class_names"] == list("0123456789")


@pytest.mark.slow
def test_the_resolved_config_makes_the_same_run(finished, run_cli, tmp_path):
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["label_smoothing"] == 0.1
    assert run_cli("train", finished / "config.yaml", "--out", tmp_path / "again").status == 0
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "again/adapter" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_runs_are_numbered(config, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
    for number in (1, 2):
        assert run_cli("train", config, *short).status == 0
        assert (tmp_path / "runs/tiny" / str(number) / "metrics.json").is_file()


def test_overrides_and_methods(config, run_cli):
    cli = ConfigCLI(config, ["--model.lr=5e-3", "--model.backbone_args.depth", "1"])
    assert cli.model.lr == 5e-3
    assert len(cli.model.model.blocks) == 1
    result = run_cli("train", config, "--method", "lora", "--model.method.rank=3", "--trainer.max_epochs", "0")
    assert "max_epochs is 0" in result.err  # everything before it was accepted
    cli = ConfigCLI(config, ["--model.method", "LoRA", "--model.method.init_args.rank", "3"])
    assert cli.model.bank.plan().method == vispeft.LoRA(rank=3)
    cli = ConfigCLI(config, ["--model.method={class_path: lora, init_args: {rank: 2}}"])
    assert cli.model.bank.plan().method == vispeft.LoRA(rank=2)


def test_one_seed_for_weights_and_order(config):
    cli = ConfigCLI(config, ["--seed_everything", "5"])
    assert cli.datamodule.seed == 5


@pytest.mark.parametrize("name", sorted(method_presets()))
def test_presets_are_methods(name):
    node = method_node(name)
    assert issubclass(getattr(vispeft, node["class_path"].rpartition(".")[2]), vispeft.Method)
    assert build_method(node).name in vispeft.list_methods()
    assert method_presets()[name].read_text().startswith("# vispeft train ")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/classification").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_open_with_their_command_and_have_known_keys(path):
    assert path.read_text().startswith(f"# vispeft train classification/{path.stem}\n")
    check_config(read_config(path), [], path.name)


def test_class_paths_are_short():
    assert class_path(vispeft.SSF) == "vispeft.SSF"


def test_print_config_shows_everything_and_trains_nothing(config, capsys, tmp_path):
    from vispeft.cli.train import main

    with pytest.raises(SystemExit) as left:
        main([str(config), "--print_config", "--model.lr=0.5"])
    assert left.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["lr"] == 0.5
    assert printed["data"]["init_args"]["validation"] == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


REFUSED = {
    "unknown key": (["--model.lrr=1"], "Unknown key 'model.lrr'. Did you mean 'model.lr'"),
    "unknown section": (["--modle.lr=1"], "Unknown key 'modle.lr'. Did you mean 'model.lr'"),
    "abbreviated key": (["--trainer.max_epoch=1"], "Did you mean 'trainer.max_epochs'"),
    "unknown data key": (["--data.bath_size=1"], "Did you mean 'data.batch_size'"),
    "unknown method": (["--method", "ssff"], "Unknown method 'ssff'. Did you mean 'ssf'?"),
    "unknown method class": (["--model.method=vispeft.SFF"], "Did you mean 'vispeft.SSF'"),
    "no method": (["--model.method=vispeft.data.DigitsData"], "no method (no subclass of Method)"),
    "unknown field": (["--model.method.patch_mergin=1"], "Did you mean 'model.method.patch_merging'"),
    "field of another method": (["--method=lora", "--model.method.patch_merging=1"], "Unknown key"),
    "unknown role": (["--model.method.roles=[attn.qkw]"], "Unknown role 'attn.qkw'. Did you mean 'attn.qkv'"),
    "wrong field value": (["--method=lora", "--model.method.rank=0"], "LoRA(rank=0)"),
    "wrong type": (["--model.lr=fast"], "model.lr: the value cannot be used.\n"),
    "out of range": (["--model.lr=-1"], "Classification(lr=-1.0)"),
    "class count": (["--model.num_classes=7"], "model.num_classes is decided by the data"),
    "data seed": (["--data.seed=7"], "data.seed is decided by seed_everything"),
    "random seed": (["--seed_everything=true"], "give a whole number"),
    "no value": (["--model.lr"], "--model.lr needs a value"),
    "stray word": (["stray"], "'stray' is out of place"),
    "unknown data module": (["--data=Nope"], "Unknown data module 'Nope'"),
    "image size": (["--data.image_size=24"], "24 x 24 pixels"),
    "unknown backbone": (["--model.backbone=vit_tinny_patch16_224"], "Unknown backbone"),
    "splits": (["--data.test=0.99"], "DigitsData(validation=0.2, test=0.99)"),
    "no epochs": (["--trainer.max_epochs=0"], "at least 1"),
    "no end": (["--trainer.max_epochs=-1"], "sets no end"),
    "no logs": (["--trainer.logger=false"], "keeps its logs"),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], "chosen among checkpoints"),
    "no validation": (["--trainer.limit_val_batches=0"], "the best epoch is chosen on validation"),
    "unknown checkpoint key": (["--checkpoints.minute=1"], "Did you mean 'checkpoints.minutes'"),
    "no time between checkpoints": (["--checkpoints.minutes=0"], "checkpoints.minutes is 0"),
    "seed": (["--seed_everything=a: b: c"], "is no valid YAML"),
    "several processes": (
        ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp"],
        "trainer.strategy is fsdp",
    ),
    "dry run": (["--trainer.fast_dev_run=true"], "makes no run directory"),
    "no test": (["--trainer.limit_test_batches=0"], "ends with the figures of its test split"),
    "hardly any test": (["--trainer.limit_test_batches=0.1"], "leaves none of 2 batches"),
    "no training batches": (["--trainer.limit_train_batches=0"], "nothing would be trained"),
    "hardly any training": (
        ["--trainer.limit_train_batches=1e-3"],
        "Lightning refuses these settings: You requested to check 0.001",
    ),
    "late validation": (["--trainer.val_check_interval=100"], "Lightning refuses these settings: `val_check_interval`"),
    "no validated epoch": (["--trainer.check_val_every_n_epoch=3"], "no epoch would be validated"),
    "validation every 0 epochs": (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch is 0; at least 1"),
    "validation every 0 batches": (["--trainer.val_check_interval=0"], "val_check_interval is 0; a number above 0"),
    "no time": (["--trainer.max_time={seconds: 0}"], "in which nothing would be trained"),
    "an unknown unit of time": (["--trainer.max_time={x: 1}"], "trainer.max_time is {'x': 1}: give days, hours"),
    "an unknown metric to stop by": (
        ["--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: validation/acuracy}}"],
        "Unknown metric of EarlyStopping 'validation/acuracy'. Did you mean 'validation/accuracy'",
    ),
    "bare": (["--trainer.barebones=true"], "trainer.barebones makes no run directory"),
    "no summed batches": (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches is 0"),
    "clipping turned round": (["--trainer.gradient_clip_val=-1"], "gradient_clip_val is -1"),
    "rate beyond float32": (["--model.lr=1e39"], "Classification(lr=1e+39)"),
    "half precision": (["--trainer.precision=bf16-true"], "set model.base_dtype to bfloat16"),
    "double precision": (["--trainer.precision=64"], "set model.base_dtype to bfloat16"),
    "averages of weights": (
        ["--trainer.callbacks=[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]"],
        "set ema",
    ),
    "no such file": (["--model.weights=none.safetensors", "--model.backbone_args={}"], "no such file"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_override_is_refused_before_training(config, run_cli, tmp_path, overrides, message):
    result = run_cli("train", config, *overrides, "--out", tmp_path / "run")
    assert result.status == 2
    assert message in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There are: tiny.yaml"),
        ("model: [", "no valid YAML"),
        ("", "needs the sections model and data"),
        ("data: {class_path: DigitsData}", "has no section model"),
        ("modell: {}", "Unknown key 'modell'. Did you mean 'model'?"),
        ("model: {classpath: Classification}", "Did you mean 'model.class_path'"),
        ("model: {class_path: Clasification}", "Unknown task 'Clasification'. Did you mean 'Classification'"),
        ("model: {init_args: {lr: 1}}", "has no class_path"),
        ("model: {class_path: Classification, init_args: {backbonee: x}}", "Did you mean 'model.backbone'"),
        ("model: 3", "model is 3, which has no class_path; the name of a task is needed"),
    ],
)
def test_a_wrong_config_is_refused(config, run_cli, tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    result = run_cli("train", path)
    assert result.status == 2
    assert message in result.err


def test_the_config_comes_first_and_is_yaml(config, run_cli):
    assert "stands where the config belongs" in run_cli("train", "--model.lr", "1", config).err
    assert "no YAML file" in run_cli("train", "config.txt").err
    assert "cannot be read as a config of mmengine" in run_cli("train", "config.py").err
    assert "required: CONFIG" in run_cli("train").err


def test_a_taken_directory_is_not_touched(finished, config, run_cli, tmp_path):
    before = (finished / "metrics.json").read_bytes()
    assert "holds a finished run" in run_cli("train", config, "--out", finished).err
    assert (finished / "metrics.json").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    assert "is not empty (found a.txt)" in run_cli("train", config, "--out", tmp_path / "notes").err
    assert "could not be made" in run_cli("train", config, "--out", tmp_path / "notes/a.txt/run").err


@pytest.mark.slow
def test_nan_leaves_no_finished_run_and_keeps_checkpoints(config, run_cli, tmp_path, monkeypatch):
    from vispeft.tasks import Classification

    step = Classification.training_step

    def poisoned(self, batch, batch_idx):
        return step(self, batch, batch_idx) * (float("nan") if self.global_step == 6 else 1)

    monkeypatch.setattr(Classification, "training_step", poisoned)
    result = run_cli("train", config, "--out", tmp_path / "run")
    assert result.status == 2
    assert "loss is nan at step 7 (epoch 2)" in result.err
    assert str(tmp_path / "run/checkpoints/step-0000005.ckpt") in result.err
    assert (tmp_path / "run/checkpoints/step-0000005.ckpt").is_file()
    assert not (tmp_path / "run/metrics.json").exists()
    assert not (tmp_path / "run/adapter").exists()


def test_a_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPEFT_DEBUG", "1")
    with pytest.raises(FileError):
        run_tool(train_tool.main, [str(tmp_path / "none.yaml")])
