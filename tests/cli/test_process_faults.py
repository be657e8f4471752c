"""What goes wrong in trainings of several processes: all of them end, with one message, and nothing half-written."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import CONFIG
from vispeft.cli import processes
from vispeft.cli.processes import Team, following, started
from vispeft.cli.stopping import Stopped
from vispeft.cli.train import train
from vispeft.errors import ConfigError, FileError, TrainingError
from vispeft.tasks.processes import SameEverywhere

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
FEW = ["--data.batch_size=16", "--trainer.limit_train_batches=6", "--trainer.max_epochs=1", "--data.test=0.5"]
LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31264")
BREAKS = """
import os
from vispeft.errors import DataError
from vispeft.tasks import Classification

step = Classification.training_step

def broken(self, batch, index):
    if index == 3 and os.environ.get("LOCAL_RANK") == "1":
        raise DataError("The image seven.png is broken.")
    return step(self, batch, index)

Classification.training_step = broken
"""
FULL = """
import errno
import {module} as module

write = module.write_atomically

def full(files, *args, **kwargs):
    if any("{file}" in str(path) for path in files):
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(files, *args, **kwargs)

module.write_atomically = full
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def command(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vispeft", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


# ------------------------------------------------------------------ before anything is started


def test_more_devices_than_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.devices is 64 with trainer.accelerator gpu, .* has \d+ GPUs?\. Ask"
    ):
        Team.of({"accelerator": "gpu", "devices": 64})


def test_a_run_directory_that_cannot_be_made_starts_no_process(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="The run directory"):
        train(config, TWO, out=tmp_path / "file" / "run")


# ------------------------------------------------------------------ processes that differ


@pytest.mark.parametrize(
    ("facts", "version", "order", "named"),
    [
        ({"config": "b"}, "2.13", {"seed": 0}, "config"),
        ({"config": "a"}, "2.12", {"seed": 0}, "torch"),
        ({"config": "a"}, "2.13", {"seed": 1}, "data: seed"),
    ],
)
def test_processes_that_differ_are_refused(
    facts: dict[str, str], version: str, order: dict[str, int], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tasks.team import Squares

    monkeypatch.setattr(torch, "__version__", "2.13")
    data = Squares(masks=False)
    monkeypatch.setattr(data, "order_facts", lambda: {"seed": 0}, raising=False)

    def gather(found: list[Any], own: dict[str, str]) -> None:
        found[:] = [own, {**own, **facts, "torch": version, **{f"data: {key}": str(v) for key, v in order.items()}}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer: Any = SimpleNamespace(world_size=2, datamodule=data)
    task: Any = SimpleNamespace(trainable_parameters=list)
    with pytest.raises(ConfigError, match=f"Process 1 was started with other settings or data .*: {named} differ"):
        SameEverywhere({"config": "a"}).setup(trainer, task, "fit")


@pytest.mark.slow
def test_other_settings_end_both_processes_before_the_first_step(config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = [config, *FEW, *TWO, "--out", tmp_path / "run"]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [command(*common, f"--model.lr={lr}", LOCAL_RANK=str(rank), **launched) for rank, lr in enumerate((1, 2))]
    for process in both:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 2
        assert "Process 1 was started with other settings or data than process 0: config differ" in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ a process that ends


def test_an_exchange_that_failed_names_the_process_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(processes, "_begun", [])
    ended = SimpleNamespace(poll=lambda: -signal.SIGKILL)
    launcher = SimpleNamespace(procs=[SimpleNamespace(poll=lambda: None), ended], kill=killed.append)
    began = SimpleNamespace(began=True)
    trainer: Any = SimpleNamespace(world_size=3, strategy=SimpleNamespace(launcher=launcher), checkpoint_callback=began)
    told = r"Process 2 of the training was ended by SIGKILL.*--resume"
    with pytest.raises(TrainingError, match=told), started(tmp_path, trainer):
        raise LOST
    assert killed == [signal.SIGTERM]
    assert processes.FIRST not in os.environ


def test_a_process_that_ends_is_named_where_the_first_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    launcher = SimpleNamespace(procs=[SimpleNamespace(poll=lambda: 2)])
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), checkpoint_callback=None)
    processes._tell_of_dead(
        trainer, processes._Command(tmp_path, f"vispeft train --resume {tmp_path}"), threading.Event()
    )
    said = capsys.readouterr().err
    assert "Process 1 of the training ended with status 2; what it said stands above." in said
    assert said.endswith("No step was made; give the same command again.\n")  # there is no run to go on with
    over = threading.Event()
    over.set()
    processes._tell_of_dead(trainer, processes._Command(tmp_path, f"vispeft train --resume {tmp_path}"), over)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("ours", [True, False])
def test_one_that_follows_leaves_the_message_to_the_first(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if ours:
        monkeypatch.setenv(processes.FIRST, str(os.getppid()))
    with pytest.raises(SystemExit if ours else TrainingError, match="1"), following(1):
        raise LOST
    with pytest.raises(SystemExit if ours else Stopped), following(1):
        raise Stopped(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="shapes"), following(1):
        raise RuntimeError("shapes differ")


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other_with_its_message(config: Path, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    began = time.monotonic()
    process = command(config, *FEW, *TWO, "--code", tmp_path / "breaks.py", "--out", tmp_path / "run")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert time.monotonic() - began < 150
    assert errors(said) == [
        "error: The image seven.png is broken.",
        "error: Process 1 of the training ended with status 2; what it said stands above. All others have ended with "
        f"it. Go on by vispeft train --resume {tmp_path / 'run'} --code {tmp_path / 'breaks.py'}",
    ]
    assert "Traceback" not in said


# ------------------------------------------------------------------ a full disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "file"),
    [("vispeft.tasks.checkpoints", "step-0000002"), ("vispeft.storage.files", "adapter.safetensors")],
    ids=["at a checkpoint", "at the end"],
)
def test_a_full_disk_ends_all_with_one_message(module: str, file: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL.format(module=module, file=file))
    run = tmp_path / "run"
    settings = [*FEW, *TWO, "--checkpoints.every_n_steps=2"]
    process = command(config, *settings, "--code", tmp_path / "full.py", "--out", run)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    (message,) = errors(said)
    assert message.startswith(
        f"error: The disk of {run} is full. Free some space, then go on by vispeft train --resume"
    )
    assert "Traceback" not in said
    assert not [path for path in run.rglob("*") if ".part" in path.name or path.name == "metrics.json"]
    said, _ = (again := command("--resume", run)).communicate(timeout=200)
    assert again.returncode == 0, said
    assert (run / "metrics.json").is_file()
