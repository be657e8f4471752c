"""Tasks that come, go, get another name, or train alone, in adapters with branches and with one copy per task."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.plan import make_plan
from vispeft.errors import ConfigError, UnknownNameError

FOUR = ("seg", "parts", "sal", "normals")
METHODS: dict[str, Any] = {
    "matrix": (vispeft.MTLoRA(rank=3, task_rank=2), "swin"),
    "matrixv2": (vispeft.MTLoRA(rank=3, task_rank=2, mode="matrixv2"), "vit"),
    "copies": (vispeft.LoRA(rank=2), "vit"),
    "shared_copies": (vispeft.FacT(rank=2, dropout=0.0), "vit"),
}


def adapted(name: str, tasks: Any = FOUR) -> tuple[Any, Tensor, vispeft.AdapterBank]:
    method, backbone = METHODS[name]
    cell = Cell("lora", backbone)
    model = cell.model()
    bank = vispeft.attach(model, method, tasks=list(tasks), verify=False)
    move(bank, "default")
    return model, cell.images(), bank


def maps_of(model: Any, images: Tensor, tasks: Any = None) -> dict[str, list[Tensor]]:
    with torch.no_grad():
        return vispeft.forward_tasks(model.eval(), images, tasks)


def assert_equal(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
    for task, levels in wanted.items():
        assert all(map(torch.equal, found[task], levels)), task


def train(model: Any, images: Tensor, bank: vispeft.AdapterBank, task: str) -> None:
    """Take two steps that would change everything that may change: dropout and decay are on."""
    optimiser = torch.optim.AdamW(bank.parameter_groups(1e-2, 0.5))
    for _ in range(2):
        optimiser.zero_grad()
        maps = vispeft.forward_tasks(model.train(), images, [task])
        torch.stack([level.square().mean() for level in maps[task]]).sum().backward()
        optimiser.step()


@pytest.mark.parametrize(
    "name", ["matrix", "copies", *(pytest.param(n, marks=pytest.mark.slow) for n in ("matrixv2", "shared_copies"))]
)
def test_a_fifth_task_is_added_and_trained_beside_four(name: str, tmp_path: Path) -> None:
    model, images, bank = adapted(name)
    wanted, before = maps_of(model, images), dict(bank.named_tensors())
    bank.add_task("edge")
    assert bank.tasks() == [*FOUR, "edge"]
    assert all(bank.named_tensors()[key] is tensor for key, tensor in before.items())
    assert_equal(maps_of(model, images), wanted)
    started = maps_of(model, images)["edge"]
    new = {key for key in bank.named_tensors() if "@edge" in key}
    assert {id(t) for _, t in bank.trainable_parameters()} == {id(bank.named_tensors()[key]) for key in new}
    train(model, images, bank, "edge")
    found = maps_of(model, images)
    assert_equal(found, wanted)
    assert not torch.equal(found["edge"][-1], started[-1])
    bank.save(tmp_path)
    again = Cell("lora", METHODS[name][1]).model()
    loaded = vispeft.load(again, tmp_path)
    assert loaded.tasks() == bank.tasks()
    assert list(loaded.named_tensors()) == list(bank.named_tensors())
    assert_equal(maps_of(again, images), found)
    bank.unfreeze("default")
    assert {id(t) for _, t in bank.trainable_parameters()} == {id(t) for t in bank.named_tensors().values()}


@pytest.mark.parametrize("name", ["matrix", "copies"])
def test_a_task_goes_and_another_gets_a_new_name(name: str) -> None:
    model, images, bank = adapted(name)
    wanted = maps_of(model, images)
    bank.set_active("default", task="sal")
    bank.rename_task("sal", "saliency")
    assert (bank.task, bank.tasks()) == ("saliency", ["seg", "parts", "saliency", "normals"])
    bank.drop_task("parts")
    assert (bank.task, bank.tasks()) == ("saliency", ["seg", "saliency", "normals"])
    found = maps_of(model, images)
    assert list(found) == bank.tasks()
    assert_equal(found, {"seg": wanted["seg"], "saliency": wanted["sal"], "normals": wanted["normals"]})
    assert not [key for key in model.state_dict() if "parts" in key or "@sal." in key]
    assert bank.report().trainable == vispeft.plan(
        Cell("lora", METHODS[name][1]).model(), bank.plan().method
    ).trainable * (1 if bank.plan().method.multi_task else 3)
    bank.drop_task("saliency")
    assert bank.task is None
    bank.detach("default")
    assert not [key for key in model.state_dict() if "adapters" in key]


def test_ranks_of_single_tasks_follow_their_names() -> None:
    cell = Cell("lora", "swin")
    bank = vispeft.attach(
        cell.model(), vispeft.MTLoRA(tasks=("seg", "depth"), rank=2, task_rank={"seg": 2, "depth": 1}), verify=False
    )
    bank.rename_task("seg", "climate")
    assert bank.plan().method.task_rank == {"climate": 2, "depth": 1}
    with pytest.raises(ConfigError, match="one entry for each task"):
        bank.add_task("edge")
    with pytest.raises(ConfigError, match="differs in its tasks alone"):
        bank.add_task("edge", method=vispeft.MTLoRA(tasks=("climate", "depth", "edge"), rank=3))
    ranks = {"climate": 2, "depth": 1, "edge": 3}
    bank.add_task("edge", method=vispeft.MTLoRA(tasks=("climate", "depth", "edge"), rank=2, task_rank=ranks))
    shapes = {key.rpartition("/")[2]: tensor.shape[0] for key, tensor in bank.named_tensors().items() if "fc1" in key}
    assert (shapes["task@climate.A"], shapes["task@depth.A"], shapes["task@edge.A"]) == (2, 1, 3)
    bank.drop_task("climate")
    assert bank.plan().method.task_rank == {"depth": 1, "edge": 3}


def test_tasks_that_depend_on_each_other_stay() -> None:
    cell = Cell("lora", "swin")
    model = cell.model()
    bank = vispeft.attach(model, vispeft.MTLoRA(tasks=FOUR, rank=2, mode="addition"), verify=False)
    before = list(model.state_dict())
    for change in (lambda: bank.add_task("edge"), lambda: bank.drop_task("seg"), lambda: bank.train_task("seg")):
        with pytest.raises(ConfigError, match="depend"):
            change()
    assert list(model.state_dict()) == before
    wanted = maps_of(model, cell.images())
    bank.rename_task("seg", "climate")
    assert_equal(maps_of(model, cell.images()), {"climate": wanted["seg"], "sal": wanted["sal"]})


def test_bad_changes_are_refused() -> None:
    model, _, bank = adapted("copies", ("seg",))
    before = list(model.state_dict())
    for change, error, says in (
        (lambda: bank.add_task("seg"), ConfigError, "different names"),
        (lambda: bank.add_task("a b"), ConfigError, "different names"),
        (lambda: bank.drop_task("depth"), UnknownNameError, "'depth'"),
        (lambda: bank.drop_task("seg"), ConfigError, "only task"),
        (lambda: bank.rename_task("depth", "x"), UnknownNameError, "'depth'"),
        (lambda: bank.train_task("depth"), UnknownNameError, "'depth'"),
    ):
        with pytest.raises(error, match=says):
            change()
    with bank.using(task="seg"), pytest.raises(ConfigError, match="Leave"):
        bank.add_task("depth")
    assert list(model.state_dict()) == before
    bank = vispeft.attach(Cell("lora", "vit").model(), vispeft.LoRA(rank=2), verify=False)
    with pytest.raises(ConfigError, match="has no tasks"):
        bank.add_task("depth")


@pytest.mark.parametrize("other", [lambda bank: bank.add_task("depth"), lambda bank: bank.drop_task("sal")])
def test_changes_in_two_threads_come_one_after_the_other(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planned on the tasks that it had found, and the second lost those of the first."""
    model, images, bank = adapted("matrix", ("seg", "sal"))
    real, gate, second = make_plan, bank._routing.gate, threading.Thread(target=lambda: other(bank))

    def slow(*given: Any) -> Any:
        if threading.current_thread() is not second and not second.ident:
            second.start()
            until = time.monotonic() + 60
            while second.is_alive() and not gate._waiting and time.monotonic() < until:
                time.sleep(0.001)
        return real(*given)

    monkeypatch.setattr("vispeft.adapters.task_bank.make_plan", slow)
    bank.add_task("edge", alone=False)
    second.join(60)
    tasks = bank.tasks()
    assert "edge" in tasks
    assert ("depth" in tasks) != ("sal" not in tasks)
    assert {item.task for item in bank.plan()} == {None, *tasks}
    placed = {name.rpartition("@")[2] for name, _ in model.named_modules() if "@" in name}
    assert placed == set(tasks)
    assert set(maps_of(model, images)) == set(tasks)
