"""Adapters of the zoo: added, listed, shown, loaded, verified, and refused when anything of them was changed."""

import json
import shutil
import statistics
import time

import numpy as np
import pytest
import torch

import vispeft
from tests.tiny import TINY
from vispeft.cli.runs import Run
from vispeft.cli.zoo_add import Extras, add_run
from vispeft.cli.zoo_card import card
from vispeft.errors import BaseMismatchError, ConfigError, FileError, UnknownNameError
from vispeft.storage.files import read_adapter
from vispeft.zoo import find_adapter, list_zoo_adapters
from vispeft.zoo.index import FILES, INDEX, index_bytes, parse_index, read_index

FLIPS = 100
"""Bytes that are flipped in each file, one at a time."""


def backbone():
    """The backbone of the run, whose weights are those of its seed."""
    torch.manual_seed(0)
    return vispeft.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)


def test_a_run_is_added_with_all_files_in_half_precision(own, finished_run):
    entry = read_index(own)["mine"]
    assert set(entry.files) == set(FILES)
    assert entry.method == "ssf"
    assert entry.license == "MIT"
    assert entry.trainable == 1536
    stored = read_adapter(own / "mine")
    run = read_adapter(finished_run / "adapter")
    for ours, theirs in zip(stored[1:], run[1:], strict=True):
        assert {tensor.dtype for tensor in ours.values()} == {torch.float16}
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key].float(), tensor, atol=1e-3, rtol=1e-3)
    figures = json.loads((finished_run / "metrics.json").read_text())["test"]
    assert entry.figures["accuracy"] == pytest.approx(figures["accuracy"], rel=0.005)
    assert (own / "mine" / "CARD.md").read_text() == card(own / "mine")


def test_it_is_loaded_by_its_name(own):
    model = backbone()
    bank = vispeft.load(model, "zoo:mine")
    assert bank.notes()["class_names"] == list("0123456789")
    made = vispeft.zoo.create("mine")
    assert made.class_names == list("0123456789")
    assert made.head.out_features == 10
    assert made.preprocessing.size == (16, 16)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(made.backbone(images), model.eval()(images))
    predicted = made.predict([torch.zeros(3, 20, 20, dtype=torch.uint8)])
    assert predicted[0].row[0] in made.class_names


def test_another_backbone_is_refused(own):
    torch.manual_seed(1)
    model = vispeft.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
    with pytest.raises(BaseMismatchError, match="weights"):
        vispeft.load(model, "zoo:mine")
    assert not any("adapters" in key for key in model.state_dict())


def test_names_that_are_not_known(own):
    with pytest.raises(UnknownNameError, match="'mine'"):
        find_adapter("zoo:mien")
    with pytest.raises(ConfigError, match=r"is an adapter.*vispeft\.load\(.*zoo\.create\('mine'\)"):
        vispeft.create_model("zoo:mine")
    with pytest.raises(ConfigError, match="is a backbone"):
        find_adapter("zoo:vit_tiny")
    with pytest.raises(UnknownNameError, match="vit_tiny"):
        vispeft.create_model("zoo:vit_tiy")
    for use in (Run.open, find_adapter, lambda given: vispeft.load(backbone(), given)):
        with pytest.raises(FileError, match=r"There is no .*'mine'.*Did you mean 'zoo:mine'\?"):
            use("mine")
        with pytest.raises(FileError, match=r"nobody.*[^?]$"):
            use("nobody")


def test_a_model_of_the_zoo_is_made_without_a_trainer(own, monkeypatch):
    """Lightning's trainer prints what it finds of devices, and advertises."""
    monkeypatch.setattr("vispeft.cli.evaluate.evaluation_trainer", None)
    assert vispeft.zoo.create("mine").class_names == list("0123456789")


def test_commands_take_its_name(own, zoo_cli, tmp_path):
    listed = zoo_cli("list")
    assert listed.status == 0
    assert "mine" in listed.out
    assert "1,536" in listed.out
    shown = zoo_cli("show", "zoo:mine")
    assert shown.out.startswith("# mine")
    assert "MIT" in shown.out
    assert zoo_cli("zoo:mine", command="evaluate").status == 0
    assert "ssf" in zoo_cli("zoo:mine", command="inspect").out
    assert "no run directory" in zoo_cli("zoo:vit_tiny", command="inspect").err
    assert zoo_cli("remove", "mine").status == 0
    assert list(list_zoo_adapters()) == [name for name in list_zoo_adapters() if name != "mine"]
    assert not (own / "mine").exists()
    assert "Unknown adapter" in zoo_cli("show", "mine").err
    assert "digits_ssf ships with the package and stays" in zoo_cli("remove", "digits_ssf").err


def test_verify(own, zoo_cli, monkeypatch):
    monkeypatch.setenv("VISPEFT_ZOO", str(own))
    assert zoo_cli("verify", "--strict").out == "mine: 6 files whole\n"
    measured = zoo_cli("verify", "mine", "--metrics", "--strict")
    assert measured.status == 0
    assert "figures as stated: accuracy" in measured.out
    change(own, lambda entry: entry["figures"].update(accuracy=entry["figures"]["accuracy"] + 0.01))
    wrong = zoo_cli("verify", "--metrics")
    assert wrong.status == 2
    assert "is stated" in wrong.out
    (own / "mine" / "CARD.md").unlink()
    lacking = zoo_cli("verify")
    assert lacking.status == 2
    assert "CARD.md is not there" in lacking.out


