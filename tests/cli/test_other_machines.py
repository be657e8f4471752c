"""Finished runs are used on machines that do not have the devices of the training."""

import logging
import shutil

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from vispeft.cli import evaluation
from vispeft.cli.evaluation import evaluation_trainer


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    for accelerator in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(logging.getLogger("vispeft"), "propagate", True)  # commands switch it off


def said(caplog):
    return [record.message for record in caplog.records if record.name.startswith("vispeft")]


@pytest.mark.parametrize("devices", [1, 4, [0, 3], "auto"])
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_here_is_replaced_and_said(name, devices, caplog):
    trainer = evaluation_trainer(accelerator=name, devices=devices, num_nodes=2, strategy="ddp_bf16")
    assert (trainer.world_size, trainer.strategy.root_device) == (1, torch.device("cpu"))
    assert said(caplog) == [
        f"trainer.accelerator is {name}, of which this machine has none: it takes what it has (auto)."
    ]


def test_fewer_devices_are_enough_to_evaluate(monkeypatch, caplog):
    made = evaluation._quiet_trainer

    def with_one(settings):
        if settings["devices"] != 1:
            raise MisconfigurationException("But your machine only has: [0]")
        return made(settings)

    monkeypatch.setattr(evaluation, "_quiet_trainer", with_one)
    assert evaluation_trainer(accelerator="cpu", devices=4).world_size == 1
    assert said(caplog) == []
    with pytest.raises(MisconfigurationException, match="limit_val_batches"):
        evaluation_trainer(accelerator="cpu", devices=4, limit_val_batches=-1)


@pytest.mark.slow
def test_a_run_of_other_devices_is_used_and_finished(finished, run_cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["trainer"] |= {"accelerator": "gpu", "devices": 2}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/a.png")
    for command in (
        ("evaluate", run),
        ("predict", run, tmp_path / "images", "--out", tmp_path / "predictions"),
        ("merge", run, "--out", tmp_path / "merged.safetensors"),
    ):
        result = run_cli(*command)
        assert result.status == 0, result.err
        assert result.out.count("trainer.accelerator is gpu") == 1
    (run / "metrics.json").unlink()
    result = run_cli("train", "--finish", run)
    assert result.status == 0, result.err
    assert (run / "metrics.json").is_file()
