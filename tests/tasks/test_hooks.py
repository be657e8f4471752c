"""Hooks of a method: a task and a plain loop honour all of them alike."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import vispeft
from tests.tiny import TINY
from vispeft.core.method import Step
from vispeft.errors import ConfigError, TrainingError
from vispeft.tasks import Classification, MultiLabel, Regression, Segmentation
from vispeft.tasks.schedules import warmup_decay


class Alternating(pl.Callback):
    """Stops the gradients of the first block in every second step."""

    def tensors(self, task):
        return [t for name, t in task.bank.named_tensors().items() if name.startswith("blocks.0")]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for tensor in self.tensors(pl_module):
            tensor.requires_grad_(batch_idx % 2 == 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for tensor in self.tensors(pl_module):
            tensor.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Hooked(vispeft.SSF):
    """SSF that starts from the images, pulls its outputs to zero, and halves the gradients of shifts."""

    name: ClassVar[str] = "hooked"

    def callbacks(self):
        return [Alternating()]

    def start_from(self, bank, name, loader):
        for _ in range(2):  # a loader can be read again
            means = [images.mean() for images, _ in loader]
        for key, tensor in bank.named_tensors(name).items():
            if key.endswith("shift"):
                tensor.data += 0.1 * torch.stack(means).mean()

    def loss_term(self, bank, name, step):
        assert isinstance(step, Step)
        assert step.result is None
        images, _ = step.batch
        again = bank.named_tensors(name)["blocks.0.norm1/ssf.scale"].square().mean()
        with bank.disabled():
            assert images.isfinite().all()
        return 0.1 * step.output.square().mean() + 0.2 * again

    def change_gradients(self, bank, name):
        for key, tensor in bank.named_tensors(name).items():
            if key.endswith("shift") and tensor.grad is not None:
                tensor.grad *= 0.5


class Batches(pl.LightningDataModule):
    """Three batches in a fixed order, and targets as each task needs them."""

    def __init__(self, make_targets):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(12, 3, 16, 16, generator=generator)
        self.pairs = list(zip(images, make_targets(generator), strict=True))

    def train_dataloader(self):
        return DataLoader(self.pairs, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


TASKS = {
    "classification": (Classification, lambda g: torch.randint(3, (12,), generator=g)),
    "multilabel": (MultiLabel, lambda g: torch.randint(2, (12, 3), generator=g)),
    "regression": (Regression, lambda g: torch.randn(12, 3, generator=g)),
    "segmentation": (Segmentation, lambda g: torch.randint(3, (12, 16, 16), generator=g)),
}


def make(name, method=None, **settings):
    torch.manual_seed(0)
    cls, targets = TASKS[name]
    if cls is Segmentation:
        settings = {"decoder": "linear", **settings}
    backbone = {"backbone": "vit_tiny_patch16_224", "backbone_args": {**TINY, "patch_size": 4}}
    task = cls(**backbone, num_classes=3, method=method or Hooked(), lr=1e-2, **settings)
    return task, Batches(targets)


def trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 2, "enable_checkpointing": False, "limit_val_batches": 0, **settings}
    return pl.Trainer(**quiet, **settings)


def tensors_of(task):
    return {name: tensor.detach().clone() for name, tensor in task.trainable_parameters()}


def plain_loop(task, data, clip):
    """Train without Lightning, by the bank's methods alone."""
    bank, loader = task.bank, data.train_dataloader()
    task.check_data(data)
    optimizer = torch.optim.AdamW([*bank.parameter_groups(task.lr, task.weight_decay), *task.further_groups()])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = warmup_decay(optimizer, 2 * len(loader), task.warmup, "cosine")
    callbacks, holder = bank.callbacks(), SimpleNamespace(bank=bank)
    compute = task.loss if isinstance(task, Segmentation) else task.training_loss
    task.train()
    bank.start_from(loader)
    for _ in range(2):
        for index, batch in enumerate(loader):
            for callback in callbacks:
                callback.on_train_batch_start(None, holder, batch, index)
            output = task(batch[0]).float()
            optimizer.zero_grad()
            (compute(output, batch[1]) + bank.loss_terms(batch, output)).backward()
            bank.change_gradients()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            for callback in callbacks:
                callback.on_train_batch_end(None, holder, None, batch, index)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_and_a_plain_loop_train_the_same_weights(name):
    clip = 0.05  # far below the norm of the gradients: clipping comes after they were changed
    task, data = make(name)
    start = tensors_of(task)
    trainer(gradient_clip_val=clip).fit(task, datamodule=data)
    other, data = make(name)
    plain_loop(other, data, clip)
    ours, theirs = tensors_of(task), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
        assert not torch.equal(tensor, start[key]), key