def change(zoo, edit):
    """Change an entry of an index, with right digests."""
    content = json.loads((zoo / INDEX).read_text())
    edit(content["adapters"]["mine"])
    entry = vispeft.zoo.ZooEntry(name="mine", **content["adapters"]["mine"])
    (zoo / INDEX).write_bytes(index_bytes({"mine": entry}))


def test_data_that_are_not_there(own, zoo_cli, monkeypatch):
    from vispeft.data import DigitsData
    from vispeft.errors import DataError

    def lacking(self, preprocessing):
        raise DataError("There are no digits.")

    monkeypatch.setenv("VISPEFT_ZOO", str(own))
    monkeypatch.setattr(DigitsData, "load", lacking)
    result = zoo_cli("verify", "--metrics")
    assert result.status == 0
    assert "figures not checked: needs There are no digits." in result.out
    assert zoo_cli("verify", "--metrics", "--strict").status == 1


@pytest.mark.parametrize("file", [*FILES, INDEX])
def test_one_flipped_byte_is_refused(own, file):
    path = own / INDEX if file == INDEX else own / "mine" / file
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.choice(len(whole), FLIPS, replace=len(whole) < FLIPS):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        with pytest.raises((FileError, ConfigError)):
            find_adapter("zoo:mine")
    path.write_bytes(whole)
    assert find_adapter("zoo:mine") == own / "mine"


def test_what_add_refuses(own, finished_run, zoo_cli, tmp_path):
    same = zoo_cli("add", finished_run, "--name", "mine", "--license", "MIT")
    assert same.status == 0
    other = zoo_cli("add", finished_run, "--name", "mine", "--license", "BSD")
    assert "with other content" in other.err
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished_run, unfinished)
    (unfinished / "metrics.json").unlink()
    assert "is no finished run: metrics.json is missing" in zoo_cli("add", unfinished, "--name", "two").err
    assert "There is no run directory" in zoo_cli("add", tmp_path / "none", "--name", "two").err
    assert "is a backbone" in zoo_cli("add", finished_run, "--name", "vit_tiny").err
    for name in ("../x", "A", "", "a/b", "x" * 65, "."):
        assert "is no name" in zoo_cli("add", finished_run, "--name", name).err
    assert set(read_index(own)) == {"mine"}
    assert {path.name for path in own.iterdir()} == {"mine", INDEX}


def test_a_damaged_adapter_is_put_back_by_the_same_run(own, finished_run):
    (own / "mine" / "CARD.md").write_text("another one")
    add_run(str(finished_run), "mine", own, Extras(license="MIT"))
    assert find_adapter("zoo:mine") == own / "mine"


def test_an_index_of_another_form(own):
    path, content = own / INDEX, json.loads((own / INDEX).read_text())

    def text(value):
        return json.dumps(value, indent=1).encode()

    entry = content["adapters"]["mine"]
    elsewhere = {**entry, "files": {"../../x": entry["files"]["CARD.md"]}}
    for says, value in {
        "has schema 2": {**content, "schema": 2},
        "no schema": [1, 2],
        "digest": {**content, "digest": "0" * 64},
        "is no name": {**content, "adapters": {"../evil": entry}},
        "that no adapter has": {**content, "adapters": {"a": elsewhere}},
        "which every adapter has": {**content, "adapters": {"a": {**entry, "files": {}}}},
        "at most": {
            **content,
            "adapters": {"a": {**entry, "files": {**entry["files"], "CARD.md": {"bytes": 2**39, "sha256": "0" * 64}}}},
        },
        "trainable": {**content, "adapters": {"a": {**entry, "trainable": -1}}},
    }.items():
        with pytest.raises((FileError, ConfigError), match=says):
            parse_index(path, text(value))
    for says, given in {
        "twice": b'{"schema": 1, "schema": 1, "adapters": {}}',
        "valid JSON": b"[" * 100_000,
        "NaN": b'{"schema": NaN, "adapters": {}}',
        "not valid": b"\xff\xfe",
    }.items():
        with pytest.raises(FileError, match=says):
            parse_index(path, given)


def test_eight_adapters_on_one_backbone():
    """They cost their own tensors and nothing of the backbone, and are switched in milliseconds."""
    model = vispeft.create_model("zoo:vit_tiny")
    base = {tensor.data_ptr() for tensor in model.parameters()}
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    names = [f"adapter{number}" for number in range(8)]
    for number, name in enumerate(names):
        method = vispeft.LoRA(rank=4) if number % 2 else vispeft.SSF()
        bank = vispeft.attach(model, method, name=name, verify=False)
    own = sum(tensor.nbytes for name in names for tensor in bank.state_dict(name).values())
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == before + own
    assert base <= {tensor.data_ptr() for tensor in model.parameters()}
    seconds = []
    for name in names * 4:
        began = time.process_time()
        bank.set_active(name)
        seconds.append(time.process_time() - began)
    assert statistics.median(seconds) < 0.005
