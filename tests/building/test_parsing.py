"""Errors of jsonargparse: the key in front, its text as it is, and the error of a class it made instead of its own."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from vispeft.building.methods import build_method
from vispeft.building.parsing import parser_errors
from vispeft.errors import ConfigError


class Inner:
    def __init__(self, rate: float = 0.0) -> None:
        if rate < 0:
            raise ConfigError(f"Inner(rate={rate}): it must not be negative.")


class Outer:
    def __init__(self, inner: Inner | None = None) -> None: ...


def parse(*arguments: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Outer, "outer")
    parser.instantiate(parser.parse_args([f"--outer.inner={__name__}.Inner", *arguments]))


@pytest.mark.parametrize("value", ["fast", "[1]"])
def test_the_key_stands_in_front_of_the_parsers_own_text(value):
    argument = f"--outer.inner.rate={value}"
    with pytest.raises(ArgumentError) as raw:
        parse(argument)
    with pytest.raises(ConfigError) as refused, parser_errors("some.yaml"):
        parse(argument)
    assert str(refused.value) == f"some.yaml: outer.inner.rate: the value cannot be used.\n{raw.value}"
    assert "float" in str(raw.value)


def test_an_error_without_a_key_is_handed_on():
    with pytest.raises(ConfigError) as refused, parser_errors("some.yaml"):
        raise ValueError("nothing fits\n")
    assert str(refused.value) == "some.yaml: the value cannot be used.\nnothing fits"


def test_the_error_of_a_class_comes_out_as_it_is():
    with pytest.raises(ConfigError, match=r"^Inner\(rate=-1\.0\): it must not be negative\.$"), parser_errors("a.yaml"):
        parse("--outer.inner.rate=-1")


def test_other_errors_pass():
    with pytest.raises(KeyError), parser_errors("some.yaml"):
        raise KeyError("a")


def test_a_field_of_a_method_is_named():
    with pytest.raises(ConfigError, match=r"^LoRA: method\.rank: the value cannot be used\.\n[^$]*Got value: x"):
        build_method({"class_path": "vispeft.LoRA", "init_args": {"rank": "x"}})
