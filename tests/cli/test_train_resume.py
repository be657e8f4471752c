"""Runs that were stopped and resumed, and runs that start from an adapter, by the command line."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from benchmarks.resume_kill import differences
from tests.data.published import Painter
from tests.tiny import CONFIG
from vispeft.cli import finish
from vispeft.cli.config import ConfigCLI
from vispeft.cli.start import start_from
from vispeft.cli.zoo_add import Extras, add_run
from vispeft.storage.files import read_adapter
from vispeft.tasks import Classification
from vispeft.zoo.adapters import find_adapter

METHOD = "{class_path: LoRA, init_args: {rank: 2, dropout: 0.2}}"
SETTINGS = ("--model.method", METHOD, "--model.ema=0.9", "--checkpoints.every_n_steps=2", "--data.test=0.75")
SMALL = ("--data.validation=0.05", "--data.batch_size=72", *SETTINGS)
"""Five steps an epoch; dropout draws random numbers in each."""


class Killed(BaseException):
    """Ends a process where it stands; nothing handles it."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, call_cli):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(CONFIG)
    result = call_cli("train", folder / "tiny.yaml", *SMALL, "--out", folder / "run")
    assert result.status == 0, result.err
    return folder / "run"


def stop_at(monkeypatch, *steps):
    """End the process at the given steps, one after the other."""
    training_step, left = Classification.training_step, list(steps)

    def stopped(self, batch, batch_idx):
        if left and self.global_step == left[0]:
            left.pop(0)
            raise Killed
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", stopped)


def killed(*_, **__):
    raise Killed


