"""Names on the command line that no file can have."""

import pytest

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
