"""Trainings that are stopped and gone on with, without the command line."""

# ruff: noqa: NPY002 - the global generator of numpy is what has to go on

import random
import resource
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

import vispeft
from tests.tiny import TINY
from vispeft.data import DigitsData
from vispeft.errors import BaseMismatchError, ConfigError, DataError, FileError, TrainingError
from vispeft.tasks import Classification
from vispeft.tasks.checkpoints import (
    Cadence,
    RunCheckpoints,
    SealedCheckpointIO,
    find_checkpoint,
    read_checkpoint,
)
from vispeft.tasks.logs import RunLog
from vispeft.tasks.state import random_state, set_random_state
from vispeft.viz import read_history

DATA = {"batch_size": 72, "validation": 0.05, "test": 0.75}
"""Five steps an epoch."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Ends a training where it stands; nothing handles it."""


class Restless(Classification):
    """Draws from every generator in every step; its loss has a parameter, and statistics that only training moves."""

    stop = None

    def __init__(self, **settings):
        super().__init__(**settings)
        self.margin = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.statistics = nn.BatchNorm1d(self.num_classes, affine=False)

    def training_step(self, batch, batch_idx):
        if self.stop == (self.current_epoch, batch_idx):
            raise Killed
        loss = super().training_step(batch, batch_idx)
        self.seen += loss.detach() * random.random() * np.random.rand() * torch.rand(())
        self.statistics(self.model(batch[0]))
        self.log("train/seen", self.seen, on_step=True, on_epoch=True)
        return loss * (1 + 0.1 * random.random()) * (1 + 0.1 * np.random.rand()) + self.margin**2 - self.margin

    def further_groups(self):
        return [{"params": [self.margin], "lr": 0.1, "weight_decay": 0.0, "name": "margin"}]


class Scheduled(Callback):
    """Stops the gradients of the first block in every second step of the training, and counts steps by itself."""

    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._switch(pl_module, self.steps % 2 == 0)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps += 1
        self._switch(pl_module, True)

    def _switch(self, task, on):
        for name, tensor in task.bank.named_tensors().items():
            if name.startswith("blocks.0"):
                tensor.requires_grad_(on)


@dataclass(frozen=True, kw_only=True)
class Hooked(vispeft.LoRA):
    """LoRA with a schedule, a start from the data, a further loss and changed gradients."""

    name: ClassVar[str] = "hooked_lora"

    def callbacks(self):
        return [Scheduled()]

    def start_from(self, bank, name, loader):
        mean = sum(images.mean() for images, _ in loader)
        for tensor in bank.named_tensors(name).values():
            tensor.data += 0.01 * mean

    def loss_term(self, bank, name, step):
        return 0.1 * step.output.square().mean() * (1 + torch.rand(()))

    def change_gradients(self, bank, name):
        for tensor in bank.named_tensors(name).values():
            if tensor.grad is not None:
                tensor.grad *= 1 + 0.1 * random.random()


def make(cls=Restless, **settings):
    seed_everything(0)
    method = settings.pop("method", None) or vispeft.LoRA(rank=2, dropout=0.2)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 10, "lr": 1e-2, **settings}
    return cls(method=method, **settings)


def fit(folder, task, stop=None, data=None, cadence=None, **settings):
    """Train, going on with what is in the folder."""
    task.stop = stop
    found = find_checkpoint(folder / "checkpoints")
    checkpoints = RunCheckpoints(
        folder / "checkpoints", monitor=task.monitor, cadence=cadence or Cadence(every_n_steps=1)
    )
    settings = {"max_epochs": 3, **settings}
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[checkpoints, *settings.pop("callbacks", [])],
        plugins=[SealedCheckpointIO()],
        logger=RunLog(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = data or DigitsData(**DATA)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=None if found is None else str(found.path), weights_only=True)
    except Killed:
        return None
    return trainer


def leaves(value, path=""):
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}/{key}")
    elif path != "/vispeft/seconds":
        yield path, value


