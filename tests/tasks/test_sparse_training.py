"""Choices of entries in a task's training: from its loader, by schedules, with EMA, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vispeft
from tests.tasks.test_hooks import make, trainer
from tests.tasks.test_resume import DATA, Killed, check_equal, fit
from tests.tasks.test_resume import make as make_digits
from vispeft.data import DigitsData
from vispeft.methods.sparse import SparseUnit
from vispeft.tasks import Classification

LT = vispeft.Sparse(budget=192, schedule="lt", dense_lr=1e-3)
GPS = vispeft.Sparse(budget="row:1", support="gps", everywhere=True)
LIFT = vispeft.Sparse(budget=0.05, support="lift", principal=2, schedule="lift", interval=3)


def units(task: Any) -> list[SparseUnit]:
    return [unit for unit in task.bank.units().values() if isinstance(unit, SparseUnit)]


def trained(method: vispeft.Method, **settings: Any) -> Any:
    task, data = make("classification", method, **settings)
    trainer(max_epochs=1).fit(task, datamodule=data)
    return task


def test_lt_trains_the_entries_that_change_most_over_all_layers() -> None:
    task = trained(LT, ema=0.5)
    found = [unit.values for unit in units(task)]
    assert 192 <= sum(len(values) for values in found) == task.bank.report().trainable <= 192 + len(found)
    assert len({len(values) for values in found}) > 3  # they are not the shares of the sizes
    assert sum(int((values != 0).sum()) for values in found) > 180


def test_gps_chooses_in_each_row_from_the_loader() -> None:
    before = [unit.positions for unit in units(make("classification", GPS)[0])]
    one, two = trained(GPS), trained(GPS)
    for unit, again, random in zip(units(one), units(two), before, strict=True):
        rows = unit.positions.long() // unit.site.columns
        assert torch.equal(rows, torch.arange(unit.site.out_features))
        assert torch.equal(unit.positions, again.positions)  # by the seed
        assert (unit.positions == random).float().mean() < 0.5
        assert (unit.values != 0).any()
    biases = {name for name in one.bank.named_tensors() if "/whole." in name}
    assert "blocks.0.attn.qkv/whole.bias" in biases
    assert not [name for name in biases if "norm" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [(LT, {"ema": 0.9}), (LT, {"optimizer": "SM3"}), (GPS, {"ema": 0.9}), (LIFT, {})],
    ids=["lt", "lt-sm3", "gps", "lift"],
)
def test_a_resumed_training_ends_as_one_that_was_not_stopped(
    method: vispeft.Method, settings: dict[str, Any], tmp_path: Path
) -> None:
    def task() -> Any:
        return make_digits(Classification, method=method, **settings)

    data = {"max_epochs": 2, "data": DigitsData(**DATA)}
    fit(tmp_path / "whole", task(), **data)
    stopped = task()
    step, calls = type(stopped).training_step, []

    def killed(self: Any, batch: Any, batch_idx: int) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stopped), "training_step", killed)
        fit(tmp_path / "parts", stopped, **data)
    fit(tmp_path / "parts", task(), **data)
    check_equal(tmp_path / "whole", tmp_path / "parts")