@pytest.mark.parametrize("hook", ["start_from", "loss_term", "change_gradients", "callbacks"])
def test_each_hook_makes_a_difference(hook, monkeypatch):
    task, data = make("classification")
    trainer().fit(task, datamodule=data)
    monkeypatch.setattr(Hooked, hook, getattr(vispeft.SSF, hook))
    without, data = make("classification")
    trainer().fit(without, datamodule=data)
    ours, theirs = tensors_of(task), tensors_of(without)
    assert any(not torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_summed_gradients_are_changed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(Hooked, "change_gradients", lambda *_: calls.append(1))
    task, data = make("classification")
    trainer(accumulate_grad_batches=3).fit(task, datamodule=data)
    assert len(calls) == 2


def test_the_method_loss_is_logged_and_counts_in_the_loss():
    task, data = make("classification")
    logged = trainer(max_epochs=1)
    logged.fit(task, datamodule=data)
    assert logged.callback_metrics["train/method_loss"] > 0
    assert logged.callback_metrics["train/loss"] > logged.callback_metrics["train/method_loss"]


def test_gradients_that_a_method_breaks_stop_the_training(monkeypatch):
    def broken(self, bank, name):
        bank.named_tensors(name)["head/weight"].grad.fill_(float("nan"))

    monkeypatch.setattr(Hooked, "change_gradients", broken)
    task, data = make("classification")
    start = tensors_of(task)
    with pytest.raises(TrainingError, match="Gradients are not finite"):
        trainer().fit(task, datamodule=data)
    head = dict(task.trainable_parameters())["model.adapter_heads.default.weight"]
    assert torch.equal(head, start["model.adapter_heads.default.weight"])


def started(task, data, monkeypatch):
    """Count how often a method is asked for start values in a training."""
    calls = []
    monkeypatch.setattr(Hooked, "start_from", lambda *_: calls.append(1))
    trainer(max_epochs=1).fit(task, datamodule=data)
    return len(calls)


def test_a_start_from_data_is_made_once_and_never_over_saved_values(tmp_path, monkeypatch):
    task, data = make("classification")
    assert started(task, data, monkeypatch) == 1
    assert started(task, data, monkeypatch) == 0  # the training goes on
    task.save_adapter(tmp_path / "adapter")
    taken, _ = make("classification")
    taken.take(task.bank.state_dict(), {})
    assert started(taken, data, monkeypatch) == 0
    resumed, _ = make("classification")
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    assert started(resumed, data, monkeypatch) == 0


def test_a_start_from_data_that_failed_is_made_by_the_next_training(monkeypatch):
    def broken(*_):
        raise ValueError("no start")

    task, data = make("classification")
    monkeypatch.setattr(Hooked, "start_from", broken)
    with pytest.raises(ValueError, match="no start"):
        trainer(max_steps=1).fit(task, datamodule=data)
    assert started(task, data, monkeypatch) == 1


def test_a_start_from_data_leaves_order_and_random_numbers_alone(monkeypatch):
    orders = []
    for reads in (False, True):
        seen = []

        class Watched(Classification):
            def training_step(self, batch, batch_idx, seen=seen):
                seen.append((batch[1].tolist(), torch.rand(()).item()))
                return super().training_step(batch, batch_idx)

        def start(self, bank, name, loader, reads=reads):
            if reads:
                assert len(list(loader)) == 3
                torch.rand(5)

        monkeypatch.setattr(Hooked, "start_from", start)
        torch.manual_seed(0)
        data = vispeft.data.DigitsData(batch_size=24, validation=0.05, test=0.9)
        task = Watched(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=10, method=Hooked())
        torch.manual_seed(0)
        trainer(max_epochs=2, limit_train_batches=3).fit(task, datamodule=data)
        orders.append(seen)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 6


# ------------------------------------------------------------------ tensors whose gradients are stopped


@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_a_checkpoint_holds_tensors_whose_gradients_are_stopped(name):
    task, _ = make(name, vispeft.LoRA(rank=2), ema=0.5)
    every = {key for key, _ in task.trainable_parameters()}
    stopped = [p for key, p in task.named_parameters() if "blocks.0" in key or key.endswith("bias")]
    flags = [p.requires_grad for p in stopped]
    for parameter in stopped:
        parameter.requires_grad_(False)  # one step of layer sampling
    task.ema.on_train_start(None, task)
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    for parameter, flag in zip(stopped, flags, strict=True):
        parameter.requires_grad_(flag)
    assert {key for key, _ in task.trainable_parameters()} == every
    assert every <= set(checkpoint["state_dict"])
    assert set(checkpoint["average"]["tensors"]) == every
    fresh, _ = make(name, vispeft.LoRA(rank=2), ema=0.5)
    fresh.on_load_checkpoint(checkpoint)
    groups = [p for g in fresh.bank.parameter_groups(1.0, 0.0) + fresh.further_groups() for p in g["params"]]
    assert len(groups) == len(every)


@dataclass(frozen=True, kw_only=True)
class Reading(vispeft.LoRA):
    """LoRA whose loss reads the tokens of a run."""

    name: ClassVar[str] = "reading"
    reads_result: ClassVar[bool] = True

    def loss_term(self, bank, name, step):
        assert step.result.complete
        return 0.1 * step.result.tokens.square().mean()


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_loss_may_read_the_run_of_the_model(kind):
    task, data = make(kind, Reading())
    logged = trainer(max_epochs=1)
    logged.fit(task, datamodule=data)
    assert logged.callback_metrics["train/method_loss"] > 0
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"reads the run result.*model\.run\(images\)"):
        task.bank.loss_terms((images,), None)
    result = task.bank._model.run(images)
    assert task.bank.loss_terms((images,), None, result) > 0
