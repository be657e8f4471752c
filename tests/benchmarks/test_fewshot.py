"""The few-shot comparison: what is chosen by what, when the test images are looked at, and what a second start does."""

import json
import math

import fewshot
import pretrain_data
import pytest
import torch

import vispeft
from tests.tiny import TINY
from vispeft.data.preprocessing import Preprocessing


@pytest.fixture
def search(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def images(count):
        labels = torch.arange(count) % 10
        return torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8), labels

    sets = {"train": images(40), "test": images(30)}
    monkeypatch.setattr(fewshot, "read_fashion", lambda folders: sets)
    monkeypatch.setattr(fewshot, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(fewshot, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(fewshot, "CHOOSE_PER_CLASS", 1)
    monkeypatch.setattr(fewshot, "PROBE_EPOCHS", 2)
    tiny = fewshot.Backbone(lambda: vispeft.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), 16, "Tiny")
    monkeypatch.setattr(fewshot, "BACKBONES", {"tiny": tiny})
    folders = pretrain_data.Folders(tmp_path, tmp_path, tmp_path, tmp_path / "work" / "data")
    return fewshot.Search("tiny", folders, epochs=2, deadline=math.inf)


def results(search):
    return {path.stem: json.loads(path.read_text()) for path in search.results.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ssf", "linear_probe"])
def test_the_rate_is_chosen_on_validation_and_only_the_best_is_tested(search, monkeypatch, method):
    looked_at = []
    split = search.shots.split
    monkeypatch.setattr(search.shots, "split", lambda name, seed: looked_at.append((name, seed)) or split(name, seed))
    search.method(method, seeds=2)

    found = results(search)
    rates = fewshot.rates_of(method)
    chosen = {stem: facts for stem, facts in found.items() if facts["seed"] == 0}
    assert {facts["lr"] for facts in chosen.values()} == set(rates)
    best = max(facts["validation"] for facts in chosen.values())
    tested = [facts for facts in found.values() if "test" in facts]
    assert {(facts["seed"], facts["validation"] == best) for facts in tested if facts["seed"] == 0} == {(0, True)}
    assert sorted(facts["seed"] for facts in tested) == [0, 1]
    assert len({facts["lr"] for facts in tested}) == 1
    # Every rate has been tried before the first look at the test images.
    first = next(i for i, (name, _) in enumerate(looked_at) if name == "test")
    assert set(looked_at[:first]) == {("train", 0), ("validation", 0)}
    assert looked_at[:first].count(("train", 0)) >= len(rates)
    assert {seed for name, seed in looked_at if name == "test"} == {0, 1}


@pytest.mark.slow
def test_a_second_start_runs_nothing_again(search, monkeypatch):
    search.method("ssf", seeds=1)
    before = results(search)
    monkeypatch.setattr(search, "train", lambda trial: pytest.fail(f"{trial} is on disk"))
    search.method("ssf", seeds=1)
    assert results(search) == before


@pytest.mark.slow
def test_a_start_after_the_choice_tests_what_was_chosen(search, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(search, "tested", lambda trial: None)
        search.method("ssf", seeds=1)
    assert not any("test" in facts for facts in results(search).values())
    monkeypatch.setattr(search, "train", lambda trial: pytest.fail(f"{trial} was trained again"))
    search.method("ssf", seeds=1)
    assert sum("test" in facts for facts in results(search).values()) == 1


def test_time_that_is_used_up_stops_before_a_training(search):
    search.deadline = 0.0
    with pytest.raises(SystemExit, match="start again"):
        search.method("ssf", seeds=1)
    assert not results(search)


def test_the_pilot_writes_nothing(search, capsys):
    search.pilot(["ssf"])
    assert not results(search)
    assert "about" in capsys.readouterr().out


def test_splits_have_the_same_number_of_each_class_and_share_no_image(search):
    for seed in (0, 1):
        train, choose, test = (search.shots.split(name, seed) for name in ("train", "validation", "test"))
        assert torch.bincount(train.labels).tolist() == [2] * 10
        assert torch.bincount(choose.labels).tolist() == [1] * 10
        assert len(test.labels) == 30
        assert train.images.shape == (20, 1, 16, 16)
        same = (train.images[:, None] == choose.images[None]).flatten(2).all(2)
        assert not same.any()
    first, second = (search.shots.split("train", seed).images for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_table_marks_what_has_not_been_run(search):
    search.method("ssf", seeds=1)
    lines = list(fewshot.table_lines())
    assert [line for line in lines if line.startswith("| ssf (1 of 3 seeds)")]
    assert [line for line in lines if line.startswith("| full | not yet run")]


def test_a_probe_sees_the_features_the_model_would_compute(search):
    trial = fewshot.Trial(backbone="tiny", method="linear_probe", lr=1e-2, seed=0, epochs=1)
    training = fewshot.Training(trial, search.shots)
    training.model.eval()
    split = search.shots.split("validation", 0)
    with torch.inference_mode():
        whole = training.model(training.seen(split.images))
        probed = training.scores(training.inputs("validation"))
    torch.testing.assert_close(probed, whole, rtol=0.05, atol=0.02)  # the features are computed in bfloat16
    assert Preprocessing.of(training.model).mean == training.shots._preprocessing.mean