@pytest.mark.slow
def test_stopped_everywhere_with_workers(whole, config, run_cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_at(monkeypatch, 1, 3, 5)  # before the first checkpoint, inside an epoch, between two
    with pytest.raises(Killed):
        run_cli("train", config, *SMALL, "--data.num_workers=2", "--out", run)
    for _ in range(2):
        with pytest.raises(Killed):
            run_cli("train", "--resume", run)
    for moment in ("measure", "_draw"):  # while it measures, and while it draws
        with monkeypatch.context() as patch:
            patch.setattr(finish, moment, killed)
            with pytest.raises(Killed):
                run_cli("train", "--resume", run, "--data.num_workers=0")
    result = run_cli("train", config, *SMALL, "--resume", run)
    assert result.status == 0, result.err
    assert "Going on from" in result.out
    assert differences(run, whole) == []
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["command"].endswith(f"--data.num_workers=2 --out {run}")
    assert metrics["steps"] == 10
    with (
        Image.open(run / "plots/learning_curves.png") as ours,
        Image.open(whole / "plots/learning_curves.png") as theirs,
    ):
        assert ours.tobytes() == theirs.tobytes()


def test_a_difference_would_be_found(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert differences(tmp_path / "run", whole) == []
    table = tmp_path / "run/logs/csv/metrics.csv"
    table.write_text(table.read_text().replace("0,", "1,", 1))
    (tmp_path / "run/adapter/adapter.json").write_text("{}")
    assert differences(tmp_path / "run", whole) == ["adapter/adapter.json", "logs/csv/metrics.csv"]


@pytest.mark.slow
def test_images_that_were_moved_are_noticed(config, run_cli, tmp_path, monkeypatch):
    """Drawn splits would be others, and images that were trained on could be among the test images."""
    painter, root = Painter(), tmp_path / "photos"
    for name in "ab":
        for number in range(15):
            painter.paint(root / name / f"{number}.png")
    init = f"ImageFolderData\n  init_args:\n    root: {root}\n    batch_size: 6"
    config.write_text(CONFIG.split("vispeft.data.")[0] + init + "\ntrainer:\n  max_epochs: 1\n")
    stop_at(monkeypatch, 2)
    often = "--checkpoints.every_n_steps=1"
    with pytest.raises(Killed):
        run_cli("train", config, often, "--out", tmp_path / "training")
    with monkeypatch.context() as patch:
        patch.setattr(finish, "measure", killed)
        with pytest.raises(Killed):
            run_cli("train", config, often, "--out", tmp_path / "trained")
    (root / "a/3.png").rename(root / "b/33.png")
    for out in ("training", "trained"):
        assert "other images or labels: digest was" in run_cli("train", "--resume", tmp_path / out).err
    (root / "b/33.png").rename(root / "a/3.png")
    for out in ("training", "trained"):
        result = run_cli("train", "--resume", tmp_path / out)
        assert result.status == 0, result.err
    assert differences(tmp_path / "training", tmp_path / "trained") == []


def test_a_run_stopped_before_it_began(whole, config, run_cli, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.x1y2").write_text("half wri")
    assert f"Begin it again: CONFIG --out {run}" in run_cli("train", "--resume", run).err
    shutil.copy(whole / "config.yaml", config)
    short = ("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1")
    assert run_cli("train", config, *short, "--resume", run).status == 0
    assert (run / "metrics.json").is_file()


def test_a_finished_run_says_so(whole, run_cli):
    before = (whole / "metrics.json").read_bytes()
    (whole / ".lock").touch()  # of a process that was killed behind its last step
    result = run_cli("train", "--resume", whole)
    assert not (whole / ".lock").exists()
    assert (result.status, (whole / "metrics.json").read_bytes()) == (0, before)
    assert "is finished; there is nothing to go on with" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lr=0.5"], "model.init_args.lr was 0.01 and is 0.5"),
        (["--trainer.max_epochs=1"], "is finished after 2 epochs, and --trainer.max_epochs asks for 1. Ask for more"),
        (["--method", "ssf"], "model.init_args.method.class_path was 'vispeft.LoRA' and is 'vispeft.SSF'"),
        (["--seed_everything=1"], "seed_everything was 0 and is 1"),
        (["--out", "elsewhere"], "--out was given with --resume"),
        (["--trainer.accelerator=cpu", "--checkpoints.minutes=1"], None),
    ],
)
def test_what_changes_the_result_is_refused(whole, run_cli, arguments, message):
    result = run_cli("train", "--resume", whole, *arguments)
    assert result.status == (0 if message is None else 2)
    assert message is None or message in result.err


def test_what_is_no_run_is_refused(run_cli, whole, tmp_path):
    assert "no run directory" in run_cli("train", "--resume", tmp_path / "nothing").err
    shutil.copytree(whole, tmp_path / "runs/2")
    assert f"Did you mean {tmp_path / 'runs/2'}?" in run_cli("train", "--resume", tmp_path / "runs").err
    assert "Go on with it by --resume" in refused_out(run_cli, whole, tmp_path)


def refused_out(run_cli, whole, tmp_path):
    (tmp_path / "runs/2/metrics.json").unlink()
    return run_cli("train", whole / "config.yaml", "--out", tmp_path / "runs/2").err


# ------------------------------------------------------------------ starting from an adapter


def test_a_new_task_starts_from_an_adapter(whole, run_cli, tmp_path, monkeypatch):
    frozen = ("--model.lr=1e-30", "--model.ema=0", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    result = run_cli("train", whole / "config.yaml", *frozen, "--init", whole, "--out", tmp_path / "run")
    assert f"Started from {whole}, with its classifier." in result.out, result.err
    for before, after in zip(
        read_adapter(whole / "adapter")[1:], read_adapter(tmp_path / "run/adapter")[1:], strict=True
    ):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["init"] == str(whole)


def test_a_classifier_for_other_classes_is_not_taken_over(whole, config):
    task = ConfigCLI(config, list(SMALL)).model
    fresh = task.bank.state_dict()["head/weight"].clone()
    said = start_from(task, str(whole / "adapter"), [*"abcdefghij"])
    assert said.endswith("the classifier is a fresh one (other classes).")
    assert torch.equal(task.bank.state_dict()["head/weight"], fresh)
    units = read_adapter(whole / "adapter")[1]
    assert all(torch.equal(task.bank.state_dict()[key], tensor) for key, tensor in units.items())
    assert "10 classes there, 3 here" in start_from(task, str(whole / "adapter"), ["a", "b", "c"])


def test_an_adapter_of_the_zoo(whole, run_cli, tmp_path, monkeypatch):
    add_run(str(whole), "numbers", tmp_path / "zoo", Extras(license="MIT"))
    monkeypatch.setenv("VISPEFT_ZOO", str(tmp_path / "zoo"))
    assert find_adapter("zoo:numbers") == tmp_path / "zoo/numbers"
    assert "Did you mean 'numbers'?" in run_cli("train", whole / "config.yaml", "--init", "zoo:number").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ssf"], "is an adapter of the method lora, and this run trains ssf. Give --method lora"),
        (["--model.method.init_args.rank=3"], "other fields (rank: 2 there, 3 here)"),
        (["--model.backbone_args.depth=3"], "another architecture"),
        (["--seed_everything=1"], "other weights"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(whole, run_cli, tmp_path, arguments, message):
    result = run_cli("train", whole / "config.yaml", *arguments, "--init", whole, "--out", tmp_path / "run")
    assert result.status == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_there_is_no_adapter(whole, run_cli, tmp_path):
    assert "There is no adapter in" in run_cli("train", whole / "config.yaml", "--init", tmp_path).err
