"""Hostile zoos: an index is read or refused, and an adapter pulled or refused, with nothing outside of the cache.

``python benchmarks/fuzz_zoo.py`` tries 100,000 of them, and has the figures of the last time.
"""

import json
import os
import shutil

import pytest
import torch

import vispeft
from tests.fuzz.common import outcome
from tests.fuzz.zoo_cases import config_changed, hostile_zoo, read_changed
from tests.tiny import TINY
from vispeft.cli.zoo_trust import check_foreign, try_loading
from vispeft.zoo import find_adapter
from vispeft.zoo.index import INDEX, ZooEntry, describe_file, read_index, write_index
from vispeft.zoo.pull import Wanted, pull

INDEXES, ZOOS = 920, 80
"""Cases in the suite; ``FUZZ_CASES`` is another number for each."""
asked = os.environ.get("FUZZ_CASES")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A zoo with one adapter, written without a training."""
    return make_zoo(tmp_path_factory.mktemp("whole") / "zoo")


def make_zoo(zoo):
    """Write a zoo with one adapter of a tiny backbone, and a config that says the same."""
    folder = zoo / "tiny"
    torch.manual_seed(0)
    model = vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    bank.annotate(class_names=["a", "b", "c"])
    bank.save(folder)
    args = ", ".join(f"{key}: {str(value).lower()}" for key, value in TINY.items())
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  class_path: vispeft.tasks.Classification\n  init_args:\n"
        f"    backbone: vit_tiny_patch16_224\n    backbone_args: {{{args}}}\n"
        "    method:\n      class_path: vispeft.LoRA\n      init_args: {rank: 2}\n"
        "data:\n  class_path: vispeft.data.DigitsData\n  init_args: {batch_size: 8}\n"
    )
    (folder / "metrics.json").write_text('{"test": {"accuracy": 0.5}, "zoo": {"figures": {"accuracy": 0.5}}}')
    (folder / "CARD.md").write_text("# tiny\n")
    entry = ZooEntry(
        name="tiny",
        task="classification",
        data="digits",
        needs="",
        backbone="vit_tiny_patch16_224",
        method="lora",
        figures={"accuracy": 0.5},
        baseline=None,
        trainable=512,
        license="MIT",
        files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
    )
    write_index(zoo, {"tiny": entry})
    return zoo


def pull_case(source):
    """Pull a hostile adapter, and load it if that was possible."""
    pull(str(source), Wanted(), check_foreign)
    try_loading(find_adapter("zoo:tiny"))


def test_indexes(whole, tmp_path):
    content = (whole / INDEX).read_bytes()
    for seed in range(int(asked or INDEXES)):
        said = outcome(lambda seed=seed: read_changed(whole / INDEX, content, seed), tmp_path)
        assert said.isprintable(), seed


@pytest.mark.parametrize("seed", [101, 113, 148, 216, 337])
def test_configs_that_were_not_refused_clearly(whole, tmp_path, seed):
    """Arguments of the backbone that are no mapping, no method, and messages of several lines."""
    folder = shutil.copytree(whole / "tiny", tmp_path / "tiny")
    header = json.loads((folder / "adapter.json").read_bytes())
    content = (folder / "config.yaml").read_bytes()
    said = outcome(lambda: config_changed(folder, header, content, seed), tmp_path)
    assert said != "works"
    assert said.isprintable()


def test_zoos(whole, tmp_path, monkeypatch):
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    monkeypatch.setenv("VISPEFT_CACHE", str(cache))
    monkeypatch.chdir(outside)
    works = 0
    for seed in range(int(asked or ZOOS)):
        hostile_zoo(whole, tmp_path / "source", seed)
        said = outcome(lambda: pull_case(tmp_path / "source"), outside)
        assert said.isprintable(), seed
        if said == "works":
            works += 1
        assert {path.name for path in tmp_path.iterdir()} == {"outside", "cache", "source"} or not cache.exists()
        for path in cache.rglob("*") if cache.exists() else ():
            assert path.is_dir() or path.relative_to(cache).parts[0] == "zoo", seed
        if (cache / "zoo" / INDEX).is_file():
            vispeft.zoo.index.write_index(cache / "zoo", {})
    assert 0 < works < int(asked or ZOOS) / 2  # of files that may be anything, such as a card


def test_what_is_whole_is_pulled(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path))
    assert outcome(lambda: read_index(whole), tmp_path) == "works"
    pull_case(whole)
    assert vispeft.zoo.create("tiny").class_names == ["a", "b", "c"]
