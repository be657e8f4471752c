"""Token merging by config and by option: trained with, measured with and without, predicted and embedded."""

import csv
import json
import re

import pytest
import torch
import yaml
from PIL import Image

from tests.tiny import CONFIG
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.core.token_merging import TokenMerging
from vispeft.errors import VispeftError

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return folder


def test_the_section_of_a_config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    cli = ConfigCLI(path, ["--token_merging.r", "[1, 0]", "--token_merging.proportional_attention=false"])
    cli.prepare_model()
    assert cli.model.bank.token_merging == TokenMerging([1, 0], proportional_attention=False)
    assert yaml.safe_load(cli.resolved())["token_merging"]["r"] == [1, 0]
    with torch.no_grad():
        assert cli.model.model.run(torch.randn(1, 3, 16, 16)).tokens.shape[1] == 4
    path.write_text(f"{CONFIG}token_merging: {{r: 1}}\n")
    cli = ConfigCLI(path, [])
    cli.prepare_model()
    assert cli.model.bank.token_merging == TokenMerging(1)
    for override, said in (("r=-1", "whole number"), ("rr=1", "rr"), ("inflection=3", "between -1 and 1")):
        with pytest.raises(VispeftError, match=said):
            ConfigCLI(path, [f"--token_merging.{override}"])


@pytest.mark.slow
def test_a_run_that_merges(finished, run_cli, images, tmp_path):
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    assert tree["token_merging"] == {"r": 0, "inflection": 0.0, "proportional_attention": True}
    config = tmp_path / "config.yaml"
    tree["token_merging"]["r"] = 1
    config.write_text(yaml.safe_dump(tree))
    out = tmp_path / "run"
    assert run_cli("train", config, "--out", out, *SHORT).status == 0
    task, _ = load_task(Run.open(out))
    assert task.bank.token_merging.r == 1
    measured = run_cli("evaluate", out)
    assert measured.status == 0, measured.err
    assert json.loads((out / "metrics.json").read_text())
    exported = run_cli("merge", out, "--out", tmp_path / "plain.safetensors")
    assert exported.status == 0, exported.err
    assert "without its token merging" in exported.out
    assert run_cli("evaluate", out, "--token_merging", "off").status == 0


@pytest.mark.slow
def test_at_prediction_only(finished, run_cli, images, tmp_path):
    rows = {}
    for name, option in (("plain", ()), ("none", ("--token_merging", "off")), ("merged", ("--token-merging", "1"))):
        found = run_cli("predict", finished, images, "--out", tmp_path / name, *option)
        assert found.status == 0, found.err
        with (tmp_path / name / "predictions.csv").open(newline="") as file:
            rows[name] = list(csv.reader(file))
    assert rows["plain"] == rows["none"]
    assert rows["plain"] != rows["merged"]
    found = run_cli("embed", finished, images, "--out", tmp_path / "index", "--token_merging", "1")
    assert found.status == 0, found.err
    described = json.loads((tmp_path / "index" / "index.json").read_text())
    assert described["model"]["token_merging"]["r"] == 1
    found = run_cli("search", tmp_path / "index", images / "0.png")
    assert found.status == 0, found.err
    assert set(re.findall(r"images\d*/(\d)", found.out)) == {"0", "1", "2"}, found.out  # the query, and the others


@pytest.mark.slow
def test_bad_values(finished, run_cli, images, tmp_path):
    for option, said in (
        (("--token_merging", "x"), "give a number of tokens such as 8"),
        (("--token_merging", "1,1,1"), "the model has 2"),
    ):
        found = run_cli("predict", finished, images, "--out", tmp_path / "out", *option)
        assert found.status == 2
        assert said in found.err
    found = run_cli("train", finished / "config.yaml", "--token_merging.r", "-1", "--out", tmp_path / "run")
    assert found.status == 2
    assert "a whole number from 0 on" in found.err
    found = run_cli("train", finished / "config.yaml", "--token_merging.rr", "1", "--out", tmp_path / "run")
    assert found.status == 2
    assert "rr" in found.err
