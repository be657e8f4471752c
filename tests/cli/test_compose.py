"""`vispeft compose` and `vispeft port`: adapters of the zoo, as a user would do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vispeft
from vispeft.cli.compose import _with_negative_weights
from vispeft.cli.made_runs import _label
from vispeft.cli.main import run_command
from vispeft.zoo.adapters import find_adapter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: Any) -> tuple[int, str, str]:
        status = run_command(str(argv[0]), [str(argument) for argument in argv[1:]])
        told = capsys.readouterr()
        return status, " ".join(told.out.split()), " ".join(told.err.split())

    return call


def test_names_and_numbers_of_a_command_line() -> None:
    assert _label("zoo:digits_lora", []) == "from_digits_lora"
    assert _label("runs/digits_lora/1", []) == "from_digits_lora_1"
    assert _label("../runs/ä b/1/", ["from___b_1"]) == "from___b_1_2"
    assert _with_negative_weights(["--weights", "1", "-0.5", "-1e-3", "--head"]) == [
        "--weights",
        "1",
        " -0.5",
        " -1e-3",
        "--head",
    ]


def test_bad_command_lines_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for words, told in (
        (("compose", tmp_path / "new", "zoo:nobody"), "Unknown adapter of the zoo 'nobody'"),
        (("compose", tmp_path / "new", tmp_path / "there"), "There is no adapter in"),
        (("compose", tmp_path / "there", "zoo:digits_lora"), "exists already"),
        (("compose", tmp_path / "new", "zoo:digits_lora", "--head", "zoo:digits_ssf"), "Unknown adapter for --head"),
        (("compose", tmp_path / "new", "zoo:digits_lora", "--how", "mean"), "invalid choice"),
        (("port", tmp_path / "new", "zoo:digits_lora"), "Name the new backbone"),
        (("port", tmp_path / "new", "zoo:digits_lora", "--weights", "w", "--refit", "0"), "at least 1"),
    ):
        status, _, err = run(*words)
        assert (status, told in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_a_composed_adapter_is_taken_by_the_commands(run: Run, tmp_path: Path) -> None:
    out, given = tmp_path / "both", ("zoo:digits_lora", "zoo:digits_ssf")
    status, said, err = run("compose", out, *given, "--how", "sum", "--weights", "1", "0", "--head", given[0])
    assert status == 0, err
    assert "held as full, with the classifier of zoo:digits_lora." in said.replace("\n", " ")
    made_of = json.loads((out / "adapter.json").read_text())["made_of"]
    assert [part["source"] for part in made_of["parts"]] == list(given)
    assert [part["weight"] for part in made_of["parts"]] == [1.0, 0.0]
    assert all(len(part["digest"]) == len(part["file_digest"]) == 64 for part in made_of["parts"])
    figures = json.loads((out / "metrics.json").read_text())
    own = json.loads((find_adapter(given[0]) / "metrics.json").read_text())
    assert figures["test"]["accuracy"] == pytest.approx(own["test"]["accuracy"], abs=0.01)  # the weights are 1 and 0
    status, said, err = run("evaluate", out)
    assert status == 0, err
    images = vispeft.create_model("zoo:vit_tiny", num_classes=0)
    vispeft.load(images, out)
    assert run("merge", out, "--out", tmp_path / "plain.safetensors")[0] == 0
    for other, told in (
        ("zoo:digits_vpt", "is no change of weights"),
        ("zoo:earth_lora", "Name the one to keep"),
        ("zoo:digits_swin_lora", "another backbone"),
    ):
        status, _, err = run("compose", tmp_path / "bad", given[0], other)
        assert (status, told in err) == (2, True), err
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_an_adapter_is_ported_with_its_run(run: Run, tmp_path: Path) -> None:
    model = vispeft.create_model("zoo:vit_tiny", num_classes=0)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file({key: 1.01 * tensor for key, tensor in weights.items()}, tmp_path / "near.safetensors")
    save_file(
        {key: tensor + 0.2 * torch.randn_like(tensor) for key, tensor in weights.items()}, tmp_path / "far.safetensors"
    )
    out = tmp_path / "ported"
    status, said, err = run("port", out, "zoo:digits_lora", "--weights", tmp_path / "near.safetensors", "--refit", 2)
    assert status == 0, err
    assert "drift is 1.00 %" in said
    assert "fitted anew on 2 batches" in said
    assert json.loads((out / "metrics.json").read_text())["test"]["accuracy"] > 0.8
    status, _, err = run("port", tmp_path / "no", "zoo:digits_lora", "--weights", tmp_path / "far.safetensors")
    assert (status, "--allow-drift" in err) == (2, True)
    assert not (tmp_path / "no").exists()
