"""Methods that change weights: counts, sizes of files, start values, and what they refuse."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import vispeft
from tests.conformance.cells import BACKBONES, Cell
from vispeft.errors import BackboneError, ConfigError, FileError, SiteError, VispeftError
from vispeft.methods.mask import THRESHOLD
from vispeft.methods.pst import sparse_size
from vispeft.methods.sparse import SparseUnit
from vispeft.storage.codecs import Rice

QP, ALL = ("attn.qkv", "attn.proj"), ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (vispeft.Bone(rank=64), 5_308_416),
        (vispeft.Bone(rank=16), 1_327_104),
        (vispeft.Bone(rank=16, variant="bat"), 1_327_104),
        (vispeft.Bone(rank=8, mini=12), 48 * 96),
        (vispeft.SVFit(rank=768, roles=QP), 18_432),
        (vispeft.SVFit(), 36_864),
        (vispeft.Mask(roles=("patch_embed", *QP)), 28_901_376),
        (vispeft.Sparse(budget="lora:4"), 12 * 4 * (3072 + 1536 + 3840 + 3840)),
        (vispeft.Sparse(budget="bitfit"), 12 * (2304 + 768 + 3072 + 768)),
        (vispeft.Sparse(budget=0.01), 12 * (17694 + 5898 + 2 * 23592)),
        (vispeft.PST(), 2_506_752),
        (vispeft.SNELL(), 2_654_208),
        (vispeft.MoS(roles=("attn.proj",)), 36_864),
    ],
    ids=str,
)
def test_counts_of_a_vit_b(method: vispeft.Method, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert vispeft.plan(model, method).trainable == count
    assert method.parameter_count(vispeft.core.families.describe(model)) == count


@pytest.mark.parametrize(
    ("backbone", "snell", "shared", "base"),
    [
        ("swin_tiny_patch4_window7_224", 1_271_808, 3_024, 1_599_546),
        ("swin_base_patch4_window7_224", 3_465_216, 6_048, None),
    ],
)
def test_counts_of_a_swin(backbone: str, snell: int, shared: int, base: int | None) -> None:
    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=0)
    view = vispeft.core.families.describe(model)
    assert vispeft.SNELL().parameter_count(view) == vispeft.plan(model, vispeft.SNELL()).trainable == snell
    tasks = ("seg", "parts", "sal", "normals")
    trains = dict.fromkeys(("train_patch_embed", "train_norms", "train_rel_pos", "train_merging"), False)
    maps = vispeft.DiTASK(tasks=tasks, **trains)
    assert vispeft.plan(model, maps).trainable == maps.parameter_count(view) == shared + 144
    if base is not None:
        assert vispeft.DiTASK(tasks=tasks).parameter_count(view) == shared + 144 + base


def test_density_of_lifts_budgets() -> None:
    with torch.device("meta"):
        view = vispeft.core.families.describe(timm.create_model("vit_base_patch16_224"))
    whole = vispeft.Mask(roles=ALL).parameter_count(view)
    shares = {r: vispeft.Sparse(budget=f"lora:{r}").parameter_count(view) / whole for r in (4, 8, 16, 32, 64)}
    assert {r: round(100 * share, 1) for r, share in shares.items()} == {4: 0.7, 8: 1.4, 16: 2.8, 32: 5.6, 64: 11.1}


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("vit", lambda: vispeft.Bone(rank=5, variant="bat"), SiteError, "72 x 24.*divisor"),
    ("vit", lambda: vispeft.Bone(rank=25), SiteError, "fewer columns.*at most 24"),
    ("vit", lambda: vispeft.Bone(rank=3, mini=5), SiteError, "multiple of mini"),
    ("vit", lambda: vispeft.Bone(rank=3, mini=5, variant="bat"), ConfigError, "mini form"),
    ("vit", lambda: vispeft.Bone(roles=("patch_embed",)), SiteError, "linear layers"),
    ("vit", lambda: vispeft.SVFit(rank=25), SiteError, "no layer has more than 24"),
    ("vit", lambda: vispeft.SVFit(rank=2, energy=0.5), ConfigError, "Give one"),
    ("vit", lambda: vispeft.SVFit(energy=1.5), ConfigError, "at most 1"),
    ("vit", lambda: vispeft.SVFit(roles=("norm1",)), SiteError, "neither"),
    ("vit", lambda: vispeft.Mask(roles=("norm1",)), SiteError, "neither"),
    ("vit", lambda: vispeft.Mask(dropout=1.5), ConfigError, "from 0 to 1"),
    ("vit", lambda: vispeft.Sparse(roles=("norm1",)), SiteError, "neither"),
    ("vit", lambda: vispeft.PST(rank=30), SiteError, "rank is lower"),
    ("vit", lambda: vispeft.PST(sparsity=1.0), ConfigError, "share"),
    ("vit", lambda: vispeft.SNELL(dim=3), ConfigError, "even number"),
    ("vit", lambda: vispeft.MoS(shards=5), SiteError, "do not divide"),
    ("vit", lambda: vispeft.MoS(private=3), ConfigError, "from 0 to it"),
    ("vit", lambda: vispeft.MoS(private=2), ConfigError, "nothing is shared"),
    ("vit", lambda: vispeft.MoS(rank=1), ConfigError, "leaves some unused"),
    ("swin", lambda: vispeft.DiTASK(tasks=("a", "b"), cells=1), ConfigError, "at least 2 cells"),
    ("swin", lambda: vispeft.DiTASK(), ConfigError, "no tasks"),
    ("vit", lambda: vispeft.Sparse(budget=10**9), ConfigError, "the weights have"),
    ("vit", lambda: vispeft.Sparse(budget="lora"), ConfigError, "'lora:R'"),
    ("vit", lambda: vispeft.Sparse(budget=1.0), ConfigError, "share between"),
    ("vit", lambda: vispeft.Sparse(budget=True), ConfigError, "whole number"),
    ("vit", lambda: vispeft.Sparse(support="lift", principal=30), SiteError, "24 singular values"),
    ("vit", lambda: vispeft.Sparse(budget="row:25"), ConfigError, "25 entries of a row.*have 24"),
    ("vit", lambda: vispeft.Sparse(budget="row:0"), ConfigError, "'row:K'"),
    ("vit", lambda: vispeft.Sparse(support="gps"), ConfigError, "in each output row.*'row:1'"),
    ("vit", lambda: vispeft.Sparse(budget="row:2", schedule="rigl"), ConfigError, "another budget"),
    ("vit", lambda: vispeft.Sparse(schedule="lt", support="magnitude"), ConfigError, "support='random'"),
    ("vit", lambda: vispeft.Sparse(schedule="lift"), ConfigError, "schedule='lift', support='random'.*support='lift'"),
    ("vit", lambda: vispeft.Sparse(schedule="lt", support="given", source="a.safetensors"), ConfigError, "itself"),
    ("vit", lambda: vispeft.Sparse(schedule="lt", dense_lr=0.0), ConfigError, "above zero"),
    ("vit", lambda: vispeft.Sparse(schedule="lt", dense_lr=float("nan")), ConfigError, "above zero"),
    ("vit", lambda: vispeft.PST(roles=("patch_embed",)), SiteError, "linear layers"),
    ("vit", lambda: vispeft.SNELL(roles=("patch_embed",)), SiteError, "linear layers"),
    ("vit", lambda: vispeft.MoS(roles=("patch_embed",)), SiteError, "linear layers"),
    ("vit", lambda: vispeft.Sparse(support="given"), ConfigError, "needs source"),
    ("vit", lambda: vispeft.Sparse(source="entries.safetensors"), ConfigError, "'given' alone"),
    ("vit", lambda: vispeft.Sparse(source="nowhere.safetensors", support="given"), FileError, "no safetensors file"),
]


@pytest.mark.parametrize(("backbone", "make", "error", "says"), REFUSED)
def test_refusals_name_the_reason(backbone: str, make: Any, error: type[Exception], says: str) -> None:
    model = BACKBONES[backbone].make()
    before = list(model.state_dict())
    with pytest.raises(error, match=f"(?s){says}"):
        vispeft.attach(model, make())
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    "method",
    [
        vispeft.SVFit(),
        vispeft.Sparse(support="lift", principal=2),
        vispeft.LoRA(start="pissa", rank=2, roles=("mlp.fc1",)),
        vispeft.DiTASK(tasks=("a", "b"), cells=6),
    ],
    ids=lambda method: method.name,
)
def test_weights_that_are_not_finite_have_no_singular_values(method: vispeft.Method) -> None:
    model = BACKBONES["vit"].make()
    model.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(BackboneError, match=r"blocks\.1\.mlp\.fc1\.weight.*not finite"):
        vispeft.attach(model, method)


def test_energy_chooses_the_rank_of_each_layer(tmp_path: Path) -> None:
    cell = Cell("svfit", "swin", short=True)
    model, images = cell.model(), cell.images()
    bank = vispeft.attach(model, vispeft.SVFit(energy=0.8))
    ranks = [len(tensor) for key, tensor in bank.named_tensors().items() if key.endswith("shift")]
    assert len(set(ranks)) > 1
    for key, tensor in bank.named_tensors().items():
        if key.endswith("shift"):
            values = torch.linalg.svdvals(model.get_submodule(key.split("/")[0])._parameters["weight"].double())
            kept = values.square().cumsum(0) / values.square().sum()
            assert kept[len(tensor) - 1] >= 0.8 > (kept[len(tensor) - 2] if len(tensor) > 1 else 0)
            tensor.data += 0.1
    bank.save(tmp_path)
    again = cell.model()
    vispeft.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    with pytest.raises(ConfigError, match="no closed count"):
        vispeft.SVFit(energy=0.8).parameter_count(bank.view)


def test_pruning_follows_the_steps_and_is_kept(tmp_path: Path) -> None:
    cell = Cell("pst", "vit", short=True)
    model, images = cell.model(), cell.images()
    bank = vispeft.attach(model, vispeft.PST(sparsity=0.8, rank=2, mask_rank=2))
    (callback,) = bank.callbacks()
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=20)
    shares = []
    for step in range(20):
        trainer.global_step = step
        callback.on_train_batch_start(trainer, SimpleNamespace(bank=bank), None, step)
        shares.append({round(int(unit.pruned) / unit.size, 2) for unit in bank.units().values()})
    assert shares[:3] == [{0.0}] * 3
    assert shares[-5:] == [{0.8}] * 5
    bank.save(tmp_path)
    again = cell.model()
    vispeft.load(again, tmp_path)
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(again(images), wanted)
        bank.merge()
    kept, size = sparse_size(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    weights = vispeft.Mask(roles=ALL).parameter_count(bank.view)
    assert abs(kept - (total - 0.8 * weights)) <= 8
    assert size < 4 * total - 3 * 0.8 * weights
    trainer.estimated_stepping_batches = float("inf")
    with pytest.raises(ConfigError, match="no end"):
        callback.on_train_start(trainer, None)


def test_a_mask_takes_one_bit_per_weight(tmp_path: Path) -> None:
    cell = Cell("mask", "vit")
    model = cell.model()
    bank = cell.attach(model)
    bank.save(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.nbytes for t in stored.values()) == vispeft.Mask().parameter_count(bank.view) // 8
    assert {t.dtype for t in stored.values()} == {torch.uint8}
    masks = {key: t > THRESHOLD for key, t in bank.named_tensors().items() if key.endswith(".M")}
    assert all(0 < float(mask.float().mean()) < 1 for mask in masks.values())
    again = cell.model()
    loaded = vispeft.load(again, tmp_path)
    assert all(torch.equal(loaded.named_tensors()[key], mask.float()) for key, mask in masks.items())


@pytest.mark.parametrize(
    ("share", "most"), [(0.01, 4.4), (0.011, 4.4), (0.02, 4.3), (0.1, 4.0), (0.001, 4.9), (1e-4, 6.0)]
)
def test_bytes_of_a_kept_entry(share: float, most: float) -> None:
    """The bar is 5 bytes from a density of 1 % on, and 6 below; values are normal, as trained ones nearly are."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1)
    bank = vispeft.attach(model, vispeft.Sparse(budget=share), verify=False)
    for tensor in bank.named_tensors().values():
        torch.nn.init.normal_(tensor, std=1e-3, generator=torch.Generator().manual_seed(2))
    assert bank.report().stored_bytes / bank.report().trainable <= most


