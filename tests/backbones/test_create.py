"""`create_model`: names, arguments and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.backbones.small import ARCHITECTURE, ARGS, load
from vispeft.backbones.create import create_model
from vispeft.errors import BackboneError, ConfigError, UnknownNameError


def test_random_weights_are_timms_own_and_the_source_is_kept() -> None:
    torch.manual_seed(0)
    plain = timm.create_model(ARCHITECTURE, num_classes=5, **ARGS)
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, pretrained=False, num_classes=5, **ARGS)
    assert type(model) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    source = model.__dict__["_vispeft_source"]
    assert json.loads(json.dumps(source)) == source
    assert source == {"name": ARCHITECTURE, "args": {**ARGS, "num_classes": 5, "pretrained": False}}
    again = create_model(source["name"], **source["args"])
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.augreg_in22k", "augreg_in21k"),
        ("zo:vit", "zoo:"),
    ],
)
def test_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        create_model(name)


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="embed_dimm=3"):
        create_model(ARCHITECTURE, pretrained=False, embed_dimm=3)


def test_weights_and_pretrained_false_contradict(file: Path) -> None:
    with pytest.raises(ConfigError, match="pretrained=False"):
        load(file, pretrained=False)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", ARGS),
        ("deit_tiny_distilled_patch16_224", ARGS),
        ("eva02_tiny_patch14_224", {**ARGS, "embed_dim": 48, "num_heads": 3}),
        ("vit_small_patch16_dinov3", {**ARGS, "embed_dim": 48, "num_heads": 3}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        ),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        ),
    ],
)
@torch.no_grad()
def test_flexible_size(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, pretrained=False, num_classes=3, flexible_size=True, **args).eval()
    for size in ((32, 32), (64, 48), (48, 72)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)


def test_flexible_size_is_refused_where_a_family_has_no_way() -> None:
    with pytest.raises(BackboneError, match="mvitv2"):
        create_model("mvitv2_tiny", pretrained=False, flexible_size=True)
    with pytest.raises(BackboneError, match="dynamic_img_size"):
        create_model("hf-hub:someone/some", flexible_size=True)
