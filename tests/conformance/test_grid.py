"""Properties of every method on every backbone. One body per property; cells come from ``cells.py``.

Properties that depend on a backbone's structure run on all cells, the others on the main families, and on the variants
of a family with ``make test-slow``. Properties that change nothing share one adapted model per cell. See ``README.md``.

Where outputs are compared bit for bit, gradients are off: PyTorch picks other attention kernels when they are on.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import (
    BACKBONES,
    BATCH_STATISTICS,
    CELLS,
    EXCLUSIVE,
    MAIN,
    METHODS,
    NO_PLAIN_FORM,
    REASONS,
    REFUSED,
    STORES_MORE,
    Cell,
    is_second_form,
    is_variant,
    move,
    params,
    unit_names,
)
from vispeft.adapters.bank import AdapterBank
from vispeft.core.origin import MEMORY
from vispeft.core.unit_shapes import units_of
from vispeft.errors import FileError, MergeError, SiteError, VispeftError
from vispeft.hosts.base import Host


@pytest.fixture(params=params(CELLS))
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


on_main = pytest.mark.parametrize("cell", params(MAIN))
"""For properties that no structure of a backbone has a part in."""
variants_slow = pytest.mark.parametrize("cell", params(CELLS, slow=is_variant))
"""For properties of every cell in which a backbone's structure has little part."""


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Compute all that leaves a model: class scores, and the maps of tasks that branch inside it."""
    bank = AdapterBank.of(model)
    maps = {}
    if bank is not None and bank.plan().method.one_pass:
        maps = vispeft.forward_tasks(model, images)
    return [model(images), *(level for levels in maps.values() for level in levels)]


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    scores, *maps = outputs_of(model, images)
    weights = torch.linspace(-1, 1, 5)
    return torch.stack([(scores.float() * weights).sum(), *(level.float().square().mean() for level in maps)]).sum()


def plain_classes(model: nn.Module) -> bool:
    return not any(isinstance(module, Host) for module in model.modules())


@pytest.mark.parametrize("refused", params(Cell(*key) for key in REFUSED))
def test_refusals_say_why_and_change_nothing(refused: Cell) -> None:
    refusal = REFUSED[refused.key]
    assert refusal.reason in REASONS
    model = refused.model()
    before = snapshot(model)
    with pytest.raises(SiteError, match=refusal.says):
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


@variants_slow
@torch.no_grad()
def test_attach_and_detach_leave_no_trace(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    model.train()
    trained_before = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
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
    assert [p.requires_grad for p in model.parameters()] == trained_before
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


@variants_slow
def test_frozen_tensors_stay_and_trained_ones_move(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    trained = {name for name, _ in bank.trainable_parameters()}
    unread = [f"{key}{name}" for key, unit in units_of(model).items() for name in unit.zero_gradient]
    before = snapshot(model)
    optimiser = torch.optim.AdamW(bank.parameter_groups(1e-2, 0.1))
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(model, images).backward()
        optimiser.step()
    for name, tensor in model.state_dict().items():
        if name in unread:
            continue  # no gradient reaches it but that of the method's own loss
        if cell.method in BATCH_STATISTICS and name.endswith((".mean", ".variance")):
            trained.add(name)
        assert torch.equal(tensor, before[name]) != (name in trained), name


@torch.no_grad()
def test_merge_and_unmerge(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    base_keys = list(model.state_dict())
    bank = cell.attach(model)
    wanted = model(images)
    if not cell.merges_whole:
        with pytest.raises(MergeError, match=r"no plain layer that does the same .*(partial|keep it as an adapter)"):
            bank.merge()
        assert torch.equal(model(images), wanted)
    report = bank.merge(partial=not cell.merges_whole)
    if not cell.merges_whole:
        assert any(re.search(NO_PLAIN_FORM[cell.key], reason) for reason in report.kept.values()), report.kept
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


@on_main
@torch.no_grad()
def test_merge_refuses_what_is_not_finite(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    tensors = [t for key, t in bank.named_tensors().items() if not key.startswith("head/")]
    if not tensors:
        assert bank.merge().merged == ()  # a probe has nothing that could fail
        return
    value = tensors[0].flatten()[0].clone()
    tensors[0].view(-1)[0] = math.nan
    with pytest.raises(MergeError, match="finite"):
        bank.merge(partial=True)
    with pytest.raises(FileError, match="finite"):
        bank.save("nowhere")
    assert not Path("nowhere").exists()
    tensors[0].view(-1)[0] = value
    assert torch.isfinite(model(images)).all()


@on_main
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
    assert {id(p) for _, p in bank.trainable_parameters()} >= unit_names(bank, "one") | unit_names(bank, "two")
    bank.freeze("two")
    assert not {id(p) for _, p in bank.trainable_parameters()} & unit_names(bank, "two")
    bank.unfreeze("two")
    bank.set_active("two")
    assert torch.equal(model(images), two)
    if cell.method in EXCLUSIVE:
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
        outputs = outputs_of(model, images)
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
        results.append([*(out.detach() for out in outputs), *(p.grad for _, p in bank.trainable_parameters())])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cell", params(CELLS, slow=lambda c: is_second_form(c) or c.backbone not in ("vit", "swin")))
def test_lean_and_leaner_give_the_gradients_of_plain(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    model.train()
    results = []
    for memory in MEMORY:
        bank.memory = memory
        model.zero_grad()
        torch.manual_seed(4)  # methods with dropout draw alike
        outputs = outputs_of(model, images)
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
        results.append([*(out.detach() for out in outputs), *(p.grad for _, p in bank.trainable_parameters())])
    plain = results[0]
    for result in results[1:]:
        # Of scales the input is recovered from the output, which rounds otherwise.
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max()) for a, b in zip(result, plain, strict=True)
        )
    bank.detach("default")
    assert plain_classes(model)


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


@variants_slow
def test_reduced_precision(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    wanted = model(images)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(model, images)
        torch.stack([out.float().square().sum() for out in outputs]).sum().backward()
    assert all(torch.isfinite(out).all() for out in outputs)
    assert all(torch.isfinite(p.grad).all() for _, p in bank.trainable_parameters())
    half = cell.model().bfloat16()
    # That a base in half precision is verified too is seen on one model of each kind.
    loaded = cell.attach(half, moved=False, verify=cell.backbone in ("vit", "swin"))
    loaded.load_state_dict({k: v for k, v in bank.state_dict().items() if not k.startswith("head/")})
    half.get_classifier().load_state_dict(model.get_classifier().state_dict())
    assert all(p.dtype == torch.float32 for k, p in loaded.named_tensors().items() if not k.startswith("head/"))
    out = half(images.bfloat16())
    out.float().square().sum().backward()
    assert (out.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()


@torch.no_grad()
def test_other_image_sizes(cell: Cell, tmp_path: Path) -> None:
    size = BACKBONES[cell.backbone].other_size
    model, images = cell.model(img_size=size), cell.images(size=size)
    if cell.method == "full":  # full fine-tuning holds tensors of the size itself
        bank = cell.attach(model)
    else:
        cell.attach(cell.model()).save(tmp_path)
        bank = vispeft.load(model, tmp_path)
    wanted = model(images)
    assert torch.isfinite(wanted).all()
    report = bank.merge(partial=True)
    assert torch.allclose(model(images), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert report.max_error <= 1e-5


@pytest.mark.parametrize("cell", params(MAIN, slow=lambda c: is_second_form(c) or c.backbone not in ("vit", "swin")))
def test_one_batch_overfits(cell: Cell) -> None:
    torch.manual_seed(0)
    # Colours apart, since tiny models with random weights hardly tell images of mere noise from each other.
    model, images = cell.model(), cell.images(4) + torch.randn(4, 3, 1, 1).mul(3)
    labels = torch.arange(4)
    bank = cell.attach(model, moved=False)
    optimiser = torch.optim.AdamW(
        bank.parameter_groups(1e-2 if cell.method in ("full", "convpass", "convpass_attn") else 3e-2, 0.0), fused=True
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


@variants_slow
@torch.no_grad()
def test_frozen_part_is_quiet_in_training(cell: Cell) -> None:
    options = {"drop_path_rate": 0.5, "attn_drop_rate": 0.3, "proj_drop_rate": 0.3}
    model, images = cell.model(**options), cell.images()
    cell.attach(model)
    evaluated = model(images)
    model.train()
    assert model.training
    # A short cell has one block, whose rate of stochastic depth is 0: its dropout tells.
    base = {name: module for name, module in model.named_modules() if "adapters" not in name.split(".")}
    dropouts = [module for name, module in base.items() if name.endswith(("attn_drop", "proj_drop"))]
    assert {module.training for module in dropouts} == {METHODS[cell.method].trains_base}
    if not METHODS[cell.method].trains_base and cell.method not in BATCH_STATISTICS:
        assert torch.equal(model(images), evaluated)
    nn.Sequential(model).train()
    model.eval()
    assert torch.equal(model(images), model(images))


@variants_slow
def test_dense_maps_without_a_classifier(cell: Cell, tmp_path: Path) -> None:
    model, images = cell.model(num_classes=0), cell.images()
    bank = cell.attach(model)
    assert bank.report().trainable_head == 0
    maps = model.forward_intermediates(images, intermediates_only=True)
    if bank.plan().trainable and METHODS[cell.method].reaches_maps:
        sum(m.square().mean() for m in (*maps, *outputs_of(model, images)[1:])).backward()
        reached = [p.grad is not None for _, p in bank.trainable_parameters()]
        assert sum(reached) >= 0.5 * len(reached)
    bank.save(tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    again = cell.model(num_classes=0)
    vispeft.load(again, tmp_path)
    assert all(map(torch.equal, again.forward_intermediates(images)[1], maps))


# ---------------------------------------------------------------------- properties that share one adapted model


@dataclass(frozen=True)
class Adapted:
    """An adapted model, and figures of the plain one it was made from."""

    cell: Cell
    model: nn.Module
    bank: AdapterBank
    images: Tensor
    base: Tensor
    """Outputs of the plain model."""
    outputs: Tensor
    """Outputs of the adapted model."""


@contextmanager
def adapt(cell: Cell) -> Iterator[Adapted]:
    """Adapt one model for all read-only properties of a cell, and see to it that none of them changes anything."""
    # Frozen first: matmul looks at requires_grad when it chooses how to fold its operands, even without gradients.
    model, images = cell.model().requires_grad_(False), cell.images()
    with torch.no_grad():
        base = model(images)
        bank = cell.attach(model)
        before, outputs = snapshot(model), model(images)
    yield Adapted(cell, model, bank, images, base, outputs)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    with torch.no_grad():
        assert torch.equal(model(images), outputs)
    assert (bank.names, bank.active) == (["default"], ["default"])


@pytest.fixture(scope="class", params=params(CELLS, slow=is_variant))
def adapted(request: pytest.FixtureRequest) -> Iterator[Adapted]:
    with adapt(request.param) as found:
        yield found


class TestReadOnly:
    @torch.no_grad()
    def test_count_equals_the_closed_formula(self, adapted: Adapted) -> None:
        method, plain = METHODS[adapted.cell.method], adapted.cell.model()
        plan, report = vispeft.plan(plain, method), adapted.bank.report()
        assert plain_classes(plain)
        assert report.trainable == plan.trainable == method.parameter_count(adapted.bank.view)
        assert sum(report.by_role.values()) == plan.trainable
        assert str(plan)
        assert str(report)

    @torch.no_grad()
    def test_disabled_equals_the_base(self, adapted: Adapted) -> None:
        with adapted.bank.disabled():
            assert torch.equal(adapted.model(adapted.images), adapted.base)
        assert torch.equal(adapted.model(adapted.images), adapted.outputs)

    @torch.no_grad()
    def test_save_and_load_under_another_name(self, adapted: Adapted, tmp_path: Path) -> None:
        cell, bank = adapted.cell, adapted.bank
        bank.save(tmp_path)
        model = cell.model(num_classes=3)
        loaded = vispeft.load(model, tmp_path, name="other_name")
        assert loaded.names == ["other_name"]
        assert torch.equal(model(adapted.images), adapted.outputs)
        path, method = tmp_path / "adapter.safetensors", METHODS[cell.method]
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        assert path.stat().st_size <= bank.report().stored_bytes + 2048 + 160 * len(names)
        header = json.loads((tmp_path / "adapter.json").read_text())
        assert set(header["tensors"]) == set(names)
        stored = sum(math.prod(entry["shape"]) for entry in header["tensors"].values())  # before packing to a few bits
        formula = method.file_method().parameter_count(bank.view)
        assert stored > formula if cell.method in STORES_MORE else stored == formula
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again/adapter.safetensors").read_bytes() == path.read_bytes()

    @torch.no_grad()
    def test_copies_are_independent(self, adapted: Adapted) -> None:
        twin = copy.deepcopy(adapted.model)
        bank = AdapterBank.of(twin)
        assert bank is not None
        assert bank is not adapted.bank
        move(bank, "default", seed=5)
        assert not torch.equal(twin(adapted.images), adapted.outputs)
        assert torch.equal(adapted.model(adapted.images), adapted.outputs)
        bank.detach("default")
        assert plain_classes(twin)
        assert torch.equal(adapted.model(adapted.images), adapted.outputs)
