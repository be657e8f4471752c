"""Figures of single-task models: where they come from, and whether they may be compared."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.tasks.dense_toy import TARGETS, ToyTasks, squares
from vispeft.data.dense_targets import IGNORE
from vispeft.errors import DataError
from vispeft.tasks import MultiTaskDense
from vispeft.tasks.baselines import Baselines, compared, read_baselines

FACTS = {"data": "ToyTasks", "size": [32, 32], "images": 8, "names": "ab", "contents": "cd", "absent": "zero"}


def run_of(folder: Path, task: str = "depth", **metrics: Any) -> str:
    """Write the figures of a run that measured a task."""
    figures = {f"{task}/rmse": 2.0, f"{task}/miou": 0.5}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"validation": figures, "test": figures, **metrics}))
    return str(folder)


def measured(**other: Any) -> dict[str, Any]:
    return {"depth": {split: {**FACTS, **other} for split in ("validation", "test")}}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"size": [128, 96]}, "images of 128 x 96 pixels there and 32 x 32 here"),
        ({"images": 6, "names": "x", "contents": "y"}, "6 validation images there and 8 here; 6 test images there"),
        ({"names": "x", "contents": "y"}, "other validation images; other test images"),
        ({"names": "x", "contents": None}, "other validation images; other test images"),
        ({"contents": "y"}, "other pixels or labels of the validation images"),
        ({"data": "{Other}", "contents": None}, "data of {Other} there and of ToyTasks here"),
        ({"absent": "skip"}, "absent classes by 'skip' there and 'zero' here"),
    ],
)
def test_a_run_that_measured_something_else_is_refused(tmp_path: Path, there: dict[str, Any], says: str) -> None:
    run = run_of(tmp_path, measured_on=measured(**there))
    found = read_baselines(run, {"depth": "rmse"})
    with pytest.raises(DataError) as error:
        compared(found, measured())
    assert f"{run} (depth): {says}" in str(error.value)
    assert "Train the single-task models on these data, or give their figures" in str(error.value)


@pytest.mark.parametrize(
    "there",
    [{}, {"data": "Other", "names": "x"}, {"contents": None}, {"names": None, "contents": None}, {"unheard": 1}],
    ids=["equal", "the same files elsewhere", "only headers", "own data", "of a later version"],
)
def test_what_measured_the_same_passes(tmp_path: Path, there: dict[str, Any]) -> None:
    found = read_baselines(run_of(tmp_path, measured_on=measured(**there)), {"depth": "rmse"})
    assert compared(found, measured()) == (found, [])


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    old = read_baselines({"depth": run_of(tmp_path / "old"), "parts": 0.5}, {"depth": "rmse", "parts": "miou"})
    for found, here in (
        (old, measured()),
        (read_baselines(run_of(tmp_path / "new", measured_on=measured()), {"depth": "rmse"}), {}),
        (read_baselines(run_of(tmp_path / "odd", measured_on={"depth": 3}), {"depth": "rmse"}), measured()),
    ):
        same, (said,) = compared(found, here)
        assert same is found
        assert "is not known" in said
        assert f"{found.runs['depth']} (depth)" in said
    assert compared(read_baselines({"depth": 2.0}, {"depth": "rmse"}), measured())[1] == []
    part = read_baselines(run_of(tmp_path / "part", measured_on=measured(measured=4)), {"depth": "rmse"})
    _, said = compared(part, measured())
    assert "measured 4 of 8 images of the validation split" in said[0]
    assert len(said) == 2


def test_a_run_is_measured_again_with_its_own_baselines_or_none() -> None:
    figures = {"validation": {"depth": 1.5}, "test": {"depth": 2.0}}
    found = Baselines.recall("runs/1", {"baselines": figures, "measured_on": measured()})
    assert found.figures == figures
    assert compared(found, measured()) == (found, [])
    none, (said,) = compared(found, measured(size=[64, 64]))
    assert not none
    assert "delta m is left out" in said
    assert "32 x 32 pixels there and 64 x 64 here" in said
    for odd in (None, {}, {"test": None}, {"test": {"depth": None}}, 3):
        assert not Baselines.recall("runs/1", {"baselines": odd}).of("test")


@pytest.fixture(scope="module")
def task() -> MultiTaskDense:
    targets = {name: TARGETS[name] for name in ("depth", "sal")}
    return MultiTaskDense(
        backbone="vit_tiny_patch16_224",
        backbone_args={"pretrained": False, "img_size": 32, "patch_size": 16, "embed_dim": 8, "num_heads": 1},
        method=vispeft.LinearProbe(), shared=True, targets=targets, decoder="linear", taps=[3],
        baselines={"depth": 4.0, "sal": 0.5},
    )  # fmt: skip


def fitting(task: nn.Module, **settings: Any) -> ToyTasks:
    return ToyTasks.for_model(task.model, tasks=["depth", "sal"], batch_size=4, **settings)


def test_data_of_another_size_are_refused_before_training(task: MultiTaskDense, tmp_path: Path) -> None:
    data, before = fitting(task), task.baselines
    facts = {"depth": {split: data.measured_on(split, "depth") for split in ("validation", "test")}}
    assert facts["depth"]["test"] == {"data": "ToyTasks", "size": [32, 32], "images": 8}
    task.check_data(data)  # figures that were given count as they are
    run = run_of(tmp_path, measured_on=facts)
    task.baselines = read_baselines({"depth": run, "sal": 0.5}, {"depth": "rmse", "sal": "miou"})
    task.check_data(data)
    with pytest.raises(DataError, match=r"32 x 32 pixels there and 64 x 64 here"):
        task.check_data(fitting(task, image_size=64))
    with pytest.raises(DataError, match="8 validation images there and 6 here"):
        task.check_data(fitting(task, count=6))
    task.baselines = before


def test_means_say_which_tasks_they_leave_out(task: MultiTaskDense, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = squares(2, 32, 0)
    labels = {name: labels[name] for name in task.targets}
    labels["sal"].fill_(IGNORE)
    found: dict[str, dict[str, Tensor]] = {}
    for split in ("validation", "test"):
        task.outputs_seen.reset()
        task.reset_metrics(split)
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            task.eval().measure(split, images, labels)
            found[split] = task.figures(split)
    gain = 100 * (4.0 - float(found["test"]["depth/rmse"])) / 4.0
    assert float(found["test"]["delta_m"]) == pytest.approx(gain, rel=1e-5)
    says = "No pixel of the test split has a label of sal: score and delta_m are means over 1 other task."
    assert says in caplog.text
    table = task.shown(
        {split: {name: float(v) if v == v else None for name, v in row.items()} for split, row in found.items()}
    )
    assert {"delta_m (validation without sal; test without sal)", "depth/rmse"} <= set(table)
    assert "delta_m" not in table
    details = task.details("test", {}, ())
    assert details["left_out"] == {"validation": ["sal"], "test": ["sal"]}
    full = task.shown({"test": {"depth/rmse": 1.0, "sal/miou": 0.5, "delta_m": 3.0}})
    assert full["delta_m"] == {"test": 3.0}
    assert full["depth/rmse"] == {"test": 1.0, "baseline": 4.0}
