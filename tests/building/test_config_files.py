"""Config files: read as they are written, or refused, and never waited for."""

import math
import os
import time

import pytest
import yaml
from jsonargparse import ArgumentParser

from vispeft.building.config_files import LARGEST, dump_config, parse_text, read_config
from vispeft.building.methods import method_node
from vispeft.building.parsing import MODE
from vispeft.errors import ConfigError, FileError

WRITTEN = {
    "0100": "0100",  # 64 in YAML 1.1
    "1:04": "1:04",
    "12:30:45.5": "12:30:45.5",
    "2024-01-01": "2024-01-01",  # a date
    "08": "08",
    "0o17": "0o17",
    "10": 10,
    "-0": 0,
    "0x10": 16,
    "1_000": 1000,
    "1e-3": 1e-3,
    "1e5": 1e5,
    "-.5": -0.5,
    "1.": 1.0,
    "-.inf": -math.inf,
    "e5": "e5",
    "'1e5'": "1e5",
    "yes": True,
    "~": None,
    "": None,
    "{a: [1, {b: c}]}": {"a": [1, {"b": "c"}]},
}


@pytest.mark.parametrize(("text", "value"), WRITTEN.items())
def test_values_are_read_as_they_are_written(text, value):
    found = parse_text(text, "a value")
    assert (found, type(found)) == (value, type(value))


LEVELS = (f"b{level}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]" for level in range(9))
BOMB = "\n".join(["a: &a0 [x, x, x, x, x, x, x, x, x]", *LEVELS])
REFUSED = {
    "a key twice": ("lr: 1\nlr: 2", "has the key 'lr' twice in one place \\(line 2\\)"),
    "a section twice": ("trainer: {a: 1}\nmodel: {}\ntrainer: {b: 1}", "has the key 'trainer' twice"),
    "a key twice inside": ("a: [{b: {c: 1, 'c': 2}}]", "has the key 'c' twice"),
    "growing aliases": (BOMB, "values once its aliases are written out"),
    "an endless alias": ("a: &a {b: *a}", "has an alias \\(\\*\\) inside of the value"),
    "deep brackets": ("a: " + "[" * 100_000, "nested more than 50 levels"),
    "deep keys": ("\n".join(" " * n + "a:" for n in range(500)), "nested more than 50 levels"),
    "a set": ("a: !!set {b}", "has a set"),
    "bytes": ("a: !!binary aGk=", "has a bytes"),
    "a long number": ("a: " + "1" * 10_000, "holds a value that cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_config_holds_is_refused_at_once(tmp_path, text, message):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        parse_text(text, "The value")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"a.yaml.* {message}"):
        read_config(tmp_path / "a.yaml")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.getcwd []", "{", "? [a]\n: 1", "\x00", "a: *b", "a: b: c"]
)
def test_what_is_no_yaml_is_said(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(FileError, match=r"a\.yaml' is no valid YAML"):
        read_config(tmp_path / "a.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes.")
def test_only_regular_files_of_a_config_s_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_text("a: " + "x" * LARGEST)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    for name, message in (
        ("pipe", "it is no regular file"),
        ("zero", "it is no regular file"),
        ("folder", "could not be read"),
        ("large", "a config has at most 262,144"),
        ("latin", "could not be read"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(FileError, match=message):
            read_config(tmp_path / f"{name}.yaml")


def test_values_are_written_so_that_every_reader_finds_the_same():
    texts = ["0100", "1e5", "1e-3", "1:04", "yes", "null", "2024-01-01", "a: b", "", "[a]", "é", "-", "{class_path: x}"]
    tree = {"names": texts, "again": {"number": 1e-5, "whole": 10**20, "none": None, "1": texts}}
    for text in (dump_config(tree), dump_config(tree, one_line=True)):
        assert parse_text(text, "it") == tree
        assert yaml.safe_load(text) == tree
    assert dump_config(tree, one_line=True).count("\n") == 0
    parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--names", type=list[str])
    parsed = parser.parse_object({"names": texts})
    assert parse_text(parser.dump(parsed), "it") == {"names": texts}


def test_presets_that_name_each_other_are_no_method(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"class_path: {tmp_path / other}.yaml")
    with pytest.raises(ConfigError, match="name each other, and no method"):
        method_node(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError, match="fields with values are needed"):
        method_node({"class_path": "lora", "init_args": [1]})
