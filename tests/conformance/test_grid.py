"""What must hold for every method on every backbone. One body per property; cells come from ``cells.py``.

Where outputs are compared bit for bit, gradients are off: PyTorch picks other attention kernels when they are on.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.layers import DropPath
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import BACKBONES, CELLS, METHODS, REFUSED, SELECTIONS, STORES_MORE, Cell, move, unit_names
from vispeft.errors import FileError, MergeError, VispeftError
from vispeft.hosts.base import Host


def cell_id(cell: Cell) -> str:
    return f"{cell.method}-{cell.backbone}"


@pytest.fixture(params=[c for c in CELLS if (c.method, c.backbone) not in REFUSED], ids=cell_id)
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


on_each_family = pytest.mark.parametrize(
    "cell", [c for c in CELLS if BACKBONES[c.backbone].grid and (c.method, c.backbone) not in REFUSED], ids=cell_id
)
"""For what the core does alike on every backbone of a family."""


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, 5)
    return (model(images).float() * weights).sum()


def plain_classes(model: nn.Module) -> bool:
    return not any(isinstance(module, Host) for module in model.modules())


@pytest.mark.parametrize("refused", [Cell(*key) for key in REFUSED], ids=cell_id)
def test_refusals_say_why_and_change_nothing(refused: Cell) -> None:
    model = refused.model()
    before = snapshot(model)
    with pytest.raises(VispeftError):
        refused.attach(model)
    assert plain_classes(model)
    assert list(model.state_dict()) == list(before)


@torch.no_grad()
def test_identity_at_start(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    wanted = model(images)
    bank = cell.attach(model, moved=False)
    promised = all(unit.identity_at_start for unit in bank._entries["default"].units.values())
    difference = (model(images) - wanted).abs().max()
    # Relative to the largest output: a fresh Eva has logits of the order of 1e-4. What promises nothing may yet start
    # close by, such as a matrix of a few bits that stands near zero.
    assert difference <= 1e-5 * wanted.abs().max() if promised else difference > 0


@torch.no_grad()
def test_attach_and_detach_leave_no_trace(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    model.train()
    model.cls_frozen_before = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    head = model.get_classifier()
    before, wanted = snapshot(model), model.eval()(images)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    bank = cell.attach(model)
    assert set(before) <= set(model.state_dict())
    assert isinstance(model, type(cell.model()))
    model.eval()
    assert not torch.equal(model(images), wanted)
    model.train()
    bank.detach("default")
    assert plain_classes(model)
    assert model.get_classifier() is head
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == model.cls_frozen_before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.eval()(images), wanted)
    assert not [key for key in model.__dict__ if "vispeft" in key and key != "_vispeft_source"]


def test_exactly_the_intended_tensors_train(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model, verify=True)
    wanted = unit_names(bank) | {id(p) for p in model.get_classifier().parameters()}
    assert {id(p) for _, p in bank.trainable_parameters()} == wanted
    assert {id(p) for group in bank.parameter_groups(0.1, 0.1) for p in group["params"]} == wanted
    model.train()
    loss_of(model, images).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in wanted), name


def test_frozen_tensors_stay_and_trained_ones_move(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    trained = {name for name, _ in bank.trainable_parameters()}
    before = snapshot(model)
    optimiser = torch.optim.AdamW(bank.parameter_groups(1e-2, 0.1))
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(model, images).backward()
        optimiser.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trained), name


@torch.no_grad()
def test_count_equals_the_closed_formula(cell: Cell) -> None:
    model = cell.model()
    method = METHODS[cell.method]
    plan = vispeft.plan(model, method)
    assert plain_classes(model)
    bank = cell.attach(model)
    assert bank.report().trainable == plan.trainable == method.parameter_count(bank.view)
    assert sum(bank.report().by_role.values()) == plan.trainable
    assert str(plan)
    assert str(bank.report())


@torch.no_grad()
def test_save_and_load(cell: Cell, tmp_path: Path) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    bank.save(tmp_path)
    wanted = model(images)
    for name in ("default", "other_name"):
        again = cell.model(num_classes=3)
        loaded = vispeft.load(again, tmp_path, name=name)
        assert loaded.names == [name]
        assert torch.equal(again(images), wanted)
    report = bank.report()
    path = tmp_path / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    assert path.stat().st_size <= report.stored_bytes + 2048 + 160 * len(names)
    header = json.loads((tmp_path / "adapter.json").read_text())
    assert set(header["tensors"]) == set(names)
    stored = sum(math.prod(entry["shape"]) for entry in header["tensors"].values())  # before packing to a few bits
    wanted_count = METHODS[cell.method].stored().parameter_count(bank.view)
    assert stored > wanted_count if cell.method in STORES_MORE else stored == wanted_count
    vispeft.load(cell.model(), tmp_path).save(tmp_path / "again")
    assert (tmp_path / "again/adapter.safetensors").read_bytes() == path.read_bytes()


@torch.no_grad()
def test_merge_and_unmerge(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    base_keys = list(model.state_dict())
    bank = cell.attach(model)
    wanted = model(images)
    if not cell.merges_whole:
        with pytest.raises(MergeError, match="partial"):
            bank.merge()
        assert torch.equal(model(images), wanted)
    report = bank.merge(partial=not cell.merges_whole)
    merged = model(images)
    assert torch.allclose(merged, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert report.max_error <= 1e-5
    assert plain_classes(model) == cell.merges_whole
    if cell.merges_whole:
        assert set(model.state_dict()) == (set(base_keys) | set(report.created)) - set(report.removed)
    assert bank.merge() is report
    assert torch.equal(model(images), merged)
    bank.unmerge()
    assert torch.equal(model(images), wanted)
    bank.detach("default")
    assert list(model.state_dict()) == base_keys


@on_each_family
@torch.no_grad()
def test_merge_refuses_what_is_not_finite(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    tensors = [t for key, t in bank.named_tensors().items() if not key.startswith("head/")]
    if not tensors:
        assert bank.merge().merged == ()  # a probe has nothing that could fail
        return
    value = tensors[0].flatten()[0].clone()
    tensors[0].data.flatten()[0] = math.nan
    with pytest.raises(MergeError, match="finite"):
        bank.merge(partial=True)
    with pytest.raises(FileError, match="finite"):
        bank.save("nowhere")
    assert not Path("nowhere").exists()
    tensors[0].data.flatten()[0] = value
    assert torch.isfinite(model(images)).all()


@torch.no_grad()
def test_disabled_equals_the_base(cell: Cell) -> None:
    # Frozen first: matmul looks at requires_grad when it chooses how to fold its operands, even without gradients.
    model, images = cell.model().requires_grad_(False), cell.images()
    wanted = model(images)
    bank = cell.attach(model)
    adapted = model(images)
    with bank.disabled():
        assert torch.equal(model(images), wanted)
    assert torch.equal(model(images), adapted)


@on_each_family
@torch.no_grad()
def test_two_adapters_switch_stack_and_go(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    base = model(images)
    bank = cell.attach(model, "one")
    one = model(images)
    model.reset_classifier(9)
    nine = model(images)
    cell.attach(model, "two", moved=False)
    move(bank, "two", seed=11)
    two = model(images)
    assert two.shape[1] == 5, "a new adapter starts from the base's classifier"
    bank.set_active("one")
    assert torch.equal(model(images), nine)
    assert model.num_classes == 9
    assert {id(p) for _, p in bank.trainable_parameters()} >= unit_names(bank, "one")
    assert not {id(p) for _, p in bank.trainable_parameters()} & unit_names(bank, "two")
    bank.set_active("two")
    assert torch.equal(model(images), two)
    if cell.method in SELECTIONS:
        with pytest.raises(VispeftError, match="both replace"):
            bank.set_active(["one", "two"])
    else:
        bank.set_active(["one", "two"])
        stacked = model(images)
        assert stacked.shape == two.shape
        assert bank.plan("one").trainable == 0 or not torch.equal(stacked, two)
    bank.set_active("two")
    bank.detach("one")
    assert torch.equal(model(images), two)
    bank.detach("two")
    assert torch.equal(model(images), base)
    assert one.shape == base.shape


def test_equal_gradients_under_checkpointing(cell: Cell) -> None:
    model, images = cell.model().double(), cell.images().double()
    bank = cell.attach(model)
    model.train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        results.append([out.detach(), *[p.grad for _, p in bank.trainable_parameters()]])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_intermediates_agree_with_features(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    plain = model.forward_intermediates(images, norm=True)[1]
    bank = cell.attach(model)
    final, maps = model.forward_intermediates(images, norm=True)
    assert [m.shape for m in maps] == [m.shape for m in plain]
    features = model.forward_features(images)
    assert torch.allclose(final, features, atol=1e-6)
    side = maps[-1].shape[-1]
    # The patches are the last rows: prompts may stand in front of them where average pooling is to see them.
    last = features if features.ndim == 4 else features[:, -side * side :].unflatten(1, (side, side))
    assert torch.allclose(maps[-1], last.permute(0, 3, 1, 2), atol=1e-6)
    if bank.plan().trainable:
        assert torch.allclose(maps[-1], plain[-1], atol=1e-4) != METHODS[cell.method].reaches_maps


def test_reduced_precision(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    wanted = model(images)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        cell_output = model(images)
        cell_output.float().square().sum().backward()
    assert torch.isfinite(cell_output).all()
    assert all(torch.isfinite(p.grad).all() for _, p in bank.trainable_parameters())
    half = cell.model().bfloat16()
    loaded = vispeft.attach(half, METHODS[cell.method])
    loaded.load_state_dict({k: v for k, v in bank.state_dict().items() if not k.startswith("head/")})
    half.get_classifier().load_state_dict(model.get_classifier().state_dict())
    assert all(p.dtype == torch.float32 for k, p in loaded.named_tensors().items() if not k.startswith("head/"))
    out = half(images.bfloat16())
    out.float().square().sum().backward()
    assert (out.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()


@on_each_family
@torch.no_grad()
def test_copies_are_independent(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    wanted = model(images)
    twin = copy.deepcopy(model)
    twin_bank = vispeft.AdapterBank.of(twin)
    assert twin_bank is not None
    assert twin_bank is not bank
    move(twin_bank, "default", seed=5)
    assert not torch.equal(twin(images), wanted)
    assert torch.equal(model(images), wanted)
    twin_bank.detach("default")
    assert plain_classes(twin)
    assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_other_image_sizes(cell: Cell, tmp_path: Path) -> None:
    cell.attach(cell.model()).save(tmp_path)
    size = BACKBONES[cell.backbone].other_size
    model = cell.model(img_size=size)
    bank = cell.attach(model)
    images = cell.images(size=size)
    wanted = model(images)
    report = bank.merge(partial=True)
    assert torch.allclose(model(images), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert report.max_error <= 1e-5
    if cell.method != "full":  # full fine-tuning holds tensors of the size itself
        fresh = cell.model(img_size=size)
        vispeft.load(fresh, tmp_path)
        assert torch.isfinite(fresh(images)).all()


@on_each_family
def test_one_batch_overfits(cell: Cell) -> None:
    torch.manual_seed(0)
    # Colours apart, since tiny models with random weights hardly tell images of mere noise from each other.
    model, images = cell.model(), cell.images(4) + torch.randn(4, 3, 1, 1).mul(3)
    labels = torch.arange(4)
    bank = cell.attach(model, moved=False)
    optimiser = torch.optim.AdamW(
        bank.parameter_groups(1e-2 if cell.method in ("full", "convpass", "convpass_attn") else 3e-2, 0.0)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    model.train()
    losses = []
    for _ in range(300):  # most need a few dozen; a class token that only frozen attention tells anything needs more
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if losses[-1] < 0.5 * losses[0]:
            break
    assert losses[-1] < 0.7 * losses[0], losses


@torch.no_grad()
def test_frozen_part_is_quiet_in_training(cell: Cell) -> None:
    options = {"drop_path_rate": 0.5, "attn_drop_rate": 0.3, "proj_drop_rate": 0.3}
    model, images = cell.model(**options), cell.images()
    cell.attach(model)
    evaluated = model(images)
    model.train()
    assert model.training
    if METHODS[cell.method].trains_base:
        assert any(module.training for module in model.modules() if isinstance(module, DropPath))
    else:
        assert torch.equal(model(images), evaluated)
    nn.Sequential(model).train()
    model.eval()
    assert torch.equal(model(images), model(images))


def test_dense_maps_without_a_classifier(cell: Cell, tmp_path: Path) -> None:
    model, images = cell.model(num_classes=0), cell.images()
    bank = cell.attach(model)
    assert bank.report().trainable_head == 0
    maps = model.forward_intermediates(images, intermediates_only=True)
    if bank.plan().trainable and METHODS[cell.method].reaches_maps:
        sum(m.square().mean() for m in maps).backward()
        reached = [p.grad is not None for _, p in bank.trainable_parameters()]
        assert sum(reached) >= 0.5 * len(reached)
    bank.save(tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    again = cell.model(num_classes=0)
    vispeft.load(again, tmp_path)
    assert all(map(torch.equal, again.forward_intermediates(images)[1], maps))
