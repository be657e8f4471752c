"""Tensors that several units of one adapter share: FacT's factors and Compacter's rule."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.low_rank import Dropout
from vispeft.core.method import Method, PlanItem
from vispeft.core.sites import View
from vispeft.core.units import DeltaUnit
from vispeft.errors import ConfigError, SiteError

VIT, SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"
PHM_ADAPTER = vispeft.Compacter(phm_dim=12, rank=None, shared_rule=False)
COUNTS = {
    (VIT, vispeft.FacT(rank=16)): 61_440,
    (SWIN, vispeft.FacT(rank=16)): 135_168,
    (VIT, vispeft.FacT(rank=32, variant="tk")): 86_528,
    (SWIN, vispeft.FacT(rank=16, variant="tk")): 82_432,
    (VIT, vispeft.Compacter()): 57_088,
    (VIT, vispeft.Compacter(roles=("mlp",))): 28_576,
    (VIT, vispeft.Compacter(train_layernorm=True)): 57_088 + 38_400,
    (SWIN, vispeft.Compacter()): 74_512,
    (SWIN, vispeft.Compacter(roles=("mlp",))): 37_288,
    (SWIN, vispeft.Compacter(train_layernorm=True)): 74_512 + 57_600,
    (VIT, PHM_ADAPTER): 175_680,
}
"""Counts of the specifications."""


@pytest.mark.parametrize(("entry", "count"), COUNTS.items(), ids=lambda value: str(value)[:70])
def test_counts(entry: tuple[str, vispeft.Method], count: int) -> None:
    name, method = entry
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = vispeft.plan(model, method)
    assert plan.trainable == count


def test_a_rule_that_does_not_divide_is_refused_with_the_width() -> None:
    with torch.device("meta"):
        model = timm.create_model(SWIN)
    with pytest.raises(ConfigError, match=r"phm_dim=12.*128 wide"):
        vispeft.plan(model, PHM_ADAPTER)


def shared_tensors(bank: vispeft.AdapterBank) -> set[str]:
    return {key for key in bank.state_dict() if "fact_factors" in key}


def test_one_set_for_a_vit_and_one_per_stage_for_a_swin(tmp_path: Path) -> None:
    for backbone, sets in (("vit", ["blocks.0"]), ("swin", ["layers.0.blocks.0", "layers.1.blocks.0"])):
        cell = Cell("fact", backbone)
        model = cell.model()
        bank = cell.attach(model)
        assert shared_tensors(bank) == {f"{path}/fact_factors.{name}" for path in sets for name in "UV"}
        assert len([name for name in model.state_dict() if "fact_factors" in name]) == 2 * len(sets)
        bank.save(tmp_path / backbone)
        assert shared_tensors(bank) <= set(load_file(tmp_path / backbone / "adapter.safetensors"))


def test_every_layer_reads_the_one_set() -> None:
    cell = Cell("fact", "vit")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    lenders = {id(unit.lender) for key, unit in bank._entries["default"].units.items() if key.endswith("/fact")}
    assert len(lenders) == 1
    before = [m.detach().clone() for m in model.forward_intermediates(images, intermediates_only=True)]
    with torch.no_grad():
        bank.named_tensors()["blocks.0/fact_factors.U"].mul_(2)
    after = model.forward_intermediates(images, intermediates_only=True)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_share_among_themselves_only(way: str) -> None:
    cell = Cell("fact_tk", "vit")
    model, images = cell.model(), cell.images()
    cell.attach(model)
    with torch.no_grad():
        wanted = model(images)
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert torch.equal(twin(images), wanted)
        bank = vispeft.AdapterBank.of(twin)
        for tensor in bank.named_tensors().values():
            tensor.zero_()
        assert torch.equal(model(images), wanted)
        with bank.disabled():
            bare = twin.forward_features(images)
        assert torch.allclose(twin.forward_features(images), bare, atol=1e-6)


def test_moves_and_functional_calls_reach_the_shared_tensors() -> None:
    cell = Cell("fact", "swin")
    model, images = cell.model(), cell.images()
    cell.attach(model)
    with torch.no_grad():
        wanted = model(images)
        model.double()
        assert torch.allclose(model(images.double()).float(), wanted, atol=1e-5)
        zeros = {name: torch.zeros_like(t) for name, t in model.named_parameters() if "fact_factors" in name}
        changed = torch.func.functional_call(model, zeros, (images.double(),))
    assert not torch.allclose(changed.float(), wanted, atol=1e-4)


@pytest.mark.parametrize("variant", ["tt", "tk"])
@pytest.mark.parametrize("backbone", ["vit", "eva02", "vit_glu"])
def test_the_term_is_the_product_of_its_factors(variant: str, backbone: str) -> None:
    """Dropout takes another way through the factors; without it both must agree."""
    model = Cell("fact", backbone).model().double()
    bank = vispeft.attach(model, vispeft.FacT(rank=3, variant=variant, scale=1.5))
    move(bank, "default")
    for item in bank.plan():
        unit = bank._entries["default"].units[item.key].eval()
        if isinstance(unit, DeltaUnit):
            (plain,), (dropping,) = unit.branches(), unit.train().branches()
            assert (plain.a.shape[0], plain.dropout.share) == (3, 0)
            assert dropping.dropout == Dropout(0.1, "hidden")
            assert torch.allclose(dropping.b @ dropping.a, plain.b @ plain.a, rtol=1e-10, atol=1e-12), item.key
            assert plain.scale == dropping.scale == 1.5


def test_a_partial_merge_leaves_what_others_need() -> None:
    cell = Cell("compacter", "vit")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    with torch.no_grad():
        wanted = model(images)
        report = bank.merge(partial=True)
        assert report.kept["blocks.0"] == "layers that stay adapted use its tensors"
        assert torch.equal(model(images), wanted)
        model.double()
        assert torch.allclose(model(images.double()).float(), wanted, atol=1e-4)


def test_fact_refuses_other_layers() -> None:
    with pytest.raises(SiteError, match="linear layers of the blocks"):
        vispeft.attach(Cell("fact", "vit").model(), vispeft.FacT(roles=("norm1",)))


@dataclass(frozen=True, kw_only=True)
class Backwards(Method):
    """Plans a borrower in front of its lender."""

    name: ClassVar[str] = "backwards"

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Turn the order of two of FacT's items around."""
        first, second, *_ = vispeft.FacT().items(view, model)
        yield from (second, replace(first, lender=None))


def test_a_lender_must_come_first() -> None:
    with pytest.raises(ConfigError, match=r"tensors of blocks\.0/fact_factors.*Yield the lender first"):
        vispeft.attach(Cell("fact", "vit").model(), Backwards())


def test_the_shared_rule_starts_small_and_trains() -> None:
    cell = Cell("compacter", "vit")
    model = cell.model()
    bank = cell.attach(model, moved=False)
    rule = bank.named_tensors()["blocks.0/compacter_rule.rule"]
    assert 0 < rule.abs().max() < 1e-3
    groups = bank.parameter_groups(0.1, 0.5)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(rule)] == 0.0
