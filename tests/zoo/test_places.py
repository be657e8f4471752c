"""What the config of a pulled adapter may name and set: no file that its user has not named, and nothing huge."""

import inspect
import re
import shutil

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors.torch import save_file

import vispeft.data
import vispeft.tasks
from tests.tiny import TINY
from vispeft.backbones.create import create_model
from vispeft.building.annotations import argument_type
from vispeft.building.classes import argument_names, default_of
from vispeft.cli.reading import workers_of
from vispeft.cli.runs import Run
from vispeft.cli.zoo_places import INSIDE, PLACES, check_named, check_places
from vispeft.cli.zoo_trust import _check_sizes
from vispeft.errors import ConfigError, DataError
from vispeft.tasks.base import AdapterTask

PLAIN = {"class_names", "dataset", "interpolation", "label", "labels", "names", "task", "tasks"}
"""Arguments of data modules that hold text and name no file; the names in `labels` are checked as those in `INSIDE`."""


def classes(module, base):
    found = [getattr(module, name) for name in module.__all__]
    return [cls for cls in found if inspect.isclass(cls) and issubclass(cls, base)]


def config(method="vispeft.SSF", **data):
    return {
        "model": {"class_path": "Classification", "init_args": {"method": method}},
        "data": {"class_path": "ImageFolderData", "init_args": data},
    }


def test_all_text_of_data_modules_is_known_to_be_a_place_or_none():
    texts = {
        name
        for cls in classes(vispeft.data, LightningDataModule)
        for name in argument_names(cls)
        if re.search(r"\b(str|Path)\b", str(argument_type(cls, name)))
    }
    assert texts == {*PLACES, *PLAIN, *INSIDE} - {"folder"}  # which is of `TaskLabels`


@pytest.mark.parametrize(
    "data",
    [
        {"images": "../private"},
        {"images": "/etc"},
        {"masks": "a/../../b"},
        {"masks": "C:\\Users"},
        {"masks": "..\\private"},
        {"image_suffix": "/../../key.png"},
        {"mask_suffix": "\\\\server\\share.png"},
        {"labels": {"../private": {"kind": "depth"}}},
        {"labels": {"depth": {"kind": "depth", "folder": "/etc"}}},
        {"labels": {"depth": {"class_path": "TaskLabels", "init_args": {"folder": "../.."}}}},
    ],
    ids=str,
)
def test_a_name_that_leaves_the_folder_of_the_data(data):
    with pytest.raises(ConfigError, match=r"is inside of data\.root"):
        check_places(config(root="mine", **data))


@pytest.mark.parametrize(
    "method",
    [
        "/etc/method.yaml",
        "method.yml",
        "a/b",
        {"class_path": "/etc/method.yaml"},
        {"class_path": "vispeft.Sparse", "init_args": {"support": "given", "source": "entries.safetensors"}},
    ],
    ids=str,
)
def test_a_method_that_is_read_from_a_file(method):
    with pytest.raises(ConfigError, match="is the file"):
        check_places(config(method))


def test_what_stays_inside_is_taken():
    labels = {"depth": {"kind": "depth", "folder": "sub/depth"}, "semseg": {"kind": "classes"}}
    check_places(config(images="JPEGImages", masks="masks/v1", mask_suffix="_labelIds.png", labels=labels))
    for odd in ({}, {"model": 1, "data": [2]}, config(images=7, labels=[1]), config(None), config({"init_args": 3})):
        check_places(odd)


def test_places_are_read_only_where_the_user_names_them():
    tree = config(root="downloads", train_list="/home/you/list.txt", test_list=None)
    with pytest.raises(DataError, match=r"root 'downloads', train_list .*: --data.root DIR --data.train_list FILE"):
        check_named(tree, [])
    with pytest.raises(DataError, match=r"\(train_list .*: --data.train_list FILE"):
        check_named(tree, ["--data.init_args.root", "mine", "--trainer.accelerator=cpu"])
    check_named(tree, ["--data.root=mine", "--data.train_list", "mine.txt"])
    check_named(tree, ["--data", "DigitsData"])
    check_named(config(batch_size=8), [])


