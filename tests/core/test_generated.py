"""Generated tensors: made once for each state of their sources in evaluation, and never when that could be wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

import vispeft
from tests.conformance.cells import Cell
from vispeft.core.generated import Generated, MakesTensors
from vispeft.core.units import SharedUnit


class Squares(MakesTensors, SharedUnit):
    """Makes the squares of its tensor, times a number that is the key, and counts how often it did."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.calls = 0

    def reset(self, generator: Generator) -> None:
        self.x.zero_()

    def forward(self, times: float = 1.0) -> Tensor:
        def make() -> Tensor:
            self.calls += 1
            return times * self.x.square()

        return self.once(times, (self.x,), make)


@pytest.fixture
def unit() -> Squares:
    """One that evaluates and has made its squares."""
    made = Squares().eval()
    with torch.no_grad():
        assert made().tolist() == made().tolist() == [1, 4, 9]
    assert (made.calls, len(made.generated)) == (1, 1)
    return made


@torch.no_grad()
def test_one_entry_per_key(unit: Squares) -> None:
    assert unit(2.0).tolist() == unit(2.0).tolist() == [2, 8, 18]
    assert unit().tolist() == [1, 4, 9]
    assert (unit.calls, len(unit.generated)) == (2, 2)


def optimiser_step(make: Callable[..., torch.optim.Optimizer], **options: bool) -> Callable[[Squares], None]:
    def step(unit: Squares) -> None:
        unit.x.grad = torch.ones(3)
        make([unit.x], lr=0.5, **options).step()

    return step


def average(unit: Squares) -> None:
    held = torch.zeros(3)
    with torch.no_grad():
        unit.x.copy_(held)


def exchange(unit: Squares) -> None:
    unit.x.data = torch.zeros(3)


def exchange_twice(unit: Squares) -> None:
    for value in range(8, -1, -1):  # an address that was freed may come back
        unit.x.data = torch.full((3,), float(value))


