"""Classes by name, and the arguments they take."""

import sys

import pytest
from lightning.pytorch import Callback

import vispeft
from vispeft.building.classes import argument_names, check_argument, class_path, find_class, import_class
from vispeft.building.known import known_classes, register_class, register_module
from vispeft.core.method import Method
from vispeft.errors import ConfigError, UnknownNameError


class Base:
    def __init__(self, first: int, *, second: int = 0) -> None: ...


class Handing(Base):
    def __init__(self, third: int, **settings: int) -> None: ...


class Anything:
    def __init__(self, *values: int, **settings: int) -> None: ...


def test_a_class_is_found_by_its_name_and_by_any_of_its_import_paths():
    for name in ("SSF", "vispeft.SSF", "vispeft.methods.ssf.SSF"):
        path = find_class(name, Method, kind="method", place="model.method")
        assert path == class_path(vispeft.SSF) == "vispeft.SSF"
        assert import_class(path) is vispeft.SSF


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("SFS", UnknownNameError, "Unknown method 'SFS'. Did you mean 'SSF'"),
        ("vispeft.SFS", UnknownNameError, "Did you mean 'vispeft.SSF'"),
        ("vispeft.nowhere.SSF", UnknownNameError, "Did you mean 'vispeft.SSF'"),
        ("antigravity.Method", UnknownNameError, "is known to `vispeft train"),
        ("vispeft.Method", UnknownNameError, "Unknown method 'vispeft.Method'"),
        ("tests.building.test_classes.Unlisted", UnknownNameError, "known.register_class stands before"),
        ("preset_one", UnknownNameError, "Did you mean 'preset_two'"),
        ("pathlib.Path", ConfigError, "model.method names pathlib.Path, which is no method (no subclass of Method)"),
    ],
)
def test_other_names_are_refused(name, error, message):
    with pytest.raises(error) as refused:
        find_class(name, Method, kind="method", place="model.method", known=["preset_two"])
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["LoRa", "lora", "Lora2", "AdaptFromer", "prest_two", "vispeft.SFS"])
def test_a_misspelt_name_is_answered_by_near_names_alone(name):
    with pytest.raises(UnknownNameError, match=r"^Unknown method '[^']*'\. Did you mean [^?]*\?$"):
        find_class(name, Method, kind="method", place="model.method", known=["preset_two"])


def test_no_module_is_imported_to_find_a_class():
    before = set(sys.modules)
    for name in ("antigravity.x", "this.Method", "a b", "", ".", "x" * 300, "vispeft.SSF.x", "os.system"):
        with pytest.raises(UnknownNameError):
            find_class(name, Method, kind="method", place="method")
    assert set(sys.modules) == before


class Unlisted(Method): ...


class Mine(Handing): ...


def test_the_list_holds_what_is_ours_lightnings_and_registered():
    assert known_classes(Base) == []
    register_class(Mine)
    assert known_classes(Base) == [Mine]
    assert find_class("Mine", Base, kind="base", place="data") == "tests.building.test_classes.Mine"

    class Inner(Base): ...

    for other in ("Mine", Inner):
        with pytest.raises(ConfigError, match="a class that stands at the top of a module is needed"):
            register_class(other)
    names = {cls.__name__ for cls in known_classes(Method)}
    assert {"SSF", "LoRA"} <= names
    assert not names & {"Method", "Unlisted"}
    names = {cls.__name__ for cls in known_classes(Callback)}
    assert {"EarlyStopping", "LearningRateMonitor"} <= names
    assert not names & {"LambdaCallback", "ModelCheckpoint", "RunCheckpoints", "EpochPictures"}


def test_a_module_is_put_on_the_list_as_a_whole(monkeypatch):
    monkeypatch.setattr("vispeft.building.known._MODULES", set())
    assert Handing not in known_classes(Base)
    register_module("tests.building")
    assert Handing in known_classes(Base)
    assert find_class("tests.building.test_classes.Handing", Base, kind="base", place="x").endswith(".Handing")


@pytest.mark.parametrize("name", ["LambdaCallback", "lightning.pytorch.callbacks.LambdaCallback", "ModelCheckpoint"])
def test_some_callbacks_are_left_out_for_a_reason(name):
    with pytest.raises(ConfigError, match=r"trainer.callbacks names .*, which a config cannot use: "):
        find_class(name, Callback, kind="callback", place="trainer.callbacks")


def test_arguments_include_those_handed_on_to_the_base():
    assert argument_names(Base) == ["first", "second"]
    assert argument_names(Handing) == ["third", "first", "second"]
    assert argument_names(Anything) == []
    check_argument("Handing", "second", argument_names(Handing))
    check_argument("Anything", "whatever", argument_names(Anything))
    with pytest.raises(UnknownNameError, match=r"Unknown key 'Base\.secnd'\. Did you mean 'Base\.second'"):
        check_argument("Base", "secnd", argument_names(Base))
