# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
"""mmengine's Runner in two processes: equal to one with the doubled batch."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import torch
from safetensors.torch import load_file

from tests.mmseg.toy import loader, make_config
from vispeft.cli.main import main
from vispeft.cli.mmseg import main as train
from vispeft.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
LORA = {"type": "LoRA", "rank": 2}


def config_file(folder, toy, weights, batch, peft=LORA):
    """Write a config whose steps do not depend on how a batch is divided: no random pipeline, dropout or BatchNorm."""
    folder.mkdir()
    whole = [{"type": "Resize", "scale": (64, 64), "keep_ratio": False}]
    config = make_config("vit", toy, weights, folder)
    config.model.backbone.peft = peft
    config.custom_imports.imports = ["vispeft.mmseg", "tests.mmseg.toy"]
    config.model.decode_head.update({"norm_cfg": {"type": "GN", "num_groups": 4}, "dropout_ratio": 0.0})
    shuffled = {"type": "InfiniteSampler", "shuffle": True}
    config.train_dataloader = loader(toy, "train", *whole, batch=batch, sampler=shuffled)
    config.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.05}
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": STEPS, "val_interval": STEPS}
    config.default_hooks.checkpoint.interval = STEPS
    path = folder / "toy.py"
    config.dump(str(path))
    return path


def begin(config, out, port, rank):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "vispeft", "train", str(config), "--launcher", "pytorch", "--out", str(out)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def in_two(config, out):
    """Train in two processes; returns what each has said, and its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [begin(config, out, port, rank) for rank in (0, 1)]
    said = [process.communicate(timeout=280)[0] for process in processes]
    return said, [process.returncode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("peft", [LORA, None], ids=["lora", "the whole backbone"])
def test_two_processes_are_one_with_the_doubled_batch(peft, toy, weights, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    said, ended = in_two(config_file(tmp_path / "a", toy, weights, 2, peft), two)
    assert ended == [0, 0], said
    assert main(["train", str(config_file(tmp_path / "b", toy, weights, 4, peft)), "--out", str(one)]) == 0
    names = ["adapter/adapter.safetensors", "adapter/head.safetensors"] if peft else []
    pairs = [(load_file(two / name), load_file(one / name)) for name in names]
    checkpoints = [torch.load(place / f"iter_{STEPS}.pth", weights_only=True)["state_dict"] for place in (two, one)]
    for found, expected in [*pairs, checkpoints]:
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)
    if peft:
        assert any(key.endswith("lora.B") and tensor.abs().max() > 1e-3 for key, tensor in pairs[0][1].items())
    assert sorted(path.name for path in two.glob("*.pth")) == sorted(path.name for path in one.glob("*.pth"))
    assert len(list(two.glob("*/*.log"))) <= 2  # mmengine's, one for a process
    assert (two / "metrics.json").is_file()


@pytest.mark.slow
def test_a_directory_that_is_taken_ends_both(toy, weights, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    said, ended = in_two(config_file(tmp_path / "a", toy, weights, batch=2), tmp_path / "out")
    assert ended == [2, 2], said
    assert "is not empty" in said[0]
    assert "error" not in said[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_several_processes_need_torchrun_and_a_directory(toy, weights, tmp_path, monkeypatch):
    config = str(config_file(tmp_path / "a", toy, weights, batch=2))
    with pytest.raises(ConfigError, match="--out"):
        train([config, "--launcher", "pytorch"])
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK.* is not set: torchrun sets it"):
        train([config, "--launcher", "pytorch", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
