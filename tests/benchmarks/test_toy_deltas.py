"""The toy of weight deltas: images, names of files, and the table."""

import dataclasses
import json
import re

import pytest
import torch
import toy_deltas

import vispeft


def test_images_of_the_splits_are_apart():
    sets = toy_deltas.digits()
    assert {name: len(labels) for name, (_, labels) in sets.items()} == {
        "pretrain": 1000,
        "train": 400,
        "validation": 200,
        "test": 597,
    }
    assert torch.equal(sets["train"][0], sets["pretrain"][0][:400])
    rows = {name: {tuple(image.flatten().tolist()) for image in images} for name, (images, _) in sets.items()}
    assert len(set.union(*rows.values())) > 1700, "few images are equal"
    assert not rows["test"] & rows["pretrain"]
    assert not rows["validation"] & (rows["pretrain"] | rows["test"])


def test_the_task_turns_inverts_and_groups():
    image = torch.tensor([[[[0, 255], [0, 0]]]], dtype=torch.uint8)
    images, labels = toy_deltas.turned(image, torch.tensor([7]))
    assert images.tolist() == [[[[0, 255], [255, 255]]]]
    assert labels.tolist() == [2]


def test_files_have_names_of_their_own():
    trials = [
        toy_deltas.Trial(method=name, lr=lr, seed=seed)
        for name, entry in toy_deltas.METHODS.items()
        for lr in entry.rates
        for seed in range(toy_deltas.SEEDS)
    ]
    assert len({trial.stem for trial in trials}) == len(trials)
    assert all(re.fullmatch(r"[\w.-]+", trial.stem) for trial in trials)


def test_all_supports_train_as_many_entries():
    model = vispeft.create_model(toy_deltas.ARCHITECTURE, pretrained=False, num_classes=5, **toy_deltas.SHAPE)
    view = vispeft.core.families.describe(model)
    supports = [entry.method for name, entry in toy_deltas.METHODS.items() if name.startswith("sparse")]
    assert [method.parameter_count(view) for method in supports] == [8192] * 5


def facts(method, seed, test, **more):
    return {
        "method": method,
        "seed": seed,
        "lr": 0.01,
        "validation": 0.5,
        "trainable": 8192,
        "stored_bytes": 40000,
        "removed": None,
        "test": test,
        **more,
    }


def test_the_table_has_means_and_marks_what_is_missing():
    runs = [facts("sparse, random", seed, 0.8 + seed / 100) for seed in range(3)]
    lost = {key: value for key, value in facts("sparse, random", 0, 0.1, lr=0.001).items() if key != "test"}
    others = [facts("mask, attention", 0, 0.7, removed=0.25), facts("triadapt, mean rank 4", 0, 0.7, ranks=[2, 4, 6])]
    lines = list(toy_deltas.table_lines([*runs, lost, *others]))
    assert "| sparse, random | 8,192 | 40,000 | 0.01 | 0.500 | 0.810 ± 0.010 | 0.88 |" in lines
    (row,) = [line for line in lines if line.startswith("| mask, attention")]
    assert "25 % of the weights removed (1 of 3 seeds)" in row
    assert any("rank 4, ranks 2 to 6, mean 4.0 (1 of 3 seeds)" in line for line in lines)
    assert "0.700 one seed" in row
    assert "| mos | not yet run | | | | |  |" in lines
    assert len(lines) == 2 + len(toy_deltas.METHODS)


def test_choices_of_entries_are_compared_with_random_ones():
    runs = [facts("sparse, random", seed, 0.84 + seed / 50) for seed in range(2)]
    assert list(toy_deltas.supports(runs)) == []
    (_, line) = toy_deltas.supports([*runs, facts("sparse, lift", 0, 0.83), facts("mos", 0, 0.9)])
    assert "in points: lift -2.0. The standard error of one accuracy on 597 images is 1.5 points." in line
    assert len(toy_deltas.digits()["test"][1]) == toy_deltas.TEST


@pytest.mark.slow
def test_a_run_trains_and_is_not_run_again(tmp_path, monkeypatch):
    name = "lofit, offsets of 8 heads"
    entry = dataclasses.replace(toy_deltas.METHODS[name], rates=(1e-2, 1e-1))
    values = {"RESULTS": tmp_path, "BACKBONE": tmp_path / "backbone.safetensors", "EPOCHS": 1, "PRETRAIN_EPOCHS": 1}
    for key, value in {**values, "METHODS": {name: entry}}.items():
        monkeypatch.setattr(toy_deltas, key, value)
    sets = {split: (images[:40], labels[:40]) for split, (images, labels) in toy_deltas.digits().items()}
    assert 0 <= toy_deltas.pretrain(sets) < 1
    toy_deltas.search(name, sets, 2, float("inf"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(times) == 3, "two rates with the first seed, and one more seed of the best"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in times]
    assert sorted("test" in facts for facts in found) == [False, True, True]
    assert all(len(facts["fields"]["heads"]) == 8 for facts in found)
    toy_deltas.search(name, sets, 2, float("-inf"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == times
    with pytest.raises(SystemExit, match="start again"):
        toy_deltas.search(name, sets, 3, float("-inf"))
