"""What `evaluate`, `embed` and `search` do with images that cannot be read."""

import csv
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import vispeft
from vispeft.cli import embed
from vispeft.cli.evaluate import load_run, load_task
from vispeft.cli.evaluation import evaluate
from vispeft.cli.runs import Run
from vispeft.data import ImageFolderData
from vispeft.errors import DataError
from vispeft.retrieval import Index


@pytest.fixture(scope="module")
def made_digits(tmp_path_factory):
    place, data = tmp_path_factory.mktemp("digits"), load_digits()
    for index in range(60):
        folder = place / str(data.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[index] * 255 / 16).round().astype(np.uint8)).save(folder / f"{index:02}.png")
    return place


@pytest.fixture
def digits(made_digits, tmp_path):
    return shutil.copytree(made_digits, tmp_path / "digits")


@pytest.fixture(scope="module")
def loaded(finished):
    return load_task(Run.open(finished))


@pytest.fixture
def _loaded_once(loaded, monkeypatch):
    """Spare each command the loading of the run, which tests of the commands do."""
    monkeypatch.setattr(embed, "load_task", lambda run: loaded)


@pytest.fixture
def run(finished, digits, tmp_path):
    """The finished run, as if it had been trained on files."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    config = yaml.safe_load(path.read_text())
    settings = {"root": str(digits), "batch_size": 8, "validation": 0.2, "test": 0.4}
    config["data"] = {"class_path": "vispeft.data.ImageFolderData", "init_args": settings}
    path.write_text(yaml.safe_dump(config))
    return tmp_path / "run"


@pytest.mark.slow
def test_evaluate_measures_the_images_that_can_be_read(run, run_cli):
    whole = load_run(Run.open(run))
    split = whole.datamodule.listing.splits["test"]
    broken, elsewhere = split.source.paths[3], whole.datamodule.listing.splits["train"].source.paths[0]
    for path in (broken, elsewhere):
        open(path, "wb").close()
    result = run_cli("evaluate", run, "--workers", 1)
    assert result.status == 1, result.err
    assert "1 image could not be read and left out:" in result.out
    assert broken.rsplit("/", 1)[1] in result.out
    assert elsewhere.rsplit("/", 1)[1] not in result.out.split("left out:")[1]
    strict = run_cli("evaluate", run, "--strict")
    assert strict.status == 2
    assert "with 0 bytes" in strict.err
    cli = load_run(Run.open(run))
    assert len(cli.datamodule.leave_out_unreadable("test")) == 1
    figures = evaluate(cli.trainer, cli.model, cli.datamodule, "test")
    assert f"{figures['accuracy']:.4f}" in result.out


def test_images_that_cannot_be_read_are_taken_out_of_splits_that_stay_what_they_were(digits):
    data = ImageFolderData(root=str(digits), validation=0.2, test=0.4)
    before = {name: list(split.source.paths) for name, split in data.listing.splits.items()}
    for path in (before["test"][3], before["train"][0]):
        open(path, "wb").close()
    with pytest.raises(DataError, match="with 0 bytes"):
        data.accept()
    ((path, reason),) = data.leave_out_unreadable("test")
    assert before["test"][3].endswith(path)
    assert reason == f"{path} cannot be read as an image (empty)."
    assert data.leave_out_unreadable("test") == []
    data.accept()
    kept = {name: split.source.paths for name, split in data.listing.splits.items()}
    assert kept == {
        "train": before["train"][1:],
        "validation": before["validation"],
        "test": [path for path in before["test"] if path != before["test"][3]],
    }


@pytest.mark.usefixtures("_loaded_once")
def test_embed_leaves_broken_images_out_of_the_index(finished, digits, run_cli, tmp_path):
    whole = vispeft.embed(finished, digits / "0", tmp_path / "whole", batch_size=1)
    broken = [whole.collection.paths[0], whole.collection.paths[3]]
    broken[0].write_bytes(b"no image")
    broken[1].write_bytes(broken[1].read_bytes()[:70])
    result = run_cli("embed", finished, digits / "0", "--out", tmp_path / "index", "--batch_size", 1, "--workers", 1)
    assert result.status == 1, result.err
    kept = [at for at, path in enumerate(whole.collection.paths) if path not in broken]
    assert f"{len(kept)} images, 32 dimensions" in result.out
    assert all(f"{path} cannot be read as an image" in result.out for path in broken)
    index = Index.open(tmp_path / "index")
    assert index.collection == whole.collection.take(kept)
    assert torch.equal(index.embeddings, whole.embeddings[kept])
    assert list(index.digests) == [whole.digests[at] for at in kept]
    refused = run_cli("search", index.place, digits / "0")
    assert refused.status == 2
    assert f"{broken[0]} cannot be read as an image" in refused.err
    with pytest.raises(DataError, match=r"cannot be read as an image"):
        vispeft.embed(finished, digits / "0", tmp_path / "b")  # strict by default
    os.rename(digits / "1/01.png", os.path.join(os.fsencode(digits / "1"), b"caf\xe9.png"))
    refused = run_cli("search", index.place, digits / "1")
    assert refused.status == 2
    assert "caf\\xe9.png has a name that is no UTF-8" in refused.err


@pytest.mark.usefixtures("_loaded_once")
def test_an_index_of_nothing_is_refused(finished, run_cli, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    assert "None of 1 image can be used" in run_cli("embed", finished, tmp_path / "images", "--out", tmp_path / "c").err
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.usefixtures("_loaded_once")
def test_embed_takes_what_can_be_read_of_a_split(finished, digits, run_cli, tmp_path, monkeypatch):
    def opened(run, overrides=()):
        return SimpleNamespace(datamodule=ImageFolderData(root=str(digits), validation=0.2, test=0.4))

    monkeypatch.setattr(embed, "load_run", opened)
    split = opened(None).datamodule.listing.splits["test"]
    open(split.source.paths[0], "wb").close()
    result = run_cli("embed", finished, "--split", "test", "--out", tmp_path / "index")
    assert result.status == 1, result.err
    with (tmp_path / "index/images.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(split) - 1
    assert run_cli("embed", finished, "--split", "test", "--out", tmp_path / "b", "--strict").status == 2
