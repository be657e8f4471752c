"""Runs whose method started from a file are used without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vispeft
from tests.tiny import CONFIG, TINY
from vispeft.adapters.fitting import method_of
from vispeft.building.config_files import read_config
from vispeft.cli.evaluate import load_run, load_task
from vispeft.cli.runs import Run
from vispeft.cli.train import train
from vispeft.cli.zoo_add import Extras, add_run
from vispeft.errors import FileError
from vispeft.storage.class_embeddings import ClassEmbeddings

FEW = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


def trained(tmp_path: Path, settings: list[str]) -> Path:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    return train(config, [*FEW, *settings], out=tmp_path / "run")


def embeddings(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator), dim=1)
    names = tuple(map(str, range(10)))
    ClassEmbeddings(rows, names, 10.0, torch.randn(8, 32, generator=generator), "a test").save(path)


def with_file(kind: str, tmp_path: Path) -> Path:
    """Train a run whose method starts from a file, and remove the file."""
    file = tmp_path / "file.safetensors"
    settings = {
        "source": ["sparse", "support=given", "budget=0.1", "roles=[mlp.fc1]"],
        "classes": ["mmrl", "token_dim=6", "rank=2"],
        "teacher": ["mask", "dropout=0.5"],
    }[kind]
    if kind == "source":
        count = int(0.1 * 2 * 32 * 128) // 2
        save_file({f"blocks.{block}.mlp.fc1": torch.arange(count) for block in range(2)}, file)
    else:
        embeddings(file)
    more = [f"--model.method.{setting}" for setting in [*settings[1:], f"{kind}={file}"]]
    run = trained(tmp_path, [f"--model.method={settings[0]}", *more])
    file.unlink()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["source", "classes", "teacher"])
def test_a_finished_run_does_not_need_the_file_its_method_started_from(kind: str, tmp_path: Path) -> None:
    run = Run.open(with_file(kind, tmp_path))
    again, _ = load_task(run)
    held = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = again(held)
        assert torch.equal(load_run(run).model(held), wanted)
    entry = add_run(str(run.path), "shared", tmp_path / "zoo", Extras())
    assert entry.figures
    fields = read_config(tmp_path / "zoo/shared/config.yaml")["model"]["init_args"]["method"]["init_args"]
    assert fields[kind] is None
    with torch.no_grad():
        assert torch.allclose(load_task(Run.open(tmp_path / "zoo/shared"))[0](held), wanted, atol=1e-2)


def test_an_adapter_that_names_a_file_is_refused(tmp_path: Path) -> None:
    model = vispeft.create_model("vit_tiny_patch16_224", num_classes=2, **TINY)
    vispeft.attach(model, vispeft.Mask()).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter.json"
    header = json.loads(path.read_text())
    header["method"]["fields"]["teacher"] = "/etc/hostname"
    with pytest.raises(FileError, match="names the file '/etc/hostname' as its teacher"):
        method_of(header)
