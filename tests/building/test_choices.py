"""Values of keys that take one of several choices: the nearest choice is named, and all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import vispeft
from tests.tiny import CONFIG
from vispeft.building.arguments import check_value
from vispeft.cli.config import ConfigCLI
from vispeft.cli.config_keys import check_config
from vispeft.errors import UnknownNameError

NOWHERE = Path("a.yaml")
WRONG = {
    "compile": ("block", "'block'. Did you mean 'blocks'.*for {}, which takes off, blocks or model"),
    "memory": (3, "'3'. Known: lean, leaner, plain. It was given for {}"),
    "model.schedule": (3, "'3'. Known: cosine, poly"),
    "model.base_dtype": ("float16", "Did you mean 'bfloat16' or 'float32'.*takes float32 or bfloat16"),
    "model.class_weights": ("balance", "Did you mean 'balanced'.*takes balanced or a list"),
    "model.absent": (True, "'[Tt]rue'. Known: skip, zero"),
}
"""Values by key, with what is said about each."""


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_choice_is_answered_by_the_choices_in_a_config_and_on_the_command_line(key: str) -> None:
    value, told = WRONG[key]
    with pytest.raises(UnknownNameError, match=told.format(f"--{key}")):
        check_config(yaml.safe_load(CONFIG), [(key, str(value))], "a.yaml")
    section, _, name = key.rpartition(".")
    tree = yaml.safe_load(CONFIG)
    (tree[section]["init_args"] if section else tree)[name] = value
    with pytest.raises(UnknownNameError, match=told.format(key)):
        check_config(tree, [], "a.yaml")


@pytest.mark.parametrize("value", ["off", False, "'off'"])
def test_off_is_no_false_where_it_is_a_choice(value: object) -> None:
    tree = yaml.safe_load(f"{CONFIG}compile: {value}\n")
    assert ConfigCLI(NOWHERE, [], tree=tree, create=False).config["compile"] == "off"


def test_off_can_be_typed() -> None:
    for token in ("--compile=off", "--compile=blocks"):
        cli = ConfigCLI(NOWHERE, [token, "--memory=leaner"], tree=yaml.safe_load(CONFIG), create=False)
        assert (cli.config["compile"], cli.config["memory"]) == (token.partition("=")[2], "leaner")


Few = Literal[1, 2, 4]


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (4, Few),
        ("4", Few),
        (None, Few | None),
        ("null", Few | None),
        ([0.5], list[float] | Literal["balanced"]),
        ("[0.5]", list[float] | Literal["balanced"]),
        (0.5, Literal["a"] | float),
    ],
)
def test_choices_and_what_stands_beside_them_are_taken(value: object, annotation: Any) -> None:
    assert check_value(value, annotation, "it") == value


@pytest.mark.parametrize("value", [True, "true", 3, 4.0, None, "null", [1]])
def test_what_is_equal_and_of_another_type_is_no_choice(value: object) -> None:
    with pytest.raises(UnknownNameError, match=r"1, 2(, 4| or 4)\.( It was.*)?$"):
        check_value(value, Few, "it")


def test_a_script_may_give_any_object() -> None:
    model = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, depth=1)
    bank = vispeft.attach(model, vispeft.BitFit(), verify=False)
    with pytest.raises(UnknownNameError, match="leaner"):
        bank.memory = 3  # type: ignore[assignment]
    with pytest.raises(UnknownNameError, match="blocks"):
        bank.compile(None)  # type: ignore[arg-type]
