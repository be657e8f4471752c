"""`create_model("zoo:NAME")`: shipped backbones, and damaged ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.backbones.small import ARCHITECTURE, ARGS, tiny
from vispeft.backbones.create import create_model
from vispeft.errors import FileError, UnknownNameError
from vispeft.zoo import list_zoo_backbones, zoo_folder


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo elsewhere, with one backbone in half precision."""
    folder = tmp_path / "zoo" / "backbones" / "mini"
    folder.mkdir(parents=True)
    save_file({k: v.half() for k, v in tiny().state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "args": ARGS,
        "num_classes": 7,
        "preprocessing": {
            "input_size": [3, 32, 32],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
        },
        "license": "Apache-2.0",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("VISPEFT_ZOO", str(tmp_path / "zoo"))
    return folder


@torch.no_grad()
def test_zoo_backbone(zoo: Path) -> None:
    assert list_zoo_backbones() == ["mini"]
    model = create_model("zoo:mini").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), tiny().half().float()(images))
    described = timm.data.resolve_model_data_config(model)
    assert described["input_size"] == (3, 32, 32)
    assert described["mean"] == (0.1, 0.2, 0.3)
    assert described["interpolation"] == "bilinear"
    assert model.__dict__["_vispeft_source"] == {"name": "zoo:mini", "args": {}}
    assert create_model("zoo:mini", num_classes=3, img_size=48).pos_embed.shape == (1, 37, 24)
    fresh = create_model("zoo:mini", pretrained=False)
    assert fresh.num_classes == 7
    assert not torch.equal(fresh.norm.weight, model.norm.weight)


def test_zoo_errors(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="'mini'"):
        create_model("zoo:minni")
    weights = zoo / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(bytes(whole))
    with pytest.raises(FileError, match="sha256"):
        create_model("zoo:mini")
    weights.unlink()
    with pytest.raises(FileError, match="missing"):
        create_model("zoo:mini")
    (zoo / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"config\.json"):
        create_model("zoo:mini")
    monkeypatch.setenv("VISPEFT_ZOO", str(zoo))
    with pytest.raises(FileError, match="VISPEFT_ZOO"):
        create_model("zoo:mini")


def test_every_shipped_backbone_loads_and_is_small() -> None:
    names = list_zoo_backbones()
    assert {"vit_tiny", "swin_tiny"} <= set(names)
    for name in names:
        folder = zoo_folder() / "backbones" / name
        model = create_model(f"zoo:{name}").eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        with torch.no_grad():
            assert torch.isfinite(model(torch.zeros(1, *size))).all()
        assert (folder / "model.safetensors").stat().st_size < 8_000_000
        card = (folder / "CARD.md").read_text(encoding="utf-8")
        assert name in card
        assert "License" in card or "Licence" in card
