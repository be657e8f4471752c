import copy

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import vispeft
from tests.tiny import TINY
from vispeft.data import DigitsData
from vispeft.errors import ConfigError, DataError, FileError, TrainingError
from vispeft.tasks import Classification, callbacks


def make(method=None, **settings):
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 10, "lr": 1e-2, **settings}
    return Classification(method=method or vispeft.SSF(), **settings)


def trainer(folder, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    checkpoints = ModelCheckpoint(folder, monitor="validation/accuracy", mode="max", save_last=True)
    return Trainer(**{"max_epochs": 1, "callbacks": [checkpoints], "accelerator": "cpu", **quiet, **settings})


def fit(folder, task=None, **settings):
    task = task or make()
    run = trainer(folder, **settings)
    run.fit(task, datamodule=DigitsData(batch_size=256))
    return task, run


def frozen_tensors(task):
    return {n: p.detach().clone() for n, p in task.named_parameters() if not p.requires_grad}


def test_only_the_adapter_moves(tmp_path):
    task = make()
    frozen = frozen_tensors(task)
    start = {name: tensor.clone() for name, tensor in task.bank.state_dict().items()}
    fit(tmp_path, task)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_tensors(task).items())
    assert all(not torch.equal(tensor, start[name]) for name, tensor in task.bank.state_dict().items())


def test_training_reaches_lightning_s_metrics(tmp_path):
    task, run = fit(tmp_path)
    assert {"train/loss", "train/accuracy", "validation/loss", "validation/accuracy", "lr"} <= set(run.callback_metrics)
    results = run.test(task, datamodule=run.datamodule, verbose=False)[0]
    assert task.test_confusion.compute().sum() == 360
    assert results["test/accuracy"] == pytest.approx(float(task.test_confusion.compute().trace()) / 360)
    assert results["test/mean_class_accuracy"] == pytest.approx(
        float((task.test_confusion.compute().diagonal() / task.test_confusion.compute().sum(1)).mean())
    )


def test_a_loss_falls_on_one_batch(tmp_path):
    task = make(lr=3e-2)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.AdamW(task.bank.parameter_groups(task.lr, task.weight_decay))
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(task(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("method", [vispeft.SSF(), vispeft.LoRA(), vispeft.LinearProbe(), vispeft.Full()])
def test_checkpoints_hold_what_training_changes(tmp_path, method):
    task, run = fit(tmp_path, make(method))
    content = torch.load(run.checkpoint_callback.last_model_path, weights_only=True)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert set(content["state_dict"]) == trained
    fresh = make(method)
    assert fresh.restore(run.checkpoint_callback.last_model_path) == 0
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh.eval()(images), task.eval()(images))


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    _, run = fit(tmp_path)
    with pytest.raises(FileError, match="trained tensors"):
        make(vispeft.LoRA()).restore(run.checkpoint_callback.last_model_path)
    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:500])
    with pytest.raises(FileError, match="cannot be read"):
        make().restore(tmp_path / "broken.ckpt")


