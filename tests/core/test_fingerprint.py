"""The fingerprint of the frozen weights: what it accepts, and which backbones it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vispeft
from tests.conformance.cells import Cell
from vispeft.errors import (
    BaseMismatchError,
)

VIT = Cell("ssf", "vit")


def test_fingerprint_accepts_the_same_weights(saved: Path) -> None:
    for make in (
        lambda: VIT.model(img_size=48),
        lambda: VIT.model().bfloat16(),
        lambda: VIT.model().half(),
        lambda: VIT.model().double(),
        lambda: VIT.model().bfloat16().float(),
        lambda: VIT.model(num_classes=17),
        lambda: VIT.model(num_classes=0),
        lambda: VIT.model(in_chans=1),
    ):
        assert vispeft.load(make(), saved).names == ["default"]


def test_fingerprint_of_a_half_precision_base(tmp_path: Path) -> None:
    VIT.attach(VIT.model().bfloat16()).save(tmp_path)
    vispeft.load(VIT.model(), tmp_path)
    vispeft.load(VIT.model().bfloat16(), tmp_path)
    other = VIT.model()
    other.blocks[0].mlp.fc2.weight.data[0, 0] += 1
    with pytest.raises(BaseMismatchError):
        vispeft.load(other, tmp_path)


def test_fingerprints_of_two_reduced_precisions(tmp_path: Path) -> None:
    """A model that was cast from one to the other is known; two roundings of float32 tell nothing of each other."""
    VIT.attach(VIT.model().bfloat16()).save(tmp_path / "bfloat16")
    VIT.attach(VIT.model().half()).save(tmp_path / "float16")
    vispeft.load(VIT.model().bfloat16().half(), tmp_path / "bfloat16")
    vispeft.load(VIT.model().half().bfloat16(), tmp_path / "float16")
    with pytest.raises(BaseMismatchError, match=r"saved on weights in bfloat16, and these are in float16"):
        vispeft.load(VIT.model().half(), tmp_path / "bfloat16")
    other = VIT.model().bfloat16().half()
    other.blocks[0].mlp.fc2.weight.data[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="1 of"):
        vispeft.load(other, tmp_path / "bfloat16")


@pytest.mark.parametrize("change", [1e-6, 1.0])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "cls_token", "pos_embed", "norm.bias"])
def test_fingerprint_refuses_one_changed_weight(saved: Path, name: str, change: float) -> None:
    model = VIT.model()
    model.get_parameter(name).data.view(-1)[3] += change
    with pytest.raises(BaseMismatchError, match=name.split(".weight")[0].split(".mlp")[0].split(".bias")[0]):
        vispeft.load(model, saved)
    assert type(model) is VisionTransformer
    vispeft.load(model, saved, allow_base_mismatch=True)


def test_a_tensor_that_survives_rounding_hides_no_change_beside_it(tmp_path: Path) -> None:
    model = VIT.model()
    torch.nn.init.zeros_(model.blocks[1].attn.proj.bias)  # as in many a pretrained model
    other = copy.deepcopy(model)
    VIT.attach(model).save(tmp_path)
    other.blocks[1].mlp.fc2.weight.data[0, 0] += 1e-6  # less than bfloat16 tells apart
    with pytest.raises(BaseMismatchError, match=r"blocks\.1"):
        vispeft.load(other, tmp_path)


def test_other_architectures_are_refused(saved: Path) -> None:
    deeper = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    with pytest.raises(BaseMismatchError, match="another architecture"):
        vispeft.load(deeper, saved)
    wider = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(BaseMismatchError):
        vispeft.load(wider, saved)


def test_a_backbone_that_computes_something_else_is_refused(saved: Path) -> None:
    for options, says in (
        ({"act_layer": "quick_gelu"}, "mlp.act"),
        ({"num_heads": 6}, "heads"),
        ({"global_pool": "avg", "fc_norm": False}, "pooling 'token'"),
    ):
        with pytest.raises(BaseMismatchError, match=says):
            vispeft.load(VIT.model(**options), saved)


def test_a_cut_model_is_taken_only_without_a_classifier(saved: Path) -> None:
    with pytest.raises(BaseMismatchError, match="another architecture"):
        vispeft.load(VIT.model(depth=1), saved)
    assert vispeft.load(VIT.model(depth=1, num_classes=0), saved).names == ["default"]
