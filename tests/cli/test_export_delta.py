"""Differences of weights: exact for every method that changes weights, and refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vispeft
from tests.conformance.cells import METHODS, move
from tests.tiny import TINY
from vispeft.cli.export_delta import added, difference_of, export_delta
from vispeft.errors import MergeError
from vispeft.tasks import Classification

WEIGHTS = (
    "svfit",
    "svfit_few",
    "bone",
    "bat",
    "mask",
    "sparse",
    "sparse_lift",
    "pst",
    "snell",
    "snella",
    "mos",
    "mlae",
)


def task_of(method: vispeft.Method, **backbone: Any) -> Classification:
    torch.manual_seed(0)
    return Classification(
        backbone="vit_tiny_patch16_224", num_classes=3, method=method, backbone_args={**TINY, **backbone}
    )


@pytest.mark.parametrize(
    "name", [name if name in ("svfit", "mask") else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS]
)
def test_frozen_weights_and_differences_are_the_merged_weights(name: str, tmp_path: Path) -> None:
    task = task_of(METHODS[name])
    move(task.bank, "default")
    base = {key: tensor.detach().clone() for key, tensor in task.bank.base_tensors()}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    task.eval()
    with torch.no_grad():
        wanted = task.model(images)
    info = export_delta(task, tmp_path / "model.delta.safetensors")
    found = load_file(tmp_path / "model.delta.safetensors")
    assert json.loads((tmp_path / "model.delta.json").read_text())["added"] == info["added"]
    assert set(info["added"]) <= set(base)
    merged = task.model.state_dict()
    for key, tensor in base.items():
        assert torch.equal(added(tensor, found[key]) if key in found else tensor, merged[key]), key
    plain = vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    head = {key.replace("head/", "head."): tensor for key, tensor in found.items() if key.startswith("head/")}
    plain.load_state_dict({**{k: added(t, found[k]) if k in found else t for k, t in base.items()}, **head})
    with torch.no_grad():
        error = (plain.eval()(images) - wanted).abs().max() / wanted.abs().max()
    assert error <= 1e-5


def test_a_difference_that_float32_cannot_hold_is_kept_in_float64() -> None:
    before, after = torch.tensor([1.0, 2.0]), torch.tensor([1e-8, 2.5])
    assert not torch.equal(before + (after - before), after)
    delta = difference_of(before, after)
    assert delta.dtype == torch.float64
    assert torch.equal(added(before, delta), after)
    assert difference_of(before, before + 0.5).dtype == torch.float32


def test_merges_that_are_no_sum_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"no plain layer"):
        export_delta(task_of(vispeft.Adapter()), tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match=r"makes or removes tensors.*vispeft merge"):
        export_delta(task_of(vispeft.SSF(), qkv_bias=False), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_options_for_images_are_refused(run_cli: Any, tmp_path: Path) -> None:
    for options in (["--batch", "2"], ["--size", "8", "8"], ["--any_size"]):
        result = run_cli("export", tmp_path, "--format", "delta", "--out", tmp_path / "a.safetensors", *options)
        assert result.status
        assert "Leave it out" in result.err