def check_equal(folder, other):
    """Compare the logs and everything in the last checkpoints."""
    assert (folder / "csv/metrics.csv").read_bytes() == (other / "csv/metrics.csv").read_bytes()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir())
    for name in names:
        ours, theirs = (dict(leaves(read_checkpoint(place / "checkpoints" / name))) for place in (folder, other))
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[path]), (name, path)
            else:
                assert value == theirs[path], (name, path)


MODES = {
    "epochs": {},
    "average": {"task": {"ema": 0.9}},
    "momentum": {"task": {"optimizer": {"class_path": "SGD", "init_args": {"momentum": 0.9, "nesterov": True}}}},
    "hooks of a method": {"task": {"method": Hooked(rank=2, dropout=0.2), "ema": 0.9}},
    "steps": {"max_steps": 13, "max_epochs": -1},
    "several validations": {"val_check_interval": 2},
    "summed gradients": {"accumulate_grad_batches": 2},
    "a part of each epoch": {"limit_train_batches": 3},
    "early stop": {"callbacks": lambda: [EarlyStopping("validation/loss", mode="max", patience=0)], "max_epochs": 9},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_training_ends_as_one_in_one_go(tmp_path, mode):
    settings = dict(MODES[mode])
    arguments, callbacks = settings.pop("task", {}), settings.pop("callbacks", list)
    fit(tmp_path / "whole", make(**arguments), callbacks=callbacks(), **settings)
    run = tmp_path / "run"
    # before the first checkpoint, inside an epoch, twice in a row, at an epoch's first step
    for stop in [(0, 0), (0, 2), (0, 2), (1, 0), (1, 2)] if mode == "epochs" else [(0, 2), (1, 0)]:
        assert fit(run, make(**arguments), stop, callbacks=callbacks(), **settings) is None
        assert find_checkpoint(run / "checkpoints") is not None or stop == (0, 0)
    fit(run, make(**arguments), callbacks=callbacks(), **settings)
    check_equal(run, tmp_path / "whole")


def test_checkpoints_hold_what_training_changes_and_nothing_frozen(tmp_path):
    task = make()
    fit(tmp_path, task, max_epochs=1)
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found.finished
    content = read_checkpoint(found.path)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    statistics = {f"statistics.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(content["state_dict"]) == trained | statistics | {"seen"}
    assert content["state_dict"]["margin"] != 0
    assert content["state_dict"]["statistics.num_batches_tracked"] == 5
    assert set(content["vispeft"]["training"]["random"]) == {"python", "numpy", "torch", "cuda"}


def test_a_checkpoint_holds_adapters_that_were_frozen_after_they_trained():
    """A schedule may freeze one in the middle of a run; the run that goes on starts with it unfrozen."""
    task, resumed = make(), make()
    for each in (task, resumed):
        vispeft.attach(each.model, vispeft.BitFit(), name="second")
    tensor = next(iter(task.bank.named_tensors("default").values()))
    with torch.no_grad():
        tensor.add_(1)
    task.bank.freeze("default")
    checkpoint = {"state_dict": dict(task.state_dict())}
    task.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(next(iter(resumed.bank.named_tensors("default").values())), tensor)


# ------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    fit(folder, make(), (1, 3))
    return folder


def test_a_cut_or_altered_checkpoint_is_noticed_and_the_one_before_used(stopped, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vispeft.tasks.checkpoints.logger.propagate", True)
    folder = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", folder)
    before, last = sorted(folder.glob("step-*.ckpt"))
    assert find_checkpoint(folder).path == last
    content = last.read_bytes()
    size = len(content)
    places = [0, 1, 2, 64, 65, size // 2, size - 1, *random.Random(0).sample(range(size), 25)]
    places += [size - 64, size - 79, size - 80]  # the digest, the seal, the end of what torch wrote
    for place in places:
        last.write_bytes(content[:place])
        with pytest.raises(FileError, match=r"truncated|cannot be read|no checkpoint"):
            read_checkpoint(last)
        assert find_checkpoint(folder).path == before
        if place < size:
            last.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(FileError, match=r"altered|truncated|cannot be read"):
                read_checkpoint(last)
    assert "the one before it is used" in caplog.text
    last.write_bytes(content)
    assert find_checkpoint(folder).path == last
    next(iter(folder.glob("best-*"))).write_bytes(b"")
    assert find_checkpoint(folder) is None


def test_going_on_from_the_one_before_gives_the_same(stopped, tmp_path):
    fit(tmp_path / "whole", make())
    shutil.copytree(stopped, tmp_path / "run")
    last = max((tmp_path / "run/checkpoints").glob("step-*.ckpt"))
    last.write_bytes(last.read_bytes()[:1000])
    (tmp_path / "run/checkpoints/.step-0000009.ckpt.x1y2").touch()  # what a kill leaves while a file is written
    fit(tmp_path / "run", make())
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    fit(tmp_path, make(), (0, 4))
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").glob("step-*")}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(FileError, match=r"could not be written .*free some space"):
            fit(tmp_path, make())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").glob("step-*")} == before
    fit(tmp_path / "whole", make())
    fit(tmp_path, make())
    check_equal(tmp_path, tmp_path / "whole")


# ------------------------------------------------------------------ what cannot go on


def test_other_data_another_backbone_or_method_are_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(DataError, match="images was 359 and is 269"):
        fit(tmp_path / "run", make(), data=DigitsData(**{**DATA, "test": 0.8}))
    relabelled = DigitsData(**DATA)
    relabelled.fit_to(make().preprocessing)
    relabelled.setup()
    relabelled.split("train").targets[0] = 9 - relabelled.split("train").targets[0]
    with pytest.raises(DataError, match="other images or labels: digest was"):
        fit(tmp_path / "run", make(), data=relabelled)
    with pytest.raises(FileError, match="trained tensors"):
        fit(tmp_path / "run", make(method=vispeft.SSF()))
    with pytest.raises(FileError, match="no EMA of the weights"):
        fit(tmp_path / "run", make(ema=0.5))
    task = make()
    with torch.no_grad():
        task.model.norm.weight.add_(0.5)
    with pytest.raises(BaseMismatchError, match="other weights"):
        fit(tmp_path / "run", task)


def test_a_metric_that_is_not_logged_is_noticed_at_the_first_validation(tmp_path):
    task = make()
    task.monitor = "validation/beauty"
    with pytest.raises(
        TrainingError, match=r"validation/beauty, which the task does not log; it logs .*validation/acc"
    ):
        fit(tmp_path, task)


def test_verification_runs_after_resuming(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    task, calls = make(), []
    verify = task.bank.verify
    monkeypatch.setattr(task.bank, "verify", lambda: calls.append(verify()))
    fit(tmp_path / "run", task)
    assert calls == [None]


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"minutes": -1.0}, {"minutes": float("nan")}])
def test_a_cadence_is_above_zero(settings):
    with pytest.raises(ConfigError, match="above 0"):
        Cadence(**settings)


# ------------------------------------------------------------------ ends


def test_a_metric_that_is_no_number_chooses_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vispeft.tasks.checkpoints.logger.propagate", True)
    values = {"some": [float("nan"), 0.25, float("inf")], "none": [float("nan")] * 3}
    for name, scores in values.items():
        task, left = make(), list(scores)
        task.on_validation_epoch_end = lambda task=task, left=left: task.log("score", left.pop(0))
        task.monitor = "score"
        fit(tmp_path / name, task, num_sanity_val_steps=0, limit_train_batches=1)
        found = find_checkpoint(tmp_path / name / "checkpoints")
        assert found.state["best"]["epoch"] == {"some": 1, "none": 2}[name]
        assert (tmp_path / name / "checkpoints" / found.state["best"]["file"]).is_file()
    assert "score is nan after epoch 1, which decides nothing" in caplog.text
    assert "No epoch has a score that is a number" in caplog.text


def test_a_training_that_ends_before_its_first_validation_keeps_its_weights(tmp_path):
    task = make()
    fit(tmp_path, task, max_epochs=-1, max_steps=2)
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found.state["steps"] == 2
    last = {name: tensor.clone() for name, tensor in task.trainable_parameters()}
    with torch.no_grad():
        for tensor in dict(task.trainable_parameters()).values():
            tensor.zero_()
    task.restore(tmp_path / "checkpoints" / found.state["best"]["file"])
    assert all(torch.equal(tensor, last[name]) for name, tensor in task.trainable_parameters())


def test_a_finished_training_goes_on_for_more_epochs(tmp_path):
    fit(tmp_path / "a", make(), max_epochs=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    trainer = fit(tmp_path / "a", make(), max_epochs=3)
    assert (trainer.current_epoch, trainer.global_step) == (3, 15)
    rates = read_history(tmp_path / "a/csv/metrics.csv")["lr"]
    fresh = [rate for _, rate in read_history(fit_once(tmp_path / "whole"))["lr"]]
    assert [rate for _, rate in rates][1:] == pytest.approx(fresh[1:])  # those of a training of three epochs
    fit(tmp_path / "b", make(), (1, 2), max_epochs=3)
    fit(tmp_path / "b", make(), max_epochs=3)
    check_equal(tmp_path / "a", tmp_path / "b")


def fit_once(folder):
    fit(folder, make(), max_epochs=3)
    return folder / "csv/metrics.csv"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": [EMAWeightAveraging(decay=0.9)]}, "EMAWeightAveraging averages a copy .* set ema"),
        ({"precision": "bf16-true"}, "trainer.precision is bf16-true.*model.base_dtype to bfloat16"),
        ({"precision": "64-true"}, "trainer.precision is 64-true"),
    ],
)
def test_what_could_not_train_or_be_resumed_is_refused_when_it_begins(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, make(), **settings)
    assert find_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_half_precision_of_the_whole_task_is_refused_wherever_it_runs(stage):
    trainer = Trainer(precision="bf16-true", accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"trainer\.precision is bf16-true"):
        getattr(trainer, stage)(make(), DataLoader([torch.zeros(3, 16, 16)]))


# ------------------------------------------------------------------ parts


def test_random_numbers_go_on():
    state = random_state()
    drawn = [random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()]
    set_random_state(state)
    assert drawn == [random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()]


def test_a_log_is_rewound_and_gone_on_with(tmp_path):
    def write(*rows):
        log = RunLog(tmp_path)
        for step, row in enumerate(rows):
            log.log_metrics(row, step)
            log.save()
        return log

    write({"b": 1.5}, {"a": 2.0}, {"a": 3.0}, {"c": 4.0})
    log = RunLog(tmp_path)
    assert log.rows == 4
    log.rewind(2)
    assert (tmp_path / "csv/metrics.csv").read_text().split() == ["a,b,step", ",1.5,0", "2.0,,1"]
    log.log_metrics({"c": 5.0}, 2)
    log.save()
    assert log.rows == 3
    assert (tmp_path / "csv/metrics.csv").read_text().split() == ["a,b,c,step", ",1.5,,0", "2.0,,,1", ",,5.0,2"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"ema": 0.5}, {"optimizer": "schedulefree.AdamWScheduleFree"}], ids=str)
@pytest.mark.parametrize("steps", [8, 10], ids=["behind the last validation", "with it"])
def test_the_last_weights_are_the_result_where_validation_chooses_nothing(tmp_path, settings, steps):
    if "optimizer" in settings:
        pytest.importorskip("schedulefree", reason="needs schedulefree")
    data = DigitsData(**DATA)
    data.validation_chooses = False
    task, checkpoints = make(Classification, **settings), RunCheckpoints(tmp_path, monitor="validation/accuracy")
    trainer = Trainer(
        max_epochs=2, max_steps=steps, callbacks=[checkpoints], plugins=[SealedCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert checkpoints.best["file"] == f"best-epoch001-step{steps:07d}.ckpt"
    assert np.isnan(checkpoints.best["score"]) == (steps == 8)
    again = make(Classification, **settings)
    again.restore(checkpoints.best_model_path)
    for (name, kept), (_, trained) in zip(again.trainable_parameters(), task.trainable_parameters(), strict=True):
        assert torch.equal(kept, trained), name
