"""Every registered method and every preset trains from its name: classes of digits, or several dense tasks."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

import vispeft
from tests.cli.test_train import ROOT
from tests.tasks.dense_toy import TARGETS, ToyTasks
from tests.tiny import TINY
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method, method_node, method_presets
from vispeft.cli.config import build_data, build_task
from vispeft.tasks.dense_outputs import target_notes

DIGITS = ROOT / "configs/classification/digits.yaml"
PYRAMID = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
METHODS = [n for n in vispeft.list_methods() if type(vispeft.method(n)).__module__.startswith("vispeft.methods.")]


@pytest.fixture(scope="module")
def data():
    return build_data(read_config(DIGITS)["data"], [("data.batch_size", "8")], DIGITS.name)


def test_there_is_a_preset_of_each_method():
    assert [name for name in METHODS if name not in method_presets()] == []
    for name in METHODS:
        assert build_method(method_node(name)).name == name


def is_for_tasks(name):
    """Tell whether a method or preset trains several tasks alone."""
    return build_method(method_node(name)).multi_task


NAMES = sorted({*METHODS, *method_presets()})


@pytest.mark.parametrize("name", [name for name in NAMES if not is_for_tasks(name)])
def test_each_method_trains(name, data):
    section = read_config(DIGITS)["model"]
    small = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "method": method_node(name)}
    torch.manual_seed(0)
    task = build_task({**section, "init_args": {**section["init_args"], **small}}, 10, DIGITS.name)
    assert task.bank.plan().method == build_method(method_node(name))
    train_two_steps(task, data, unread=[])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if is_for_tasks(name)])
def test_each_method_for_several_tasks_trains(name):
    names = ["parts", "depth"]
    settings = {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": {"pretrained": False, **PYRAMID}}
    settings |= {"method": method_node(name), "decoder_args": {"channels": [2, 3]}, "lr": 1e-2}
    section = {"class_path": "vispeft.tasks.MultiTaskDense", "init_args": settings}
    targets = target_notes({task: TARGETS[task] for task in names})
    torch.manual_seed(0)
    task = build_task(section, lambda _: {"targets": targets}, name)
    train_two_steps(task, ToyTasks(tasks=names, batch_size=4), unread=task.unused_tensors())


def train_two_steps(task, data, unread):
    """Train two steps, and check that all trainable tensors but the unread ones change, and no other."""
    name = task.bank.plan().method.name
    trained = {key: tensor.detach().clone() for key, tensor in task.bank.trainable_parameters()}
    frozen = {key: t.clone() for key, t in task.model.named_parameters() if not t.requires_grad}
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    now = dict(task.model.named_parameters())
    units = [key for key in trained if ".adapters." in key or key.startswith("adapters.")]
    assert units or name == "linear_probe"
    assert all(any(not torch.equal(now[key], trained[key]) for key in keys) for keys in (units, trained) if keys)
    assert not [key for key in trained if key in unread and not torch.equal(now[key], trained[key])]
    assert all(torch.equal(now[key], tensor) for key, tensor in frozen.items())
