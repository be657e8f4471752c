"""A model whose frozen weights are sharded: what it computes and what it refuses; with one process, or with two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import vispeft
from tests.conformance.cells import MAIN, METHODS, Cell
from tests.conformance.sharded import results
from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError, VispeftError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def refused(model: nn.Module) -> dict[str, Callable[[AdapterBank], object]]:
    """List what a sharded model must refuse, by a word of the message."""
    return {
        "attach another adapter": lambda bank: vispeft.attach(model, vispeft.SSF(), name="other"),
        "detach an adapter": lambda bank: bank.detach("default"),
        "merge its adapters": lambda bank: bank.merge(),
        "verify its adapters": lambda bank: bank.verify(),
        "be compiled": lambda bank: bank.compile(),
        "choose how much a step keeps": lambda bank: setattr(bank, "memory", "leaner"),
        "merge tokens": lambda bank: bank.merge_tokens(1),
        "load base weights": lambda bank: bank.load_base(dict(bank.base_tensors())),
        "get another input size": lambda bank: model.set_input_size((64, 64)),  # type: ignore[operator]
        "get another classifier": lambda bank: model.reset_classifier(3),  # type: ignore[operator]
        "shard its weights": lambda bank: bank.shard(),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_sharded_model_computes_and_saves_the_same_and_refuses_changes(tmp_path: Path) -> None:
    cell = Cell("lora_all", "swin")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    bank.save(tmp_path / "whole")
    wanted, names = results(model, bank, images), [name for name, _ in model.named_parameters()]
    bank.shard(init_device_mesh("cpu", (1,)))
    assert [name for name, _ in model.named_parameters()] == names
    stem = [name for name in names if name.startswith("patch_embed")]
    assert "layers.1.downsample.reduction.weight" in bank.sharded_parameters()
    assert "layers.0.blocks.0.attn.qkv.weight" in bank.sharded_parameters()
    assert not any("adapters" in name or name in stem for name in bank.sharded_parameters())
    wrapped = nn.parallel.DistributedDataParallel(model)
    for run in (model, wrapped):
        found = results(run, bank, images)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    with bank.disabled():
        model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).sum().backward()
    assert not len(bank._routing.casts)
    for wish, ask in refused(model).items():
        with pytest.raises(ConfigError, match=f"sharded over the processes, so the model cannot {wish}"):
            ask(bank)
    bank.save(tmp_path / "sharded")
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    headers = [json.loads((tmp_path / place / "adapter.json").read_text()) for place in ("sharded", "whole")]
    assert headers[0]["backbone"] == headers[1]["backbone"]


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_compiled_or_merged_model_is_not_sharded() -> None:
    cell = Cell("lora", "vit")
    model = cell.model()
    bank = cell.attach(model)
    bank.compile(backend="eager")
    with pytest.raises(ConfigError, match="cannot wait for its weights"):
        bank.shard()
    bank.compile("off")
    bank.merge()
    with pytest.raises(VispeftError, match="merged, so it cannot shard its weights"):
        bank.shard()
    assert not bank.sharded
    bank.unmerge()
    bank.shard()
    assert bank.sharded


def few_of_each() -> list[str]:
    """Choose cells: every method on one family, the families in turn."""
    by_method = {method: [cell for cell in MAIN if cell.method == method] for method in METHODS}
    return [str(cells[number % len(cells)]) for number, cells in enumerate(by_method.values())]


@pytest.mark.slow
def test_every_method_has_the_same_gradients_with_sharded_weights(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.sharded", str(tmp_path / f"{rank}.json"), *few_of_each()],
            cwd=ROOT,
            env={**os.environ, **common, "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(600) for process in pair] == [0, 0]
    for rank in (0, 1):
        found_there = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found_there) == len(METHODS)
        assert not {cell: told for cell, told in found_there.items() if told}
