"""Merging and unmerging: plain models, created biases, refusals, changes made in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.errors import (
    MergeError,
)

VIT = Cell("ssf", "vit")


def test_merge_without_originals_leaves_a_plain_model(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    bank.merge(keep_original=False)
    assert type(model) is VisionTransformer
    assert torch.allclose(model(VIT.images()), wanted, atol=1e-5)
    assert not [key for key in model.__dict__ if "vispeft" in key]
    plain = VIT.model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(VIT.images()), model(VIT.images()))
    with pytest.raises(MergeError, match="not kept"):
        bank.unmerge()


def test_a_refusal_says_whether_other_layers_merge(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.AdaptFormer(bottleneck=2), name="beside", verify=False)
    with pytest.raises(MergeError, match="Nothing of this adapter merges"):
        bank.merge()
    vispeft.attach(model, vispeft.LoRA(rank=2), name="inside", verify=False)
    bank.set_active(["beside", "inside"])
    with pytest.raises(MergeError, match=r"merge\(partial=True\) merges the others"):
        bank.merge()


def test_merged_models_refuse_to_be_changed(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model)
    wanted = bank.state_dict()
    bank.merge()
    with pytest.raises(MergeError, match="unmerge"):
        bank.set_active([])
    with pytest.raises(MergeError, match="unmerge"), bank.disabled():
        pass
    with pytest.raises(MergeError, match="unmerge"):
        vispeft.attach(model, vispeft.SSF(), name="two")
    bank.save(tmp_path)
    loaded = vispeft.load(VIT.model(), tmp_path)
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.state_dict().items())
    assert loaded._entries["default"].merge_error is not None


def test_every_adapter_of_a_merged_model_can_be_saved(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model, "one")
    vispeft.attach(model, vispeft.LoRA(), name="two")
    bank.merge()
    for name in ("one", "two"):
        bank.save(tmp_path / name, name)
        assert bank.report(name).adapter == name
    with pytest.raises(MergeError, match="unmerge"):
        bank.load_state_dict(bank.state_dict("one"), "one")


def test_missing_biases_are_made_and_reported() -> None:
    cell = Cell("ssf", "vit_clip")
    report = cell.attach(cell.model()).merge()
    assert report.created == ("patch_embed.proj.bias",)


def test_a_shift_behind_rms_norm_folds_forward() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, norm_layer=RmsNorm
    ).double()
    model.eval()
    bank = vispeft.attach(model, vispeft.SSF(roles=("norm1", "norm2", "attn.qkv")))
    move(bank, "default")
    images = VIT.images().double()
    wanted = model(images)
    report = bank.merge()
    assert torch.allclose(model(images), wanted, rtol=1e-10)
    assert set(report.merged) >= {"blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"}
    last = vispeft.attach(VIT.model(), vispeft.SSF())
    assert last.merge().kept == {}
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, norm_layer=RmsNorm)
    with pytest.raises(MergeError, match=r"norm.*no bias"):
        vispeft.attach(model, vispeft.SSF()).merge()


def test_unmerging_follows_a_move_and_notices_other_weights(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    bank.merge()
    model.double()
    bank.unmerge()
    assert torch.allclose(model(VIT.images().double()).float(), wanted, atol=1e-5)
    model.float()
    bank.merge()
    model.load_state_dict({key: tensor * 1.1 for key, tensor in model.state_dict().items()})
    with pytest.raises(MergeError, match="changed since"):
        bank.unmerge()


def test_a_classifier_that_starts_at_zero_hides_nothing() -> None:
    model = VIT.model()
    nn.init.zeros_(model.head.weight)
    bank = VIT.attach(model, moved=False)
    nn.init.zeros_(model.head.weight)
    assert bank.merge().max_error > 0


def test_a_unit_whose_weight_form_is_not_its_forward_pass_is_blamed() -> None:
    cell = Cell("lora", "vit")
    bank = cell.attach(cell.model())
    unit = next(iter(bank._entries["default"].units.values()))
    unit.fold_weight = lambda weight: 2 * weight
    with pytest.raises(MergeError, match="fold_bias or input_shift is not what its forward pass does"):
        bank.merge()
