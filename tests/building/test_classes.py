"""Classes by name, and the arguments they take."""

import pytest

import vispeft
from vispeft.building.classes import argument_names, check_argument, class_path, find_class, import_class, subclasses
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
        ("vispeft.nowhere.SSF", UnknownNameError, "Did you mean 'vispeft.nowhere.SSF'"),
        ("preset_one", UnknownNameError, "Did you mean 'preset_two'"),
        ("pathlib.Path", ConfigError, "model.method names pathlib.Path, which is no method (no subclass of Method)"),
    ],
)
def test_other_names_are_refused(name, error, message):
    with pytest.raises(error) as refused:
        find_class(name, Method, kind="method", place="model.method", known=["preset_two"])
    assert message in str(refused.value)


def test_subclasses_are_of_any_depth_and_can_be_made():
    assert subclasses(Base) == {"Handing": Handing}
    assert {"SSF", "LoRA"} <= set(subclasses(Method))


def test_arguments_include_those_handed_on_to_the_base():
    assert argument_names(Base) == ["first", "second"]
    assert argument_names(Handing) == ["third", "first", "second"]
    assert argument_names(Anything) == []
    check_argument("Handing", "second", argument_names(Handing))
    check_argument("Anything", "whatever", argument_names(Anything))
    with pytest.raises(UnknownNameError, match=r"Unknown key 'Base\.secnd'\. Did you mean 'Base\.second'"):
        check_argument("Base", "secnd", argument_names(Base))
