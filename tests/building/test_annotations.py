"""Annotations of own classes: each for itself, also by names for type checkers, and text beside a class."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from tests.building.own_classes import OwnPart, OwnRecord
from vispeft.building.annotations import argument_type
from vispeft.building.arguments import check_arguments
from vispeft.building.classes import find_class
from vispeft.errors import ConfigError, UnknownNameError


def test_every_annotation_is_resolved_for_itself() -> None:
    """One name that was not there made all arguments of the class take objects alone."""
    assert argument_type(OwnPart, "sizes") == Sequence[int]
    assert argument_type(OwnPart, "folder") == Path | None
    assert argument_type(OwnPart, "hook") == Callback | None
    assert argument_type(OwnPart, "thing") is Any
    assert argument_type(OwnPart, "count") is int
    assert argument_type(OwnRecord, "sizes") == Sequence[int]
    assert argument_type(OwnRecord, "hook") == Callback | None


@pytest.mark.parametrize(
    "given",
    [
        {"sizes": [1, 2], "folder": "a/b", "count": 3},
        {"thing": "text"},
        {"thing": {"a": [1]}},
        {"monitor": "validation/loss"},
        {"monitor": "accuracy"},
        {"hooks": ["loss", "no_module_of.this_name"]},
    ],
)
def test_plain_data_and_text_beside_a_class_are_taken(given: dict[str, Any]) -> None:
    checked = check_arguments(OwnPart, given, "part")
    assert checked == given
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(OwnPart, "part")
    made = parser.instantiate(parser.parse_object({"part": checked})).part
    texts = {str(value) for value in made.given}
    assert {str(value) for value in given.values()} <= texts


@pytest.mark.parametrize(
    "given",
    [
        {"thing": {"class_path": "os.getcwd"}},
        {"monitor": "this.s"},
        {"monitor": "LambdaCallback"},
        {"hook": "subprocess.Popen"},
        {"hooks": ["loss", "subprocess.Popen"]},
    ],
)
def test_no_text_makes_an_object(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check_arguments(OwnPart, given, "part")


def test_classes_on_the_list_are_named_there() -> None:
    checked = check_arguments(OwnPart, {"monitor": "EarlyStopping", "hooks": ["EarlyStopping", "loss"]}, "part")
    assert checked["monitor"]["class_path"].endswith(".EarlyStopping")
    assert checked["hooks"][1] == "loss"


def test_a_module_that_was_blocked_is_like_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps None for it, which has no names."""
    monkeypatch.setitem(sys.modules, "blocked", None)
    with pytest.raises(UnknownNameError, match=r"Unknown callback 'blocked\.Thing'"):
        find_class("blocked.Thing", Callback, kind="callback", place="trainer.callbacks")