def test_files_of_earlier_versions_load_and_are_written_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell = Cell("sparse", "vit", short=True)
    bank = cell.attach(cell.model())
    with monkeypatch.context() as patch:
        patch.setattr(SparseUnit, "codecs", lambda self: {"positions": "rice"})
        bank.save(tmp_path / "before")
    bank.save(tmp_path / "now")
    sizes = [(tmp_path / name / "adapter.safetensors").stat().st_size for name in ("before", "now")]
    assert sizes[1] < sizes[0]
    for name in ("before", "now"):
        again = vispeft.load(cell.model(), tmp_path / name)
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in bank.state_dict().items())
        again.save(tmp_path / f"{name}_again")
        assert (tmp_path / f"{name}_again" / "adapter.safetensors").read_bytes() == (
            tmp_path / "now" / "adapter.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("positions", [[], [0], [7], [0, 1, 2], [3, 2**31 - 1], [5, 6, 10**6]])
def test_positions_in_whole_bits(positions: list[int]) -> None:
    given = torch.tensor(positions, dtype=torch.int64)
    stored = Rice().encode(given)
    assert torch.equal(Rice().decode(stored, (len(positions),), torch.int64), given)
    for broken in (stored[:0], stored[:-1], torch.cat([stored, stored.new_tensor([0])])):
        if len(broken) != 1 or positions:
            with pytest.raises(FileError):
                Rice().decode(broken, (len(positions),), torch.int64)


def test_a_file_cannot_make_the_decoder_allocate_far_more_than_its_size() -> None:
    zeros = torch.zeros(4_000_000, dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(FileError, match="their ends do not fit"):
        Rice().decode(zeros, (3,), torch.int64)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * len(zeros)


@pytest.mark.parametrize("step", [1, 7, 300])
def test_positions_of_several_blocks(step: int) -> None:
    positions = torch.arange(0, 40_000 * step, step) + torch.arange(40_000) // 3
    stored = Rice().encode(positions)
    assert torch.equal(Rice().decode(stored, (40_000,), torch.int64), positions)


def test_positions_beyond_the_weight_are_refused(tmp_path: Path) -> None:
    cell = Cell("sparse", "vit", short=True)
    model = cell.model()
    bank = cell.attach(model)
    units = [unit for unit in bank.units().values() if isinstance(unit, SparseUnit)]
    units[0].positions[-1] = 10**6
    bank.save(tmp_path)
    fresh = cell.model()
    before = list(fresh.state_dict())
    with pytest.raises(FileError, match=r"entry 1000000.*the weight has"):
        vispeft.load(fresh, tmp_path)
    assert list(fresh.state_dict()) == before


def test_the_largest_entries_are_chosen() -> None:
    model = Cell("sparse", "vit").model()
    bank = vispeft.attach(model, vispeft.Sparse(budget=0.05, support="magnitude"))
    for key, unit in bank.units().items():
        assert isinstance(unit, SparseUnit)
        weight = model.get_submodule(key.split("/")[0])._parameters["weight"].flatten().abs()
        chosen = weight[unit.positions.long()]
        rest = weight.index_fill(0, unit.positions.long(), 0)
        assert chosen.min() >= rest.max()


def test_gradients_over_the_data_choose_entries() -> None:
    cell = Cell("sparse", "swin", short=True)
    model = cell.model()
    bank = vispeft.attach(model, vispeft.Sparse(budget=30, support="gradient"))
    loader = [(cell.images(3), torch.tensor([0, 1, 4])), (cell.images(2) * 2, torch.tensor([2, 2]))]
    bank.start_from(loader)
    plain = cell.model().train()
    for images, labels in loader:
        F.cross_entropy(plain(images), labels, reduction="sum").backward()
    for key, unit in bank.units().items():
        assert isinstance(unit, SparseUnit)
        wanted = plain.get_submodule(key.split("/")[0]).weight.grad.abs().flatten().topk(len(unit.values)).indices
        assert torch.equal(unit.positions.long(), wanted.sort().values)
    assert all(tensor.grad is None for _, tensor in bank.trainable_parameters())
    with pytest.raises(ConfigError, match="Choose another support"):
        bank.start_from([(cell.images(), {"depth": torch.zeros(2)})])
    with pytest.raises(ConfigError, match="such as values of a regression"):
        bank.start_from([(cell.images(), torch.full((2, 5), 1.5))])
    with pytest.raises(ConfigError, match="no backward pass"):
        bank.start_from([])
    found = [unit.positions.clone() for unit in bank.units().values()]
    for unit in bank.units().values():
        unit.positions.zero_()
    bank.compile(backend="eager")
    bank.start_from(loader)
    assert all(torch.equal(a, unit.positions) for a, unit in zip(found, bank.units().values(), strict=True))


def test_entries_from_a_file(tmp_path: Path) -> None:
    model = Cell("sparse", "vit", short=True).model()
    method = vispeft.Sparse(
        budget=0.1, support="given", source=str(tmp_path / "entries.safetensors"), roles=("mlp.fc1",)
    )
    count = int(0.1 * 24 * 96)
    save_file({"blocks.0.mlp.fc1": torch.arange(count)}, tmp_path / "entries.safetensors")
    bank = vispeft.attach(model, method)
    assert torch.equal(bank.units()["blocks.0.mlp.fc1/sparse"].positions, torch.arange(count).int())
    bank.save(tmp_path / "adapter")
    vispeft.load(Cell("sparse", "vit", short=True).model(), tmp_path / "adapter")
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"blocks.1.mlp.fc1": torch.arange(count)}, "no entries for"),
        ({"blocks.0.mlp.fc1": torch.arange(count - 1)}, "are needed"),
        ({"blocks.0.mlp.fc1": torch.zeros(count).long()}, "are needed"),
        ({"blocks.0.mlp.fc1": torch.arange(count) + 24 * 96}, "whose weight has"),
    ]
    for tensors, says in wrong:
        save_file(tensors, tmp_path / "entries.safetensors")
        with pytest.raises(VispeftError, match=says):
            vispeft.attach(Cell("sparse", "vit", short=True).model(), method)


