"""How runs end: well, by a signal, on a full disk, early on purpose, and again for more epochs."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import yaml

from benchmarks.resume_kill import differences
from tests.tiny import CONFIG
from vispeft.cli import finish, stopping
from vispeft.cli.stopping import Stopped, disk_is_full, stopped_by_signals
from vispeft.errors import FileError
from vispeft.storage.locks import hold
from vispeft.tasks import Classification
from vispeft.tasks.checkpoint_form import check_state
from vispeft.tasks.checkpoints import RunCheckpoints, SealedCheckpointIO, read_checkpoint
from vispeft.tasks.logs import RunLog

SHORT = ("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1")
"""Two steps an epoch."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Ends a process where it stands; nothing handles it."""


def on_step(monkeypatch, number, do):
    """Call a function at the beginning of a training step."""
    step = Classification.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == number:
            do()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", stopped)


def kill():
    raise Killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory, call_cli):
    """A run in one go, and one that was killed in its second epoch; tests copy them."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "tiny.yaml").write_text(CONFIG)
    result = call_cli("train", folder / "tiny.yaml", *SHORT, "--out", folder / "whole")
    assert result.status == 0, result.err
    with pytest.MonkeyPatch.context() as patch:
        on_step(patch, 3, kill)
        with pytest.raises(Killed):
            call_cli("train", folder / "tiny.yaml", *SHORT, "--out", folder / "stopped")
    return folder


@pytest.fixture
def whole(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped(runs, tmp_path):
    shutil.copytree(runs / "stopped", tmp_path / "run")
    return tmp_path / "run"


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def hidden(run):
    """List what no finished run has: locks, notes, and files under temporary names."""
    return sorted(path.name for path in run.rglob(".*"))


# ------------------------------------------------------------------ the end itself


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(runs, stopped, run_cli, monkeypatch):
    def fail(*_, **__):
        raise KeyError("ground")

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "draw", fail)
        result = run_cli("train", "--resume", stopped, "--trainer.enable_progress_bar=false")
    assert result.status == 0, result.err
    assert "The pictures of the results could not be drawn (KeyError: 'ground'.)" in result.out
    assert metrics(stopped)["epochs"] == 2
    assert (stopped / "plots/learning_curves.png").is_file()
    assert not (stopped / "plots/confusion_matrix.png").exists()
    assert run_cli("train", "--resume", stopped).status == 0  # tries the pictures again
    assert (stopped / "plots/confusion_matrix.png").is_file()
    assert hidden(stopped) == []
    assert differences(stopped, runs / "whole") == []


def test_the_adapter_is_kept_when_the_run_cannot_be_measured(stopped, run_cli, monkeypatch):
    def fail(*_, **__):
        assert (stopped / "adapter/adapter.json").is_file()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(finish, "measure", fail)
    with pytest.raises(OSError, match="Input/output"):
        run_cli("train", "--resume", stopped)
    assert json.loads((stopped / "adapter/adapter.json").read_text())["class_names"] == list("0123456789")
    assert not (stopped / "metrics.json").exists()


@pytest.mark.slow
def test_a_run_stopped_on_purpose_becomes_an_adapter_and_can_still_go_on(runs, stopped, run_cli):
    result = run_cli("train", "--finish", stopped)
    assert result.status == 0, result.err
    assert metrics(stopped)["epochs"] == metrics(stopped)["best_epoch"] == 1
    assert f"Its further epochs: vispeft train --resume {stopped} --trainer.max_epochs 2" in result.out
    assert "is finished" in run_cli("train", "--resume", stopped).out
    assert "is finished" in run_cli("train", "--finish", stopped).out
    result = run_cli("train", "--resume", stopped, "--trainer.max_epochs", "2")
    assert result.status == 0, result.err
    assert differences(stopped, runs / "whole") == []
    assert hidden(stopped) == []


def test_the_last_epoch_is_named_where_none_can_be_compared(runs, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(RunCheckpoints, "_better", lambda self, score, trainer: False)
    result = run_cli("train", runs / "tiny.yaml", *SHORT, "--trainer.max_epochs=1", "--out", tmp_path / "run")
    assert result.status == 0, result.err
    assert metrics(tmp_path / "run")["epochs"] == metrics(tmp_path / "run")["best_epoch"] == 1


def test_a_run_without_a_measured_epoch_cannot_be_finished(runs, run_cli, tmp_path, monkeypatch):
    on_step(monkeypatch, 1, kill)
    with pytest.raises(Killed):
        run_cli("train", runs / "tiny.yaml", *SHORT, "--out", tmp_path / "run")
    assert "No epoch of" in run_cli("train", "--finish", tmp_path / "run").err
    assert "takes the run alone" in run_cli("train", "--finish", tmp_path / "run", "--model.lr", "1").err


@pytest.mark.slow
def test_a_finished_run_goes_on_for_more_epochs_also_when_it_is_killed_meanwhile(whole, run_cli, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "other")
    more = ("--trainer.max_epochs", "4")
    assert run_cli("train", "--resume", whole, *more).status == 0
    assert metrics(whole)["epochs"] == 4
    assert metrics(whole)["steps"] == 8
    assert yaml.safe_load((whole / "config.yaml").read_text())["trainer"]["max_epochs"] == 4
    with monkeypatch.context() as patch:
        on_step(patch, 4, kill)  # before its first step
        with pytest.raises(Killed):
            run_cli("train", "--resume", tmp_path / "other", *more)
    with monkeypatch.context() as patch:
        on_step(patch, 7, kill)
        with pytest.raises(Killed):
            run_cli("train", "--resume", tmp_path / "other")
    assert metrics(tmp_path / "other")["epochs"] == 2  # what could be read still can
    assert run_cli("train", "--resume", tmp_path / "other").status == 0
    assert differences(tmp_path / "other", whole) == []
    assert hidden(whole) == hidden(tmp_path / "other") == []


def test_a_finished_run_says_so_when_its_data_are_gone(whole, run_cli):
    text = (whole / "config.yaml").read_text()
    (whole / "config.yaml").write_text(text.replace("DigitsData", "NoSuchData"))
    result = run_cli("train", "--resume", whole, "--data.num_workers=1")
    assert result.status == 0, result.err
    assert "is finished; there is nothing to go on with" in result.out


def test_a_state_of_another_form_is_refused(stopped):
    state = read_checkpoint(max((stopped / "checkpoints").glob("step-*")))["vispeft"]
    assert check_state(state, "a.ckpt")["earlier"] == []
    with pytest.raises(FileError, match="its entry 'earlier' is a int"):
        check_state({**state, "earlier": 5}, "a.ckpt")


# ------------------------------------------------------------------ another config


def test_a_config_that_was_edited_is_refused(stopped, run_cli):
    text = (stopped / "config.yaml").read_text()
    assert "num_workers: 0" in text
    (stopped / "config.yaml").write_text(text.replace("lr: 0.01", "lr: 0.5").replace("warmup: 0.1", "warmup: 0.2"))
    result = run_cli("train", "--resume", stopped)
    assert result.status == 2
    for change in ("model.init_args.lr was 0.01 and is 0.5", "model.init_args.warmup was 0.1 and is 0.2"):
        assert change in result.err
    (stopped / "config.yaml").write_text(text.replace("num_workers: 0", "num_workers: 1"))
    best = max((stopped / "checkpoints").glob("best-*"))
    content = read_checkpoint(best)
    config = content["config"]["values"]
    config["model"]["init_args"]["lr"] = 0.5  # the best epoch of another run
    SealedCheckpointIO(config).save_checkpoint(content, best)
    result = run_cli("train", "--finish", stopped)
    assert f"{best} was written with another config: model.init_args.lr was 0.5 and is 0.01" in result.err
    config["model"]["init_args"]["lr"] = 0.01
    SealedCheckpointIO(config).save_checkpoint(content, best)
    result = run_cli("train", "--finish", stopped)
    assert result.status == 0, result.err


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(runs, stopped, run_cli):
    for path in (stopped / "checkpoints").glob("*.ckpt"):
        content = read_checkpoint(path)
        assert "num_workers" not in str(content.pop("config", ""))
        SealedCheckpointIO().save_checkpoint(content, path)
    result = run_cli("train", "--resume", stopped)
    assert result.status == 0, result.err
    assert "does not say which config it was written with" in result.out
    whole = read_checkpoint(runs / "whole/checkpoints/step-0000004.ckpt")["state_dict"]
    assert all(
        torch.equal(whole[name], tensor)
        for name, tensor in read_checkpoint(stopped / "checkpoints/step-0000004.ckpt")["state_dict"].items()
    )


# ------------------------------------------------------------------ stops, and full disks


def test_the_command_to_go_on_names_what_the_config_does_not_hold(monkeypatch):
    monkeypatch.setattr(stopping, "own_code", ["my code.py"])
    found = stopping.command_to_go_on("runs/a b", ["--trainer.devices=1", "--elastic"])
    assert found == "vispeft train --resume 'runs/a b' --trainer.devices=1 --elastic --code 'my code.py'"
    assert stopping.command_to_go_on("runs/1", by="--finish") == "vispeft train --finish runs/1 --code 'my code.py'"


def test_errors_that_stand_behind_each_other_are_looked_at_once():
    first, second = ValueError(), OSError(errno.EIO, "")
    first.__cause__, second.__context__ = second, first
    assert not disk_is_full(first)
    second.__context__ = OSError(errno.ENOSPC, "")
    assert disk_is_full(first)


def test_a_signal_during_an_import_is_not_swallowed(tmp_path, monkeypatch):
    text = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.01)\n"
    (tmp_path / "swallows.py").write_text(f"{text}except BaseException:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def import_and_wait():
        assert importlib.import_module("swallows").os is os
        time.sleep(5)

    with pytest.raises(Stopped), stopped_by_signals():
        import_and_wait()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_with_its_own_status_and_says_how_to_go_on(stopped, run_cli, monkeypatch, name, status):
    number = getattr(signal, name)
    # Tests that run in the background of a shell are started with some signals switched off.
    before = signal.signal(number, signal.SIG_DFL)
    on_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    try:
        result = run_cli("train", "--resume", stopped)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert result.status == status
    assert result.err == f"Stopped by {name}. Go on by vispeft train --resume {stopped}\n"
    assert hidden(stopped) == []


@pytest.mark.parametrize(
    ("writer", "number"),
    [(RunLog, errno.ENOSPC), pytest.param(SealedCheckpointIO, errno.EDQUOT, marks=pytest.mark.slow)],
)
def test_a_full_disk_says_how_to_go_on(stopped, run_cli, monkeypatch, writer, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer, "save" if writer is RunLog else "save_checkpoint", fail)
    result = run_cli("train", "--resume", stopped)
    assert result.status == 2
    assert f"Free some space, then go on by vispeft train --resume {stopped}" in result.err
    assert os.strerror(number) in result.err


def test_a_disk_without_room_is_refused_before_training(runs, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    result = run_cli("train", runs / "tiny.yaml", "--out", tmp_path / "run")
    assert "has 1 MiB left, and checkpoints, adapter and logs of this run need about 2" in result.err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ two processes, and leftovers


def test_a_run_is_trained_by_one_process(stopped, run_cli):
    """The lock of a process that was killed is in nobody's way, although its file is still there."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with hold(stopped / ".lock", "The run directory"):
                os.write(go, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    result = run_cli("train", "--resume", stopped)
    assert result.status == 2
    assert f"The run directory {stopped} is in use by process {child} on " in result.err
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (stopped / ".lock").exists()
    with hold(stopped / ".lock", "The run directory"):
        pass
    assert hidden(stopped) == []


@pytest.mark.slow
def test_what_kills_leave_behind_is_removed_and_nothing_else(runs, stopped, run_cli):
    (stopped / "adapter").mkdir()
    left = ("adapter/.adapter.json.a1b2c3d4", "plots/.x.png.part", "checkpoints/.step-0000009.ckpt.part")
    others = ("plots/.notes.txt.part", ".config.txt", "plots/mine.png", "adapter/.mine.part")
    for name in (*left, *others, ".metrics.json.earlier"):
        (stopped / name).parent.mkdir(exist_ok=True)
        (stopped / name).write_text("half")
    assert run_cli("train", "--resume", stopped).status == 0
    assert not any((stopped / name).exists() for name in (*left, ".metrics.json.earlier"))
    assert all((stopped / name).exists() for name in others)
    assert metrics(stopped)["adapter_bytes"] == metrics(runs / "whole")["adapter_bytes"]


@pytest.mark.slow
def test_a_save_stopped_between_two_files_is_undone(whole, run_cli):
    adapter = whole / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    for name in ("adapter.safetensors", "adapter.json"):
        shutil.copy(adapter / name, adapter / f".{name}.earlier")
    (adapter / "adapter.safetensors").write_bytes(b"of the next save")
    (whole / ".unfinished").touch()
    assert run_cli("train", "--finish", whole).status == 0
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.slow
def test_figures_that_were_removed_are_measured_again(whole, run_cli):
    """The error for figures that were edited says so."""
    before = metrics(whole)
    (whole / "metrics.json").unlink()
    result = run_cli("train", "--finish", whole)
    assert result.status == 0
    told = re.findall(r"The test figures are partial: 1 of \d+ batches were measured, since .* is 1\.", result.out)
    assert len(told) == 1  # the rehearsal before training says nothing
    assert metrics(whole)["test"] == before["test"]


@pytest.mark.slow
def test_a_training_that_ended_by_itself_is_not_measured_again_as_if_it_had_gone_on(runs, run_cli, tmp_path):
    few = ("--trainer.max_epochs=5", "--trainer.max_steps=2")
    assert run_cli("train", runs / "tiny.yaml", *SHORT, *few, "--out", tmp_path / "run").status == 0
    before = (tmp_path / "run/metrics.json").stat().st_mtime_ns
    for epochs, told in ((5, "ended by itself after 1 of 5 epochs"), (6, "has made all 2 steps of trainer.max_steps")):
        result = run_cli("train", "--resume", tmp_path / "run", f"--trainer.max_epochs={epochs}")
        assert result.status == 2
        assert told in result.err
    assert (tmp_path / "run/metrics.json").stat().st_mtime_ns == before
    assert hidden(tmp_path / "run") == []
