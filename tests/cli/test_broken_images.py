"""What `evaluate`, `embed` and `search` do with images that cannot be read."""

import csv
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import vispeft
from vispeft.cli.evaluate import load_run
from vispeft.cli.evaluation import evaluate
from vispeft.cli.runs import Run
from vispeft.errors import DataError
from vispeft.retrieval import Index


@pytest.fixture
def digits(tmp_path):
    for index in range(60):
        folder = tmp_path / "digits" / str(load_digits().target[index])
        folder.mkdir(parents=True, exist_ok=True)
        grey = (load_digits().images[index] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{index:02}.png")
    return tmp_path / "digits"


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


def test_evaluate_measures_the_images_that_can_be_read(run, run_cli):
    whole = load_run(Run.open(run))
    split = whole.datamodule.listing.splits["test"]
    broken, kept = split.source.paths[3], [path for path in split.source.paths if path != split.source.paths[3]]
    elsewhere = whole.datamodule.listing.splits["train"].source.paths[0]
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
    assert cli.datamodule.leave_out_unreadable("test") == []
    assert cli.datamodule.listing.splits["test"].source.paths == kept
    figures = evaluate(cli.trainer, cli.model, cli.datamodule, "test")
    assert f"{figures['accuracy']:.4f}" in result.out


def test_embed_leaves_broken_images_out_of_the_index(finished, digits, run_cli, tmp_path):
    whole = vispeft.embed(finished, digits, tmp_path / "whole", batch_size=1)
    broken = [path for path in whole.collection.paths if path.name in ("03.png", "41.png")]
    broken[0].write_bytes(b"no image")
    broken[1].write_bytes(broken[1].read_bytes()[:70])
    result = run_cli("embed", finished, digits, "--out", tmp_path / "index", "--batch_size", 1, "--workers", 1)
    assert result.status == 1, result.err
    assert "58 images, 32 dimensions" in result.out
    assert all(f"{path} cannot be read as an image" in result.out for path in broken)
    index = Index.open(tmp_path / "index")
    kept = [at for at, path in enumerate(whole.collection.paths) if path not in broken]
    assert index.collection == whole.collection.take(kept)
    assert torch.equal(index.embeddings, whole.embeddings[kept])
    assert list(index.digests) == [whole.digests[at] for at in kept]
    refused = run_cli("search", index.place, digits)
    assert refused.status == 2
    assert f"{broken[0]} cannot be read as an image" in refused.err
    with pytest.raises(DataError, match=r"cannot be read as an image"):
        vispeft.embed(finished, digits, tmp_path / "b")  # strict by default


def test_an_index_of_nothing_is_refused(finished, run_cli, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    assert "None of 1 image can be used" in run_cli("embed", finished, tmp_path / "images", "--out", tmp_path / "c").err
    assert not list((tmp_path / "c").iterdir())


def test_embed_takes_what_can_be_read_of_a_split(run, run_cli, tmp_path):
    split = load_run(Run.open(run)).datamodule.listing.splits["test"]
    open(split.source.paths[0], "wb").close()
    result = run_cli("embed", run, "--split", "test", "--out", tmp_path / "index")
    assert result.status == 1, result.err
    with (tmp_path / "index/images.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(split) - 1
    assert run_cli("embed", run, "--split", "test", "--out", tmp_path / "b", "--strict").status == 2