def test_runs_repeat_with_their_seed(tmp_path):
    first, _ = fit(tmp_path / "a")
    second, _ = fit(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_bf16_and_clipping_train(tmp_path):
    task, run = fit(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    assert run.global_step == 5


def test_clipping_works_beside_a_fused_optimiser(tmp_path):
    """Lightning refuses it under mixed precision, where nothing is scaled in bfloat16."""
    fused = {"class_path": "AdamW", "init_args": {"fused": True}}
    weights = []
    for optimizer in (fused, "AdamW"):
        seed_everything(0)
        task, _ = fit(tmp_path, make(optimizer=optimizer), precision="bf16-mixed", gradient_clip_val=1e-3, max_epochs=1)
        weights.append(torch.cat([p.detach().flatten() for _, p in task.trainable_parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_probabilities():
    task = make().eval()
    scores = task.predict_step(torch.randn(2, 3, 16, 16), 0)
    assert torch.allclose(scores.sum(1), torch.ones(2))


class Poisoned(Classification):
    """Goes wrong at a chosen step."""

    where = "loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step != 7:
            return loss
        if self.where == "loss":
            return loss * float("nan")
        if self.where == "gradient":
            next(iter(self.bank.named_tensors().values())).register_hook(lambda gradient: gradient * float("inf"))
        return loss


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"training loss is nan at step 8 \(epoch 2\).*All trainable weights are finite.*no_decay"),
        ("gradient", r"Gradients are not finite at step 8 \(epoch 2\): group 'no_decay': .*ssf"),
    ],
)
def test_nan_stops_at_once_and_keeps_the_last_good_checkpoint(tmp_path, where, message):
    seed_everything(0)
    task = Poisoned(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=10, method=vispeft.SSF())
    task.where = where
    with pytest.raises(TrainingError, match=message) as caught:
        fit(tmp_path, task, max_epochs=3)
    assert "last.ckpt" in str(caught.value)
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", r"training loss was not finite at step 8 \(epoch 2\), which was seen after the step.*may have been"),
        ("gradient", r"Gradients were not finite at step 8 \(epoch 2\).*Weights that are not finite: group 'no_decay'"),
    ],
)
def test_on_a_device_nan_is_seen_a_step_late_and_before_anything_is_saved(tmp_path, where, message, monkeypatch):
    """A host that asks for each flag at once waits for the device twice a step."""
    monkeypatch.setattr(callbacks, "_is_far", lambda tensor: True)
    seed_everything(0)
    task = Poisoned(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=10, method=vispeft.SSF())
    task.where = where
    with pytest.raises(TrainingError, match=message) as caught:
        fit(tmp_path, task, max_epochs=3)
    assert "last.ckpt" in str(caught.value)
    assert task.global_step == 8  # the step was made, and the next one not
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())


def test_nan_in_a_weight_names_it(tmp_path):
    task = make()
    with torch.no_grad():
        next(iter(task.bank.named_tensors().values()))[0] = float("nan")
    with pytest.raises(TrainingError, match=r"Weights that are not finite: group 'no_decay': .*No checkpoint"):
        fit(tmp_path, task)


def test_class_count_and_image_size_are_checked(tmp_path):
    with pytest.raises(DataError, match="num_classes=10"):
        fit(tmp_path, make(num_classes=7))
    with pytest.raises(DataError, match="24 x 24 pixels"):
        trainer(tmp_path).fit(make(), datamodule=DigitsData(image_size=24))


@pytest.mark.parametrize("acting", [[], ["default", "second"]])
def test_a_task_with_several_acting_adapters_or_none_is_refused_at_its_start(tmp_path, acting):
    task = make()
    task.bank.add(vispeft.LoRA(), "second")
    task.bank.set_active(acting)
    told = rf"one adapter, and {len(acting)} act here \({', '.join(acting) or 'none'}\)"
    with pytest.raises(ConfigError, match=told):
        fit(tmp_path, task)


def test_any_size_fits_a_flexible_backbone(tmp_path):
    task = make(backbone_args={**TINY, "flexible_size": True})
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(task, datamodule=DigitsData(image_size=24, batch_size=16))
    assert run.global_step == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"lr": float("inf")},
        {"weight_decay": -1.0},
        {"warmup": 1.0},
        {"num_classes": 1},
        {"label_smoothing": 1.0},
        {"backbone_args": {**TINY, "num_classes": 3}},
    ],
)
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ConfigError):
        make(**settings)


def test_a_saved_adapter_replaces_the_present_one(tmp_path):
    task, _ = fit(tmp_path)
    task.bank.save(tmp_path / "adapter")
    images = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(task.model).eval()(images)
    fresh = make(vispeft.LoRA())
    fresh.load_adapter(tmp_path / "adapter")
    assert fresh.bank.names == ["default"]
    assert torch.equal(fresh.eval()(images), expected)
