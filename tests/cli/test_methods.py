"""Every registered method and every preset trains from ``configs/classification/digits.yaml``."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

import vispeft
from tests.cli.test_train import ROOT
from tests.tiny import TINY
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method, method_node, method_presets
from vispeft.cli.config import build_data, build_task

DIGITS = ROOT / "configs/classification/digits.yaml"
METHODS = [n for n in vispeft.list_methods() if type(vispeft.method(n)).__module__.startswith("vispeft.methods.")]


@pytest.fixture(scope="module")
def data():
    return build_data(read_config(DIGITS)["data"], [("data.batch_size", "8")], DIGITS.name)


def test_there_is_a_preset_of_each_method():
    assert [name for name in METHODS if name not in method_presets()] == []
    for name in METHODS:
        assert build_method(method_node(name)).name == name


def is_for_one_task(name):
    """Tell whether a method or preset trains without tasks; those that need some have tests of their own."""
    return not build_method(method_node(name)).multi_task


@pytest.mark.parametrize("name", list(filter(is_for_one_task, sorted({*METHODS, *method_presets()}))))
def test_each_method_trains(name, data):
    section = read_config(DIGITS)["model"]
    small = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "method": method_node(name)}
    torch.manual_seed(0)
    task = build_task({**section, "init_args": {**section["init_args"], **small}}, 10, DIGITS.name)
    assert task.bank.plan().method == build_method(method_node(name))
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
    assert all(torch.equal(now[key], tensor) for key, tensor in frozen.items())
