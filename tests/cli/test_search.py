"""From a finished run to an index, and from a query to its neighbours."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import vispeft
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.data.images import read_image
from vispeft.data.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    for index in range(24):
        target = folder / str(load_digits().target[index])
        target.mkdir(exist_ok=True)
        grey = (load_digits().images[index] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(target / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def index(finished, digits, call_cli, tmp_path_factory):
    place = tmp_path_factory.mktemp("index") / "digits"
    result = call_cli("embed", finished, digits, "--out", place, "--batch_size", 10)
    assert result.status == 0, result.err
    assert "24 images, 32 dimensions" in result.out
    return place


def test_embeddings_are_the_pooled_features_of_the_adapted_backbone(finished, digits, index):
    task, _ = load_task(Run.open(finished))
    transform = Preprocessing.from_dict(task.bank.notes()["preprocessing"]).transform()
    opened = vispeft.cli.search.Index.open(index)
    images = torch.stack([transform(read_image(path)) for path in opened.collection.paths])
    with torch.no_grad():
        wanted = task.model.forward_head(task.model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(task.model.get_classifier()(wanted), task(images))
    torch.testing.assert_close(opened.embeddings, wanted, rtol=1e-5, atol=1e-5)


def test_neighbours_are_printed_and_written(digits, index, run_cli, tmp_path):
    result = run_cli("search", index, digits / "0/0.png", digits / "1", "--neighbours", 3, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    assert "0/0.png (0)" in result.out
    with open(tmp_path / "out/neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    queries = json.loads((tmp_path / "out/neighbours.json").read_text())
    assert len(rows) == 3 * len(queries) == 3 * (1 + len(list((digits / "1").iterdir())))
    assert {row["right"] for row in rows} <= {"yes", "no"}
    assert rows[0]["query"] == str(digits / "0/0.png") != rows[0]["path"]
    assert [float(row["score"]) for row in rows[:3]] == sorted((float(row["score"]) for row in rows[:3]), reverse=True)
    pictures = sorted((tmp_path / "out/pictures").iterdir())
    assert len(pictures) == len(queries)
    assert Image.open(pictures[0]).size[0] > 300
    assert "not empty" in run_cli("search", index, digits, "--out", tmp_path / "out").err


def test_the_functions_give_what_the_commands_write(digits, index):
    found = vispeft.search(index, digits / "3", count=2)
    assert [entry.label for entry in found] == ["3"] * len(list((digits / "3").iterdir()))
    assert all(len(entry.hits) == 2 and entry.query != entry.hits[0].path for entry in found)


def test_another_run_and_moved_runs_are_refused(finished, digits, index, run_cli, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    assert run_cli("search", index, digits / "0/0.png", "--run", moved).status == 0
    task, _ = load_task(Run.open(moved))
    with torch.no_grad():
        next(iter(task.bank.named_tensors().values())).add_(0.1)
    task.save_adapter(moved / "adapter")
    result = run_cli("search", index, digits / "0/0.png", "--run", moved)
    assert "made by another model" in result.err
    assert "adapter" in result.err
    described = json.loads((index / "index.json").read_text())
    assert described["run"] == str(finished.resolve())


def test_what_cannot_be_embedded_is_refused_before_the_first_batch(finished, digits, run_cli, tmp_path):
    broken = tmp_path / "images"
    shutil.copytree(digits / "0", broken)
    for arguments, message in (
        (("--out", tmp_path / "a"), "Give either IMAGES or --split"),
        ((digits, "--split", "test", "--out", tmp_path / "a"), "Give either IMAGES or --split"),
        (("--split", "test", "--out", tmp_path / "a"), "DigitsData has no image files"),
        ((digits, "--out", tmp_path / "a", "--batch_size", 0), "at least 1"),
        ((digits, "--out", broken), "not empty"),
    ):
        result = run_cli("embed", finished, *arguments)
        assert result.status == 2
        assert message in result.err
        assert not (tmp_path / "a").exists()
    assert "is no index" in run_cli("search", broken, digits / "0").err
