"""A run that was stopped and resumed ends as if it had not been."""

import json
import shutil

import pytest
import torch
import yaml

from tests.tiny import CONFIG
from vispeft.tasks import Classification
from vispeft.tasks.checkpoints import read_checkpoint
from vispeft.viz import read_history

DROPOUT = "{class_path: LoRA, init_args: {rank: 2, dropout: 0.2}}"


class Killed(BaseException):
    """Ends a process where it stands; nothing handles it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, call_cli):
    """A run in one go, whose training draws random numbers: dropout in the adapter."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(CONFIG)
    run = folder / "run"
    result = call_cli("train", folder / "tiny.yaml", *SETTINGS, "--out", run)
    assert result.status == 0, result.err
    return run


SETTINGS = ("--model.method", DROPOUT, "--model.ema=0.9", "--checkpoints.every_n_steps=2", "--trainer.max_epochs=3")


def stop_at(monkeypatch, *moments):
    """End the process at the given steps, one after the other."""
    step, left = Classification.training_step, list(moments)

    def stopped(self, batch, batch_idx):
        if left and self.global_step == left[0]:
            left.pop(0)
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", stopped)


def tensors(value, path=""):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors(part, f"{path}/{index}")
    else:
        yield path, value


def same_state(one, other):
    """Compare everything the last checkpoints of two runs hold, times and rows of the log apart."""
    ours, theirs = dict(tensors(one)), dict(tensors(other))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if path != "/vispeft/seconds" and "/callbacks/" not in path:
            equal = torch.equal(value, theirs[path]) if isinstance(value, torch.Tensor) else value == theirs[path]
            assert equal or value != value, path
    return len(ours)


def check_same(run, whole):
    for name in ("adapter.json", "adapter.safetensors", "head.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), name
    assert (run / "logs/csv/metrics.csv").read_bytes() == (whole / "logs/csv/metrics.csv").read_bytes()
    ours, theirs = (json.loads((place / "metrics.json").read_text()) for place in (run, whole))
    for entry in (ours, theirs):
        del entry["seconds"], entry["command"]
    assert ours == theirs
    files = {path.name for path in (run / "checkpoints").iterdir()}
    assert files == {path.name for path in (whole / "checkpoints").iterdir()}
    for name in files:
        assert same_state(read_checkpoint(run / "checkpoints" / name), read_checkpoint(whole / "checkpoints" / name)) > 20


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_inside_and_between_epochs(whole, config, run_cli, tmp_path, monkeypatch, workers):
    run = tmp_path / "run"
    # before the first checkpoint, inside an epoch, at its first and last step, twice in a row
    stop_at(monkeypatch, 1, 3, 5, 9, 9, 14)
    with pytest.raises(Killed):
        run_cli("train", config, *SETTINGS, f"--data.num_workers={workers}", "--out", run)
    for _ in range(5):
        with pytest.raises(Killed):
            run_cli("train", "--resume", run)
    result = run_cli("train", "--resume", run)
    assert result.status == 0, result.err
    check_same(run, whole)
