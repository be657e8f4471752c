"""`vispeft inspect --plots`: pictures of the inside of a run, with its data or with images of one's own."""

import numpy as np
import pytest
from PIL import Image


def names(folder):
    return sorted(path.name for path in folder.iterdir())


EVERY = ["attention.png", "embeddings.png", "embeddings_frozen.png", "shift.png"]


def test_a_run_is_looked_into(finished, run_cli, tmp_path):
    result = run_cli("inspect", finished, "--plots", tmp_path / "inside")
    assert result.status == 0, result.err
    assert names(tmp_path / "inside") == EVERY
    assert [line.rpartition("/")[2] for line in result.out.split()] == [
        "attention.png", "shift.png", "embeddings.png", "embeddings_frozen.png",
    ]  # fmt: skip
    frozen, adapted = (tmp_path / "inside" / name for name in ("embeddings_frozen.png", "embeddings.png"))
    assert frozen.read_bytes() != adapted.read_bytes()
    again = run_cli("inspect", finished, "--plots", tmp_path / "inside")
    assert "is not empty, and nothing in it is overwritten" in again.err


def test_a_config_and_images_of_ones_own(config, finished, run_cli, tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    vpt = ("--model.method", "vispeft.VPT", "--model.method.num_tokens=2")
    result = run_cli("inspect", config, "--plots", tmp_path / "inside", *vpt, "--images", tmp_path / "a.png")
    assert result.status == 0, result.err
    assert names(tmp_path / "inside") == ["attention.png", "prompts.png", "shift.png"]
    result = run_cli("inspect", finished, "--plots", tmp_path / "own", "--images", tmp_path / "a.png")
    assert result.status == 0, result.err
    assert names(tmp_path / "own") == ["attention.png", "shift.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ssf", "--plots", "x"), "takes a run or a config alone, and ssf was given too"),
        (("--plots", "x", "--memory"), "takes a run or a config alone, and --memory was given too"),
        (("--images", "x"), "--images was given without --plots"),
        (("--plots", "x", "--images", "x", "--data.batch_size", "2"), "with --images, which replaces the data"),
    ],
)
def test_what_does_not_fit_together_is_refused(finished, run_cli, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run_cli("inspect", finished, *arguments)
    assert result.status == 2
    assert message in result.err