CHANGES = {
    "SGD": optimiser_step(torch.optim.SGD),
    "AdamW, one by one": optimiser_step(torch.optim.AdamW, foreach=False),
    "AdamW, at once": optimiser_step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": optimiser_step(torch.optim.AdamW, fused=True),
    "average": average,
    "exchange": exchange,
    "exchange twice": exchange_twice,
    "load": lambda unit: unit.load_state_dict({"x": torch.zeros(3)}) and None,
    "load assigned": lambda unit: unit.load_state_dict({"x": torch.zeros(3)}, assign=True) and None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_a_source_is_seen(unit: Squares, change: Callable[[Squares], None]) -> None:
    change(unit)
    with torch.no_grad():
        found = unit()
        assert torch.equal(found, unit.x.square())
        assert found.tolist() != [1, 4, 9]
        assert torch.equal(unit(), found)
    assert unit.calls == 2


DROPS: dict[str, Callable[[Squares], object]] = {
    "train": lambda unit: unit.train(),
    "eval": lambda unit: unit.eval(),
    "mode of the model": lambda unit: nn.Sequential(unit).train(),
    "dtype": lambda unit: unit.double(),
    "device": lambda unit: unit.to("meta"),
    "cast of the model": lambda unit: nn.Sequential(unit).bfloat16(),
    "load": lambda unit: unit.load_state_dict(unit.state_dict()),
    "load of the model": lambda unit: nn.Sequential(unit).load_state_dict(nn.Sequential(unit).state_dict()),
    "apply": lambda unit: unit._apply(lambda tensor: tensor + 0),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
def test_what_was_made_is_dropped(unit: Squares, drop: Callable[[Squares], object]) -> None:
    drop(unit)
    assert len(unit.generated) == 0


@torch.no_grad()
def test_nothing_is_kept_while_training(unit: Squares) -> None:
    unit.train()
    assert unit().tolist() == unit().tolist()
    assert (unit.calls, len(unit.generated)) == (3, 0)


def test_gradients_flow_after_evaluation(unit: Squares) -> None:
    made = unit()
    assert made.requires_grad
    made.sum().backward()
    assert unit.x.grad.tolist() == [2, 4, 6]
    assert unit.calls == 2
    with torch.no_grad():
        unit()
    assert unit.calls == 2  # the entry from before is still good
    unit.requires_grad_(False)
    assert not unit().requires_grad
    assert unit.calls == 2  # nothing records gradients of a frozen unit


def test_inference_mode_neither_fills_with_its_tensors_nor_goes_without() -> None:
    unit = Squares().eval()
    with torch.inference_mode():
        first, second = unit(), unit()
    assert unit.calls == 1
    assert not first.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * second).sum().backward()  # an inference tensor may not be saved for this
    assert weight.grad.tolist() == [1, 4, 9]


def test_sources_made_in_inference_mode_are_computed_every_time() -> None:
    with torch.inference_mode():
        unit = Squares().eval()
        unit.x = nn.Parameter(torch.ones(3))
        assert unit().tolist() == unit().tolist() == [1, 1, 1]
    assert (unit.calls, len(unit.generated)) == (2, 0)


@torch.no_grad()
def test_autocast_has_entries_of_its_own() -> None:
    layer, made = nn.Linear(3, 2), Generated()

    def call() -> Tensor:
        return made.get("y", (layer.weight, layer.bias), lambda: layer(torch.ones(1, 3)))

    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert call().dtype == torch.bfloat16
        assert call().dtype == torch.float32


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_empty_and_independent(unit: Squares, way: str) -> None:
    if way == "deepcopy":
        twin = copy.deepcopy(unit)
    else:
        torch.save(unit, buffer := io.BytesIO())
        assert buffer.getbuffer().nbytes < 4000
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert (len(twin.generated), len(unit.generated)) == (0, 1)
    twin.x.zero_()
    assert twin().tolist() == [0, 0, 0]
    assert unit().tolist() == [1, 4, 9]
    assert list(unit.state_dict()) == ["x"]


@torch.no_grad()
def test_transforms_and_graphs_compute_for_themselves(unit: Squares) -> None:
    other = {"x": torch.zeros(3)}
    assert torch.func.functional_call(unit, other, ()).tolist() == [0, 0, 0]
    assert unit().tolist() == [1, 4, 9]
    stacked = torch.arange(6.0).view(2, 3)
    each = torch.func.vmap(lambda x: torch.func.functional_call(unit, {"x": x}, ()))(stacked)
    assert torch.equal(each, stacked.square())
    exported = torch.export.export(unit, ()).module()
    compiled = torch.compile(unit, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert exported().tolist() == compiled().tolist() == [1, 4, 9]
        unit.x.zero_()
        assert compiled().tolist() == [0, 0, 0]


def test_a_gradient_transform_computes_for_itself(unit: Squares) -> None:
    def total(x: Tensor) -> Tensor:
        return torch.func.functional_call(unit, {"x": x}, ()).sum()

    with torch.no_grad():
        assert torch.func.grad(total)(unit.x.detach()).tolist() == [2, 4, 6]


def test_the_network_of_a_prefix_makes_its_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("prefix_mlp", "vit")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    network = next(unit for key, unit in bank._entries["default"].units.items() if key.endswith("prefix_mlp"))
    calls, tables = [], type(network)._tables
    monkeypatch.setattr(type(network), "_tables", lambda self, *args: calls.append(1) or tables(self, *args))
    wanted = model.train()(images).detach()
    blocks = len(model.blocks)
    assert len(calls) == blocks
    model.eval()
    for _ in range(3):
        with torch.no_grad():
            assert torch.allclose(model(images), wanted, atol=1e-6)
    assert len(calls) == 2 * blocks
    optimizer = torch.optim.SGD([p for _, p in bank.trainable_parameters()], 0.1)
    model(images).sum().backward()
    assert network.embedding.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        moved = model(images)
    assert not torch.allclose(moved, wanted, atol=1e-4)
    assert torch.allclose(model.train()(images), moved, atol=1e-6)
    state = bank.stored_tensors()
    next(iter(state.values())).zero_()  # what a file gets is a copy
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), moved, atol=1e-6)
    assert not any("generated" in name for name in vispeft.AdapterBank.of(model).state_dict())