def test_gradient_dropout_takes_entries_of_disagreeing_gradients() -> None:
    cell = Cell("mask", "vit", short=True)
    images, labels = cell.images(4), torch.tensor([0, 1, 2, 3])
    grads = {}
    for share in (0.0, 1.0):
        model = cell.model()
        bank = vispeft.attach(model, vispeft.Mask(dropout=share, penalty=1e-4), verify=False)
        if share:
            bank.start_from([(images, labels.roll(1))])
        for scale in (1.0, 1024.0):
            model.zero_grad()
            torch.manual_seed(3)
            output = model(images)
            term = bank.loss_terms((images, labels), output)
            assert term is not None
            ((F.cross_entropy(output, labels) + term) * scale).backward()
            grads[share, scale] = torch.cat(
                [(t.grad / scale).flatten() for k, t in bank.named_tensors().items() if k.endswith(".M")]
            )
    kept = grads[1.0, 1.0] != 0
    assert 0.3 < float(kept.float().mean()) < 1
    assert torch.allclose(grads[1.0, 1.0][kept], grads[0.0, 1.0][kept], rtol=1e-4, atol=1e-9)
    # A loss that is scaled, as in float16, drops the same entries.
    assert float((kept != (grads[1.0, 1024.0] != 0)).float().mean()) < 1e-3


