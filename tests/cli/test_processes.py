"""``vispeft train`` in two processes, and what is refused with several."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

import vispeft
from tests.tiny import CONFIG
from vispeft.building.config_files import read_config
from vispeft.cli import stopping
from vispeft.cli.api import _placed
from vispeft.cli.processes import Team
from vispeft.cli.stopping import Stopped
from vispeft.cli.train import finish, resume, train
from vispeft.errors import ConfigError, DataError, TrainingError, UnknownNameError
from vispeft.tasks import Classification
from vispeft.tasks.checkpoints import SealedCheckpointIO, find_checkpoint, read_checkpoint

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
LITTLE = ["--trainer.max_epochs=1", "--checkpoints.every_n_steps=2"]
SHARDED = "--trainer.strategy=fsdp2"
FEW = ["--data.batch_size=16", "--trainer.limit_train_batches=6", "--data.test=0.5"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def command(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start ``vispeft train``."""
    return subprocess.Popen(
        [sys.executable, "-m", "vispeft", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return said


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


def trained(run: Path) -> dict[str, Any]:
    found = find_checkpoint(run / "checkpoints")
    assert found is not None
    return read_checkpoint(found.path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, made once; tests change copies of it."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "tiny.yaml").write_text(CONFIG)
    finished(command(folder / "tiny.yaml", *FEW, *TWO, *LITTLE, "--out", folder / "run"))
    return folder / "run"


@pytest.fixture
def unmeasured(pair: Path, tmp_path: Path) -> Path:
    """The same run as it is where its first process is killed while it measures."""
    place = tmp_path / "unmeasured"
    shutil.copytree(pair, place)
    (place / "metrics.json").unlink()
    return place


def stopped_at(step: int, training_step: Any) -> Any:
    """Return a step of a task that is asked to stop at a number of steps."""

    def stopped(self: Classification, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Stopped(signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    return stopped


def measured(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())["test"]


def test_processes_and_strategies_are_read_before_anything_is_made() -> None:
    assert Team.of({"accelerator": "cpu", "devices": 1}) == Team()
    assert Team.of({"accelerator": "cpu", "devices": 3, "strategy": "ddp"}) == Team(0, 3)
    assert Team.of({"accelerator": "cpu", "devices": 2, "strategy": "fsdp2"}) == Team(0, 2, shards=True)
    assert Team.of({"accelerator": "cpu", "devices": 1, "strategy": "fsdp2"}) == Team()
    with pytest.raises(ConfigError, match=r"trainer.strategy is fsdp, with 2 processes. Choose .* ddp_bf16, fsdp2"):
        Team.of({"accelerator": "cpu", "devices": 2, "strategy": "fsdp"})
    with pytest.raises(ConfigError, match=r"trainer.strategy is fsdp, with 1 process. Choose auto, ddp, ddp_bf16"):
        Team.of({"accelerator": "cpu", "devices": 1, "strategy": "fsdp"})


@pytest.mark.slow
def test_one_process_trains_alone_whatever_the_strategy(config: Path, tmp_path: Path) -> None:
    settings = [*FEW, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.strategy=ddp_bf16"]
    run = train(config, settings, out=tmp_path / "run")
    assert trained(run)["global_step"] == 6
    assert measured(run)["accuracy"] is not None
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--compile=blocks"], "a graph of a block cannot wait for its weights. Leave compile out"),
        (["--trainer.precision=bf16-mixed"], r"frozen weights in float32: .* Set model.base_dtype to bfloat16"),
        (
            ["--trainer.precision=16-mixed", "--model.base_dtype=bfloat16"],
            r"in bfloat16: .* Give bf16-mixed, and set model.base_dtype",
        ),
    ],
)
def test_what_sharding_would_undo_is_refused_before_anything_is_made(
    asked: list[str], told: str, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        train(config, [*TWO, SHARDED, *asked], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_from_outside_need_a_run_directory(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"2 processes were started from outside .* --out DIR"):
        train(config, TWO)


def test_folds_are_for_one_process(config: Path, tmp_path: Path) -> None:
    from vispeft.cli.train import main

    with pytest.raises(ConfigError, match="--folds trains in one process"):
        main([str(config), *TWO, "--folds", "3", "--out", str(tmp_path / "folds")])


@pytest.mark.slow
def test_another_number_of_processes_is_refused_without_elastic(config: Path, tmp_path: Path) -> None:
    run = train(config, [*FEW, "--trainer.max_epochs=1"], out=tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(TrainingError, match="written by 1 processes, and there are 2"):
        resume(run, config, [*FEW, "--trainer.max_epochs=1", *TWO])


@pytest.mark.slow
def test_train_from_python_is_the_command(config: Path, tmp_path: Path) -> None:
    run = vispeft.train(config, out=tmp_path / "a", lr=2e-3, max_epochs=1, batch_size=64, method="lora")
    overrides = ["--model.method=lora", "--model.lr=0.002", "--trainer.max_epochs=1", "--data.batch_size=64"]
    other = train(config, overrides, out=tmp_path / "b")
    assert (run.path / "adapter" / "adapter.safetensors").read_bytes() == (
        other / "adapter" / "adapter.safetensors"
    ).read_bytes()
    assert run.metrics["test"] == json.loads((other / "metrics.json").read_text())["test"]
    assert vispeft.train(config, out=tmp_path / "a", lr=2e-3, max_epochs=1, batch_size=64, method="lora") == run


def test_short_names_and_keys_of_the_top_level_from_python(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("model: {class_path: Classification, init_args: {method: ssf}}\ndata: DigitsData\n")
    names = ("lr", "batch_size", "max_epochs", "checkpoints", "token_merging", "compile", "trainer")
    wanted = ["model.lr", "data.batch_size", "trainer.max_epochs", "checkpoints", "token_merging", "compile", "trainer"]
    assert [_placed(name, read_config(path)) for name in names] == wanted
    with pytest.raises(UnknownNameError, match="Unknown data module 'DigitData'"):
        vispeft.train(_written(path, "DigitsData", "DigitData"), lr=1.0)


def _written(path: Path, before: str, after: str) -> Path:
    path.write_text(path.read_text().replace(before, after))
    return path


def test_wrong_names_from_python_are_refused(config: Path) -> None:
    with pytest.raises(UnknownNameError, match="learning_rate"):
        vispeft.train(config, learning_rate=1.0)
    with pytest.raises(UnknownNameError, match="clasification"):
        vispeft.train(task="clasification")
    with pytest.raises(ConfigError, match="Give one of them"):
        vispeft.train(config, task="segmentation")
    with pytest.raises(ConfigError, match="cannot stand in a config"):
        vispeft.train(config, lr=torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    settings = [*FEW, *TWO, "--trainer.max_epochs=3", "--checkpoints.every_n_steps=2", "--model.method=lora"]
    settings += ["--model.method.dropout=0.1", "--trainer.logger=TensorBoardLogger"]
    settings.append(f"--trainer.logger.save_dir={tmp_path / 'boards'}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = finished(command(config, *settings, "--out", whole))
    assert said.count("Run directory") == 1
    process = command(config, *settings, "--out", killed)
    while not list(killed.glob("checkpoints/step-*.ckpt")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=200)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    finished(command("--resume", killed))
    first, second = trained(whole), trained(killed)
    assert first["vispeft"]["processes"] == 2
    assert len(first["vispeft"]["others"]) == 1
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    for name in ("metrics.json", "logs/csv/metrics.csv"):
        assert (whole / name).is_file()
        assert (killed / name).is_file()
    with (whole / "logs/csv/metrics.csv").open() as one, (killed / "logs/csv/metrics.csv").open() as other:
        assert list(csv.DictReader(one)) == list(csv.DictReader(other))
    # The first process alone has a tracker, and goes on in its run.
    assert sorted(path.name for path in (tmp_path / "boards").glob("*/*")) == ["version_0", "version_1"]


@pytest.mark.slow
def test_a_run_killed_behind_its_last_step_is_measured_by_the_first_process(config: Path, tmp_path: Path) -> None:
    run = train(config, [*FEW, "--trainer.max_epochs=1"], out=tmp_path / "run")
    (run / "metrics.json").unlink()
    found = find_checkpoint(run / "checkpoints")
    assert found is not None
    content = read_checkpoint(found.path)
    content["DigitsData"]["batch_size"] = 32  # of two processes together
    content["vispeft"]["processes"] = 2
    SealedCheckpointIO(found.config).save_checkpoint(content, found.path)
    resume(run, None, TWO)
    assert (run / "metrics.json").is_file()


@pytest.mark.slow
def test_a_process_that_follows_ends_where_nothing_is_left_to_train(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(config, [*FEW, "--trainer.max_epochs=1"], out=tmp_path / "run")
    (run / "metrics.json").unlink()  # killed while the first process measured
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning sets it to 1 below, for all tests that follow
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        resume(run, None, TWO)
    assert ended.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [True, False], ids=["from one to two", "from two to one"])
def test_a_run_goes_on_with_another_number_of_processes(more: bool, config: Path, tmp_path: Path) -> None:
    common = ["--data.test=0.5", "--trainer.limit_train_batches=4", "--trainer.accelerator=cpu"]
    few, many = ["--data.batch_size=32", "--trainer.devices=1"], ["--data.batch_size=16", "--trainer.devices=2"]
    begun, later = (few, many) if more else (many, few)
    place, whole = tmp_path / "run", tmp_path / "whole"
    finished(command(config, *common, *begun, "--trainer.max_epochs=1", "--out", place))
    finished(command("--resume", place, "--trainer.max_epochs=2", later[1], "--elastic"))
    finished(command(config, *common, *begun, "--trainer.max_epochs=1", "--out", whole))
    finished(command("--resume", whole, "--trainer.max_epochs=2"))
    first, second = trained(whole), trained(place)
    assert first["global_step"] == second["global_step"] == 8
    assert second["vispeft"]["processes"] == (2 if more else 1)
    for name, tensor in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [resume, finish])
def test_a_run_of_several_processes_ends_where_it_was_stopped_behind_its_last_step(
    goes_on: Any, pair: Path, unmeasured: Path
) -> None:
    goes_on(unmeasured)
    assert measured(unmeasured) == measured(pair)


@pytest.mark.slow
def test_other_images_are_still_noticed_behind_the_last_step(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vispeft.data import DigitsData

    monkeypatch.setattr(DigitsData, "identity", lambda self: iter([b"others"]))
    with pytest.raises(DataError, match="written with other images or labels: digest was"):
        resume(unmeasured)


@pytest.mark.slow
def test_a_run_stays_with_the_processes_that_it_went_on_with(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two processes to one, and stopped once more: what was asked for once is known afterwards."""
    (unmeasured / "checkpoints/step-0000006.ckpt").unlink()  # as if it had been killed in its fifth step
    settings = ["--trainer.devices=1", "--checkpoints.every_n_steps=1"]
    monkeypatch.setattr(stopping, "own_code", [])
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", stopped_at(5, Classification.training_step))
        with pytest.raises(Stopped, match=f"--resume {unmeasured} {' '.join(settings)} --elastic$"):
            resume(unmeasured, overrides=settings, elastic=True)
    with pytest.raises(TrainingError, match=r"written by 1 processes, and there are 2.*--trainer.devices 1"):
        resume(unmeasured)
    resume(unmeasured, overrides=["--trainer.devices=1"])
    found = trained(unmeasured)
    assert (found["global_step"], found["vispeft"]["processes"], found["DigitsData"]["batch_size"]) == (6, 1, 32)
    (unmeasured / "metrics.json").unlink()
    finish(unmeasured)
    assert (unmeasured / "metrics.json").is_file()


@pytest.mark.slow
def test_sharded_weights_train_as_one_process_and_go_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    common = ["--data.test=0.5", "--trainer.limit_train_batches=6", "--trainer.max_epochs=2", "--model.method=lora"]
    common += ["--checkpoints.every_n_steps=2", "--trainer.accelerator=cpu", "--model.optimizer=SGD"]
    place, resumed = tmp_path / "run", tmp_path / "resumed"
    said = finished(command(config, *common, *TWO, SHARDED, "--data.batch_size=16", "--out", place))
    assert said.count("Run directory") == said.count("Adapter 'default'") == 1
    # Stopped in the middle of the second epoch.
    shutil.copytree(place, resumed)
    (resumed / "metrics.json").unlink()
    (resumed / "checkpoints/step-0000012.ckpt").unlink()
    finished(command("--resume", resumed))
    # The checkpoint that it goes on from is removed meanwhile.
    longer = Path(shutil.copytree(place, tmp_path / "longer"))
    finished(command("--resume", longer, "--trainer.max_epochs=3"))
    assert json.loads((longer / "metrics.json").read_text())["steps"] == 18
    alone = train(config, [*common, "--data.batch_size=32"], out=tmp_path / "alone")
    first, second, one = trained(place), trained(resumed), trained(alone)
    assert first["state_dict"].keys() == second["state_dict"].keys() == one["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
        torch.testing.assert_close(tensor, one["state_dict"][name], rtol=1e-5, atol=1e-5, msg=name)
    assert first["vispeft"]["backbone"] == one["vispeft"]["backbone"]
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (place / "adapter" / name).read_bytes() == (resumed / "adapter" / name).read_bytes()
    figures = [json.loads((found / "metrics.json").read_text())["test"] for found in (place, alone)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


@pytest.mark.slow
def test_sharded_weights_give_what_whole_ones_give_under_all_settings(config: Path, tmp_path: Path) -> None:
    settings = [*FEW, *TWO, "--trainer.max_epochs=1", "--model.ema=0.9", "--trainer.gradient_clip_val=0.5"]
    settings += ["--trainer.accumulate_grad_batches=2", "--model.base_dtype=bfloat16", "--trainer.precision=bf16-mixed"]
    settings += ["--memory=leaner", "--token_merging.r=1"]
    finished(command(config, *settings, "--out", tmp_path / "whole"))
    finished(command(config, *settings, SHARDED, "--out", tmp_path / "sharded"))
    whole, sharded = trained(tmp_path / "whole"), trained(tmp_path / "sharded")
    for part in ("state_dict", "average"):
        own, other = (found[part].get("tensors", found[part]) for found in (whole, sharded))
        assert own.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    figures = [json.loads((tmp_path / name / "metrics.json").read_text())["test"] for name in ("whole", "sharded")]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_one_process_has_nothing_to_share(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*FEW, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    run = train(config, [*few, SHARDED], out=tmp_path / "run")
    assert "trainer.strategy: fsdp2 has no effect: one process trains alone." in capsys.readouterr().out
    assert trained(run)["vispeft"]["processes"] == 1
