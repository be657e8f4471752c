"""What the config of a pulled adapter may name and set: no file that its user has not named, and nothing huge."""

import inspect
import re

import pytest
from lightning.pytorch import LightningDataModule

import vispeft.data
import vispeft.tasks
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


def test_evaluating_a_pulled_adapter_reads_nothing_that_only_its_config_names(own, zoo_cli, monkeypatch, tmp_path):
    """A folder that the config names is not opened; one that the user names is."""
    opened = []

    def read(self):
        opened.append(str(self.root))
        raise DataError("It was opened.")

    monkeypatch.setattr("vispeft.cli.runs._is_foreign", lambda place: True)
    monkeypatch.setattr("vispeft.cli.evaluate.try_loading", lambda place: None)
    monkeypatch.setattr("vispeft.data.folder.ImageFolderData.read", read)
    text = (own / "mine" / "config.yaml").read_text()
    begin, end = text.index("data:"), text.index("init:", text.index("data:"))
    named = "data:\n  class_path: vispeft.data.ImageFolderData\n  init_args: {root: private}\n"
    (own / "mine" / "config.yaml").write_text(text[:begin] + named + text[end:])
    assert "read only where you name them: --data.root DIR" in zoo_cli(own / "mine", command="evaluate").err
    assert not opened
    assert "It was opened" in zoo_cli(own / "mine", f"--data.root={tmp_path}", command="evaluate").err
    assert opened == [str(tmp_path)]
