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
from vispeft.cli.search import DRAWN, _small
from vispeft.data.images import Reading, read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError


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


def test_large_images_are_searched_and_drawn_within_a_limit(finished, digits, run_cli, tmp_path, monkeypatch):
    large = tmp_path / "large"
    large.mkdir()
    for name, source in (("a", "0/0.png"), ("b", "1/1.png")):
        Image.open(digits / source).resize((900, 30)).save(large / f"{name}.png")
    monkeypatch.setattr(Reading, "from_notes", classmethod(lambda cls, notes: Reading(max_pixels=26_000)))
    index, limit = tmp_path / "index", ("--max_pixels", 27_000)
    assert "more than max_pixels=26000" in run_cli("embed", finished, large, "--out", index).err
    assert run_cli("embed", finished, large, "--out", index, *limit).status == 0
    assert "more than max_pixels=26000" in run_cli("search", index, large).err
    result = run_cli("search", index, large / "a.png", large, *limit, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    assert len(list((tmp_path / "out/pictures").iterdir())) == 3
    assert _small(torch.zeros(3, 30, 900, dtype=torch.uint8)).shape == (3, 13, DRAWN)
    assert _small(torch.zeros(3, 30, 9, dtype=torch.uint8)).shape == (3, 30, 9)


def test_settings_of_a_search_are_checked_before_anything_is_embedded(digits, index):
    for name, value in (("batch_size", 0), ("batch_size", -2), ("batch_size", 1.5), ("count", 0), ("count", "5")):
        with pytest.raises(ConfigError, match="at least 1"):
            vispeft.search(index, digits / "3", **{name: value})


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
