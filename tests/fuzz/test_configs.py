"""Hostile configs: classes planted at any depth, wrong types, odd values, broken text."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.common import cases, outcome
from tests.tiny import CONFIG
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method, method_node
from vispeft.cli import config as building
from vispeft.cli.config_keys import check_config, split_overrides

TREE = yaml.safe_load(CONFIG)
TREE["trainer"].update({"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "validation/loss"}}]})
NAMES = [
    "os.system",
    "antigravity.x",
    "planted.Thing",
    "subprocess.Popen",
    "builtins.eval",
    "LambdaCallback",
    "Path",
    "x",
]

numbers = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 0.0, -1.5, 1e39, 1e-320, float("inf"), float("nan")])
texts = st.sampled_from(["", "0100", "1:04", "null", "yes", "[", "{a", "a: b", "\ud800", "\x00", "x" * 300, "*a"])
planted = st.builds(
    lambda name, key, arguments: {key: name, "init_args": arguments},
    st.sampled_from(NAMES),
    st.sampled_from(["class_path", "class_path", "class_path", "type", "_target_"]),
    st.sampled_from([{}, {"command": "touch MARKER"}, {"args": ["ls"]}, [], None, "x"]),
)
as_text = planted.map(lambda node: yaml.safe_dump(node, default_flow_style=True, width=10**6).strip())
leaves = st.one_of(numbers, texts, planted, as_text, st.none(), st.booleans(), st.sampled_from(NAMES))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(["x", "init_args"]), inner),
    max_leaves=6,
)


def places(tree, above=()):
    """List the keys of a config, and a new one in every section."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))
    if isinstance(tree, dict):
        yield (*above, "class_path" if above[-1:] == ("backbone_args",) else "new")


SETTINGS = [
    ("trainer", name)
    for name in ("logger", "plugins", "strategy", "profiler", "accelerator", "precision", "max_time", "devices")
]
DATA = [
    ("data", "init_args", name) for name in ("image_size", "augment", "target", "validation", "num_workers", "mean")
]
TASK_NAMES = ("optimizer", "lr", "weights", "class_weights", "schedule", "ema", "backbone_args", "backbone", "method")
TASK = [("model", "init_args", name) for name in TASK_NAMES]
TOP = [("seed_everything",), ("init",), ("checkpoints",), ("cache_features",), ("model", "dict_kwargs")]
PLACES = [*places(TREE), *SETTINGS, *DATA, *TASK, *TOP]


def changed(changes):
    """Return the config with values set at places."""
    tree = copy.deepcopy(TREE)
    for path, value in changes:
        node = tree
        for key in path[:-1]:
            node = node[key] if isinstance(node, dict) and isinstance(node.get(key), dict | list) else node
            if isinstance(node, list):
                node = node[0] if node else {}
        if isinstance(node, dict):
            node[path[-1]] = copy.deepcopy(value)
    return tree


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module and files whose names values may have."""
    (tmp_path / "planted.py").write_text("open('MARKER', 'w')")
    for name in ("auto", "cpu", "x", "x.yaml"):
        (tmp_path / name).write_text("class_path: os.system\ninit_args: {command: touch MARKER}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@cases(60)
@given(st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=2))
def test_a_config_with_hostile_values_is_checked(folder, changes):
    def case():
        check_config(changed(changes), [], "a.yaml")

    outcome(case, folder)


@cases(25)
@given(st.lists(st.tuples(st.sampled_from([*SETTINGS, *DATA]), values), min_size=1, max_size=2))
def test_data_with_hostile_settings_are_made_or_refused(folder, changes):
    def case():
        tree = changed(changes)
        building.build_data(tree["data"], [], "a.yaml")

    outcome(case, folder)


@cases(15)
@given(st.lists(st.tuples(st.sampled_from(TASK), values), min_size=1, max_size=2))
@example([(("model", "init_args", "lr"), "*a")])  # no YAML at all
@example([(("model", "init_args", "lr"), "\x00")])
@example([(("model", "init_args", "lr"), "[")])
def test_tasks_with_hostile_settings_are_made_or_refused(folder, changes):
    def case():
        building.build_task(changed(changes)["model"], 10, "a.yaml")

    outcome(case, folder)


@cases(40)
@given(st.sampled_from(PLACES), st.one_of(texts, as_text, values.map(str)))
def test_hostile_overrides_are_checked(folder, path, value):
    def case():
        key = ".".join(str(part) for part in path)
        check_config(copy.deepcopy(TREE), split_overrides([f"--{key}={value}"]), "a.yaml")

    outcome(case, folder)


@cases(30)
@given(
    st.sampled_from(["lora", "ssf", "vpt", "fact_tk", "LST"]), st.sampled_from(["rank", "roles", "blocks", "x"]), values
)
def test_methods_with_hostile_fields_are_made_or_refused(folder, name, key, value):
    def case():
        build_method(method_node({"class_path": name, "init_args": {key: copy.deepcopy(value)}}))

    outcome(case, folder)


@cases(60)
@given(st.binary(max_size=60) | st.tuples(st.integers(0, len(CONFIG)), st.text("{}[]&*!?|>:- \n\t'\"a0", max_size=9)))
def test_files_that_are_no_configs_are_refused(folder, content):
    if isinstance(content, tuple):
        at, text = content
        content = (CONFIG[:at] + text + CONFIG[at:]).encode()

    def case():
        path = Path("broken.yaml")
        path.write_bytes(content)
        try:
            check_config(read_config(path), [], str(path))
        finally:
            path.unlink()

    outcome(case, folder)


def test_the_driver_notices_what_is_forbidden(folder):
    import subprocess

    with pytest.raises(AssertionError, match="Popen"):
        outcome(lambda: _silently(subprocess.run, ["true"]), folder)
    with pytest.raises(AssertionError, match="left files behind"):
        outcome(lambda: Path("MARKER").write_text(""), folder)
    with pytest.raises(AssertionError, match="imported"):
        outcome(lambda: __import__("planted"), folder)
    with pytest.raises(KeyError):
        outcome(lambda: {}["a"], folder)


def _silently(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return