def test_gradients_of_some_masks_are_dropped_where_a_schedule_trains_some_blocks() -> None:
    cell = Cell("mask", "vit", short=True)
    images, labels = cell.images(4), torch.tensor([0, 1, 2, 3])
    model = cell.model()
    bank = vispeft.attach(model, vispeft.Mask(dropout=1.0, penalty=1e-4), verify=False)
    bank.start_from([(images, labels.roll(1))])
    masks = [tensor for name, tensor in bank.named_tensors().items() if name.endswith(".M")]
    for chosen in (masks[:1], []):
        model.zero_grad()
        for mask in masks:
            mask.requires_grad_(any(mask is one for one in chosen))
        output = model(images)
        term = bank.loss_terms((images, labels), output)
        loss = F.cross_entropy(output, labels) + (0 if term is None else term)
        if chosen:
            loss.backward()
            assert masks[0].grad is not None
            assert masks[0].grad.ne(0).any()
        assert all(mask.grad is None for mask in masks[len(chosen) :])


def test_the_teacher_knows_the_training_images(tmp_path: Path) -> None:
    cell = Cell("mask", "swin", short=True)
    images, labels = cell.images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    model = cell.model()
    bank = vispeft.attach(model, vispeft.Mask(dropout=0.3))
    bank.start_from([(images, labels)])
    teacher = bank.units()[
        "/teacher" if "/teacher" in bank.units() else next(k for k in bank.units() if "teacher" in k)
    ]
    with torch.no_grad(), bank.disabled():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(F.linear(features, teacher.weight, teacher.bias).argmax(1), labels)
    bank.save(tmp_path)
    vispeft.load(cell.model(num_classes=2), tmp_path)  # nothing of the teacher is in the file
    with pytest.raises(ConfigError, match="one class number per image"):
        bank.start_from([(images, torch.rand(6, 5))])
    with pytest.raises(ConfigError, match="no classes"):
        vispeft.attach(cell.model(num_classes=0), vispeft.Mask(dropout=0.3))