def test_a_pulled_adapter_decides_about_no_processes(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {class_path: DigitsData, init_args: {num_workers: 5000}}")
    assert workers_of(Run(tmp_path, {}, foreign=True)) == 0
    assert workers_of(Run(tmp_path, {})) == 5000


def test_defaults_of_tasks_and_data_are_of_allowed_sizes():
    for module, base in ((vispeft.data, LightningDataModule), (vispeft.tasks, AdapterTask)):
        for cls in classes(module, base):
            for name in argument_names(cls):
                value = default_of(cls, name)
                if isinstance(value, int | float | str | list | tuple | dict):
                    _check_sizes({name: list(value) if isinstance(value, tuple) else value}, cls.__name__)


@pytest.mark.parametrize(("name", "value"), [("max_pixels", 10**9), ("batch_size", 10**5), ("image_size", [8, 10**5])])
def test_sizes_that_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"data.{name} is .*at most"):
        _check_sizes({name: value}, "data")


@pytest.fixture
def pulled(own, monkeypatch):
    """An adapter of others whose config names a folder, and the folders of data that were opened."""
    opened = []

    def read(self):
        opened.append(str(self.root))
        raise DataError("It was opened.")

    monkeypatch.setattr("vispeft.cli.runs._is_foreign", lambda place: place == own / "mine")
    monkeypatch.setattr("vispeft.cli.evaluate.try_loading", lambda place: None)
    monkeypatch.setattr("vispeft.data.folder.ImageFolderData.read", read)
    text = (own / "mine" / "config.yaml").read_text()
    begin, end = text.index("data:"), text.index("init:", text.index("data:"))
    named = "data:\n  class_path: vispeft.data.ImageFolderData\n  init_args: {root: private, num_workers: 40}\n"
    (own / "mine" / "config.yaml").write_text(text[:begin] + named + text[end:])
    return own / "mine", opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "RUN"),
        ("embed", "RUN", "--split", "test", "--out", "OUT"),
        ("inspect", "RUN", "--plots", "OUT"),
        ("compose", "OUT", "RUN"),
        ("port", "OUT", "RUN", "--weights", "WEIGHTS", "--allow-drift"),
        ("port", "OUT", "RUN", "--weights", "WEIGHTS", "--allow-drift", "--refit", "1"),
    ],
)
def test_a_command_reads_no_data_that_only_a_pulled_config_names_and_takes_the_key_it_advises(
    pulled, zoo_cli, tmp_path, words
):
    place, opened = pulled
    torch.manual_seed(0)
    save_file(
        create_model("vit_tiny_patch16_224", num_classes=0, **TINY).state_dict(), tmp_path / "weights.safetensors"
    )

    def call(out, *further):
        known = {"RUN": place, "OUT": tmp_path / out, "WEIGHTS": tmp_path / "weights.safetensors"}
        command, *rest = (str(known.get(word, word)) for word in words)
        result = zoo_cli(*rest, *further, command=command)
        return " ".join(f"{result.out} {result.err}".split())

    assert "read only where you name them: --data.root DIR" in call("first")
    assert not opened
    assert "It was opened" in call("second", "--data.root", tmp_path)
    assert opened == [str(tmp_path)]


@pytest.mark.slow
def test_what_is_made_of_a_pulled_adapter_starts_no_processes_of_its_config(pulled, zoo_cli, tmp_path):
    place, _ = pulled
    assert zoo_cli(tmp_path / "out", place, command="compose").status == 0
    made = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert made["data"]["init_args"] == {"root": "private", "num_workers": 0}
    assert set(made) <= {"model", "data", "seed_everything", "trainer"}


@pytest.mark.slow
def test_keys_of_the_data_that_nothing_would_use_are_refused(own, zoo_cli, tmp_path):
    given = ("--data.batch_size", "8")
    place = own / "mine"
    refused = zoo_cli(place, tmp_path, *given, "--out", tmp_path / "index", command="embed")
    assert "--data.batch_size was given with IMAGES" in refused.err
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter.json", "adapter.safetensors", "head.safetensors"):
        shutil.copyfile(place / name, alone / name)
    refused = zoo_cli(tmp_path / "out", alone, *given, command="compose")
    assert "no adapter is that of a run" in refused.err
