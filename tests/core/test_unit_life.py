"""The life of a unit: made, prepared from the frozen weight, and drawn or filled from a file, any number of times."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn

import vispeft
from tests.conformance.cells import MAIN, METHODS, Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.core.method import Method, PlanItem
from vispeft.core.sites import View
from vispeft.core.units import WeightUnit

ON_A_VIT = [cell for cell in MAIN if cell.backbone == "vit" and METHODS[cell.method].name != "linear_probe"]


def draw_again(bank: AdapterBank) -> None:
    """Draw the start values of an adapter once more, from the seed it has."""
    entry = bank._entries["default"]
    generator = torch.Generator().manual_seed(entry.seed)
    with torch.no_grad():
        for item in entry.plan:
            unit = entry.units[item.key]
            unit.reset(generator)
            for name, value in (item.start() if item.start else {}).items():
                unit.get_parameter(name).copy_(value)


@pytest.mark.parametrize("cell", ON_A_VIT, ids=lambda cell: cell.method)
def test_start_values_are_drawn_again_alike(cell: Cell) -> None:
    bank = cell.attach(cell.model(), moved=False)
    start = {key: tensor.clone() for key, tensor in bank._entries["default"].state().items()}
    for _ in range(2):
        move(bank, "default")
        draw_again(bank)
        for key, tensor in bank._entries["default"].state().items():
            assert torch.equal(tensor, start[key]), key


def test_a_layer_of_peft_is_drawn_again_in_place() -> None:
    pytest.importorskip("peft")
    cell = Cell("lora", "vit")
    bank = vispeft.attach(
        cell.model(), vispeft.method("peft", config={"peft_type": "LOHA", "r": 2}, roles=("mlp.fc1",))
    )
    start = {key: (id(t), t.detach().clone()) for key, t in bank.named_tensors().items()}
    move(bank, "default")
    head = {key: tensor.detach().clone() for key, tensor in bank.named_tensors().items() if key.startswith("head/")}
    draw_again(bank)
    for key, tensor in bank.named_tensors().items():
        assert id(tensor) == start[key][0]
        assert torch.equal(tensor, head.get(key, start[key][1])), key


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that a tensor nobody gave a value is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", ON_A_VIT, ids=lambda cell: cell.method)
@torch.no_grad()
def test_loading_draws_nothing(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    wanted = model(images)
    bank.save(tmp_path)
    again = cell.model()

    def refuse(*_: object) -> None:
        raise AssertionError("start values were drawn")

    for unit in bank._entries["default"].units.values():
        monkeypatch.setattr(type(unit), "reset", refuse)
    monkeypatch.setattr("vispeft.methods.lst.prune", refuse)
    before = torch.get_rng_state()
    vispeft.load(again, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    # A prefix comes back as tables, PiSSA as a term of twice the rank.
    assert torch.allclose(again(images), wanted, rtol=1e-5, atol=1e-6)


class Singular(WeightUnit):
    """Differences of the largest singular values of a weight; its vectors are computed, and in no file."""

    told: ClassVar[list[tuple[str, tuple[int, ...]]]] = []

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.empty(rank))

    def prepare(self, weight: Tensor) -> None:
        self.told.append(("prepare", tuple(weight.shape)))
        u, _, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        self.register_buffer("u", u[:, : len(self.sigma)], persistent=False)
        self.register_buffer("v", v[: len(self.sigma)], persistent=False)

    def reset(self, generator: Generator) -> None:
        self.told.append(("reset", tuple(self.sigma.shape)))
        self.sigma.zero_()

    def fold_weight(self, weight: Tensor) -> Tensor:
        return weight + ((self.u * self.sigma) @ self.v).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Singulars(Method):
    """Singular values of linear layers."""

    name: ClassVar[str] = "test_singulars"
    default_roles: ClassVar[tuple[str, ...]] = ("mlp.fc2",)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        for site in self.sites(view):
            yield PlanItem(site, "singular", lambda: Singular(3))


@torch.no_grad()
def test_a_unit_is_prepared_from_the_frozen_weight_on_attach_and_on_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vispeft.core.method._METHODS", dict(vispeft.core.method._METHODS))
    vispeft.register(Singulars)
    model, images = Cell("lora", "vit").model(), Cell("lora", "vit").images()
    told = Singular.told
    told.clear()
    bank = vispeft.attach(model, Singulars())
    assert told == [("prepare", (24, 96)), ("reset", (3,))] * 2
    move(bank, "default")
    wanted = model(images)
    bank.save(tmp_path)
    # Another adapter that changes the weight must not be seen.
    again = Cell("lora", "vit").model()
    move(vispeft.attach(again, vispeft.LoRA(dora=True, roles=("mlp.fc2",)), name="other"), "other")
    told.clear()
    vispeft.load(again, tmp_path)
    assert told == [("prepare", (24, 96))] * 2
    assert torch.allclose(again(images), wanted, atol=1e-6)
    merged = again(images)
    vispeft.AdapterBank.of(again).merge()
    assert torch.allclose(again(images), merged, atol=1e-5)


def test_a_slice_is_prepared_from_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Cell("lora", "vit").model(), []
    monkeypatch.setattr("vispeft.methods.lora.LowRank.prepare", lambda unit, weight: seen.append(weight), raising=False)
    vispeft.attach(model, vispeft.LoRA(roles=("attn.q", "attn.v"), blocks=(1,)), verify=False)
    weight = model.blocks[1].attn.qkv.weight
    assert [torch.equal(rows, part) for rows, part in zip(seen, (weight[:24], weight[48:]), strict=True)] == [True] * 2
    assert not any(rows.requires_grad for rows in seen)


def test_a_gain_moves_with_the_model_and_is_in_no_file(tmp_path: Path) -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    names = list(model.state_dict())
    full = model(images)
    with bank.disabled():
        bare = model(images)
    for unit in bank._entries["default"].units.values():
        assert unit.gain is None
        unit.gain = torch.tensor(0.0)
    without_head = model.forward_features(images)
    with bank.disabled():
        assert torch.allclose(model.forward_features(images), without_head, atol=1e-6)
    assert not torch.allclose(full, bare, atol=1e-3)
    assert list(model.state_dict()) == names
    assert list(copy.deepcopy(model).state_dict()) == names
    model.double()
    assert {unit.gain.dtype for unit in bank._entries["default"].units.values()} == {torch.float64}
    for unit in bank._entries["default"].units.values():
        unit.gain = None
    assert torch.allclose(model.float()(images), full, atol=1e-6)
