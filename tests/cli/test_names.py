"""Names on the command line that no file can have."""

import pytest

from vispeft.cli.settings import check_names
from vispeft.errors import DataError

LONG = "x" * 300
CASES = {
    "resume": ("train", "--resume", LONG),
    "config": ("train", LONG),
    "config.yaml": ("train", f"{LONG}.yaml"),
    "init": ("train", "tiny.yaml", "--init", LONG),
    "weights": ("train", "tiny.yaml", "--model.weights", LONG),
    "backbone": ("train", "tiny.yaml", "--model.backbone", f"local-dir:{LONG}"),
    "out": ("train", "tiny.yaml", "--out", LONG),
    "folds": ("train", "tiny.yaml", "--folds", "2", "--out", LONG),
    "method": ("train", "tiny.yaml", "--method", f"{LONG}.yaml"),
    "evaluate": ("evaluate", LONG),
    "merge": ("merge", LONG, "--out", "a.safetensors"),
    "predict": ("predict", LONG, LONG, "--out", "a"),
    "embed": ("embed", LONG, LONG, "--out", "a"),
    "search": ("search", LONG, LONG),
    "export": ("export", LONG, "--out", "a.onnx"),
    "inspect": ("inspect", "vit_tiny_patch16_224", f"{LONG}.yaml"),
    "select_features": ("select_features", LONG, LONG, "--out", "a"),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_name_that_is_too_long_is_refused_in_one_sentence(run_cli, config, monkeypatch, arguments):
    monkeypatch.chdir(config.parent)
    result = run_cli(*arguments)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert list(config.parent.iterdir()) == [config]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a", "a"), r"class_names has 'a' twice"),
        (("a\x07", "b"), r"class_names\[0\] is 'a\\x07'; a text without control characters"),
        (("a", "\ud800"), r"class name '\\ud800' is no UTF-8"),
    ],
)
def test_names_that_no_adapter_can_hold_are_refused_before_the_training(names, told):
    with pytest.raises(DataError, match=told):
        check_names(names)
