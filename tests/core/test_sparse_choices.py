"""Choices of entries by rows, by the training images, and again from present weights, without a trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.errors import ConfigError, FileError, TrainingError
from vispeft.methods.gps import contrastive_loss, other_view
from vispeft.methods.sparse import SparseUnit
from vispeft.methods.sparse_start import by_changes

LT = vispeft.Sparse(budget=0.02, schedule="lt", dense_lr=1e-3, dense_passes=2)
LIFT = vispeft.Sparse(budget=0.05, support="lift", principal=2, schedule="lift", interval=3)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(2)]


def units(bank: AdapterBank) -> list[SparseUnit]:
    return [unit for unit in bank.units().values() if isinstance(unit, SparseUnit)]


def attached(method: vispeft.Method, backbone: str = "vit") -> tuple[Any, AdapterBank]:
    model = Cell("sparse", backbone, short=True).model()
    return model, vispeft.attach(model, method, verify=False)


def check_files(model: Any, bank: AdapterBank, backbone: str, folder: Path) -> None:
    """An adapter comes back from its file and its state, is written byte for byte, and merges."""
    cell = Cell("sparse", backbone, short=True)
    bank.save(folder / "once")
    again, images = cell.model(), cell.images()
    loaded = vispeft.load(again, folder / "once")
    loaded.save(folder / "twice")
    assert (folder / "once/adapter.safetensors").read_bytes() == (folder / "twice/adapter.safetensors").read_bytes()
    other, fresh = attached(bank.plan().method, backbone)
    fresh.load_state_dict(bank.state_dict())
    with torch.no_grad():
        wanted = model.eval()(images)
        assert torch.equal(again.eval()(images), wanted)
        assert torch.equal(other.eval()(images), wanted)
        bank.merge()
        assert (model(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_tuning_everything_chooses_over_all_layers(tmp_path: Path) -> None:
    model, bank = attached(LT)
    wanted = sum(len(unit.values) for unit in units(bank))
    shares = [len(unit.values) / unit.size for unit in units(bank)]
    before = {key: tensor.clone() for key, tensor in bank.state_dict().items() if key.startswith("head/")}
    bank.start_from(batches())
    counts = [len(unit.values) for unit in units(bank)]
    assert wanted <= sum(counts) <= wanted + len(counts)  # each layer has one at least
    assert max(shares) < 2 * min(shares)
    assert max(counts) > 4 * min(counts)
    for unit in units(bank):
        assert unit.dense is None
        assert unit.observer is None
        assert not unit.values.any()
        assert len(unit.positions.unique()) == len(unit.positions) == len(unit.values)
    # The classifier was tuned beside the weights, and starts anew as they do.
    assert all(torch.equal(bank.state_dict()[key], tensor) for key, tensor in before.items())
    assert all(tensor.grad is None for _, tensor in bank.trainable_parameters())
    move(bank, "default")
    check_files(model, bank, "vit", tmp_path)


def test_a_state_of_other_lengths_is_taken_as_a_whole_or_not_at_all() -> None:
    _, bank = attached(LT)
    bank.start_from(batches())
    _, other = attached(LT)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    given = bank.state_dict()
    key = next(key for key in given if key.endswith("values"))
    for broken in (
        {**given, key: given[key][:-1]},
        {**given, key: given[key][None]},
        {**given, key: torch.zeros(10**6), key.replace("values", "positions"): torch.zeros(10**6, dtype=torch.int32)},
        {**given, key: torch.full_like(given[key], torch.nan)},
    ):
        with pytest.raises(FileError, match=r"has shape|not finite"):
            other.load_state_dict(broken)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(FileError, match="has shape"):
        attached(vispeft.Sparse(budget=0.02))[1].load_state_dict(given)


def test_what_all_entries_cannot_be_tuned_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank = attached(LT)
    (images, labels), *_ = batches()
    with pytest.raises(ConfigError, match=r"choose \d+ entries, and 0 changed"):
        by_changes(bank, "default", [], 1e-3, 1)
    with pytest.raises(TrainingError, match="Lower dense_lr"):
        by_changes(bank, "default", [(images * torch.nan, labels)], 1e-3, 1)
    with pytest.raises(ConfigError, match=r"schedule='lt'.*values of a regression"):
        by_changes(bank, "default", [(images, torch.full((4, 5), 1.5))], 1e-3, 1)
    assert all(unit.dense is None for unit in units(bank))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="Train with one"):
        by_changes(bank, "default", batches(), 1e-3, 1)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_gps_chooses_in_each_row(backbone: str, tmp_path: Path) -> None:
    model, bank = attached(vispeft.Sparse(budget="row:2", support="gps", everywhere=True), backbone)
    random = [unit.positions.clone() for unit in units(bank)]
    found = []
    for _ in range(2):
        torch.manual_seed(3)  # of the second views
        bank.start_from(batches())
        found.append([unit.positions.clone() for unit in units(bank)])
    for unit, drawn, one, two in zip(units(bank), random, *found, strict=True):
        assert torch.equal(one, two)
        assert (one == drawn).float().mean() < 0.5
        assert torch.equal(one // unit.site.columns, torch.arange(unit.site.out_features).repeat_interleave(2))
    whole = {key.partition("/whole.")[2] for key in bank.named_tensors() if "/whole." in key}
    assert whole == {"bias", *(["relative_position_bias_table"] if backbone == "swin" else [])}
    assert not [key for key in bank.named_tensors() if "norm" in key]
    move(bank, "default")
    check_files(model, bank, backbone, tmp_path)


def test_gps_needs_images_with_one_class_each() -> None:
    _, bank = attached(vispeft.Sparse(budget="row:1", support="gps"))
    images, labels = batches()[0]
    for wrong in (
        (images, F.one_hot(labels).float()),
        (images, labels[:2]),
        ({"a": images}, labels),
        (images[0], labels),
    ):
        with pytest.raises(ConfigError, match="Leave mixup and cutmix out"):
            bank.start_from([wrong])
    with pytest.raises(ConfigError, match="no images"):
        bank.start_from([])


@pytest.mark.parametrize("support", ["gps", "gradient"])
def test_gradients_that_are_not_finite_choose_nothing(support: str) -> None:
    _, bank = attached(vispeft.Sparse(budget="row:1", support=support))  # type: ignore[arg-type]
    before = [unit.positions.clone() for unit in units(bank)]
    images, labels = batches()[0]
    with pytest.raises(TrainingError, match="Check the images"):
        bank.start_from([(images * torch.inf, labels)])
    assert all(torch.equal(old, unit.positions) for old, unit in zip(before, units(bank), strict=True))
    assert all(unit.observer is None for unit in units(bank))


def test_other_views_show_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(16.0)[None, None, None, :].expand(64, 1, 16, 16).contiguous()
    views = other_view(images, generator)
    assert views.shape == images.shape
    slopes = views[:, 0, 8, 9] - views[:, 0, 8, 7]
    assert 16 < int((slopes < 0).sum()) < 48  # mirrored
    assert bool((slopes.abs() <= 2.001).all() and (slopes.abs() >= 0.99).all())  # a side of 1/2 to all of the image
    loss = contrastive_loss(torch.eye(4), torch.tensor([0, 1]), 1.0)
    assert loss == pytest.approx(torch.log(torch.tensor(3.0)).item())


@pytest.mark.parametrize("kind", ["AdamW", "SM3"])
def test_lift_chooses_again_and_keeps_what_went(kind: str, tmp_path: Path) -> None:
    model, bank = attached(LIFT)
    kinds: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SM3": vispeft.methods.sparse_schedules.SM3}
    optimizer = kinds[kind](bank.parameter_groups(1e-2, 0.0))
    trainer = SimpleNamespace(optimizers=[optimizer], world_size=1, global_step=0)
    task = SimpleNamespace(bank=bank, ema=None)
    (callback,) = bank.callbacks()
    callback.on_train_start(trainer, task)
    first = [unit.positions.clone() for unit in units(bank)]
    for step in range(6):
        images, labels = batches()[step % 2]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        trainer.global_step += 1
        before = [torch.zeros(unit.size).index_add(0, unit.positions, unit.values.detach()) for unit in units(bank)]
        kept = [unit.left_values.sum() for unit in units(bank)]
        callback.on_train_batch_end(trainer, task, None, None, step)
        for unit, dense, other in zip(units(bank), before, kept, strict=True):
            total = unit.values.detach().sum() + unit.left_values.sum()  # a choice changes no weight
            assert torch.allclose(total, dense.sum() + other, atol=1e-5)
            both = torch.cat([unit.positions, unit.left_positions])
            assert len(both.unique()) == len(both)
    assert callback.state_dict() == {"steps": 6}
    assert any(
        not torch.equal(old.sort().values, unit.positions.sort().values)
        for old, unit in zip(first, units(bank), strict=True)
    )
    assert any(len(unit.left_values) for unit in units(bank))
    check_files(model, bank, "vit", tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world_size": 2}, "train with one"),
        ({"ema": object()}, "leave ema out"),
        ({"compiled": True}, "leave compile out"),
        ({"optimizer": torch.optim.SGD}, "cannot in SGD"),
    ],
)
def test_trainings_that_lift_cannot_serve_are_refused(changes: dict[str, Any], says: str) -> None:
    _, bank = attached(LIFT)
    optimizer = changes.get("optimizer", torch.optim.AdamW)(bank.parameter_groups(1e-2, 0.0))
    trainer = SimpleNamespace(optimizers=[optimizer], world_size=changes.get("world_size", 1), global_step=0)
    if "compiled" in changes:
        bank.compile(backend="eager")
    with pytest.raises(ConfigError, match=f"schedule='lift'.*{says}"):
        bank.callbacks()[0].on_train_start(trainer, SimpleNamespace(bank=bank, ema=changes.get("ema")))
