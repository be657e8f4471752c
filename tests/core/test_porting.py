"""Adapters on another checkpoint of their backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.ported_files import port_file
from vispeft.errors import BaseMismatchError, ConfigError, DataError
from vispeft.tasks import refit_head

METHODS: dict[str, tuple[vispeft.Method, str]] = {
    "lora": (vispeft.LoRA(rank=2), "lora"),
    "pissa": (vispeft.LoRA(rank=2, start="pissa"), "lora"),
    "sparse": (vispeft.Sparse(budget=0.02), "sparse"),
    "svfit": (vispeft.SVFit(rank=3), "lora"),
    "norms": (vispeft.NormTuning(), "norm_tuning"),
    "ssf": (vispeft.SSF(), "ssf"),
    "adapter": (vispeft.Adapter(bottleneck=4), "adapter"),
}
QUICK = ("lora", "svfit")
ADDITIVE = ("lora", "pissa", "sparse", "svfit", "norms")


def drifted(model: Any, share: float) -> Any:
    """Change each tensor of a model by a share of its norm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith("head"):
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.add_(noise * share * tensor.norm() / noise.norm())
    return model


def adapted(backbone: str, method: vispeft.Method) -> tuple[Any, AdapterBank, Tensor]:
    cell = Cell("lora", backbone)
    model = cell.model().double().eval()
    bank = vispeft.attach(model, method, name="mine", verify=False)
    move(bank, "mine")
    return model, bank, cell.images().double()


def fresh(backbone: str) -> Any:
    return Cell("lora", backbone).model().double().eval()


def merged(bank: AdapterBank) -> dict[str, Tensor]:
    """Return what an adapter changes, by merging it."""
    base = {key: tensor.clone() for key, tensor in bank.base_tensors()}
    bank.merge()
    found = {key: tensor - base[key] for key, tensor in bank.model.state_dict().items() if key in base}
    bank.unmerge()
    return found


@pytest.mark.parametrize("backbone", ["vit", "swin"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_an_adapter_is_carried_to_other_weights(name: str, backbone: str) -> None:
    method, holder = METHODS[name]
    model, bank, images = adapted(backbone, method)
    with torch.no_grad():
        before = model(images)
    same = bank.port(fresh(backbone))
    assert (same.method, same.drift.total) == (holder, 0.0)
    with torch.no_grad():
        assert torch.allclose(same.bank.model(images), before, atol=1e-8)
    other = bank.port(drifted(fresh(backbone), 0.01))
    assert other.drift.total == pytest.approx(0.01, rel=1e-6)
    assert all(drift == pytest.approx(0.01, rel=1e-3) for drift in other.drift.layers.values())
    if name in ADDITIVE:  # the change is the same one
        old, new = merged(bank), merged(other.bank)
        assert all(torch.allclose(new[key], old[key], atol=1e-6) for key in old)
    else:
        assert any(word in other.notes[-1] for word in ("applied to the new weights", "copied as they are"))
    with torch.no_grad():
        assert torch.equal(model(images), before)  # the old model is left as it was


def test_rules_can_be_carried_as_differences() -> None:
    _, bank, _ = adapted("vit", vispeft.SSF())
    ported = bank.port(drifted(fresh("vit"), 0.01), as_delta=True)
    assert ported.method == "full"
    old, new = merged(bank), merged(ported.bank)
    assert all(torch.allclose(new[key], old[key], atol=1e-6) for key in old)


def test_drift_is_warned_of_and_refused(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    _, bank, _ = adapted("vit", vispeft.LoRA(rank=2))
    assert bank.port(drifted(fresh("vit"), 0.015)).notes == ()
    found = bank.port(drifted(fresh("vit"), 0.05))
    assert "5.00 % away" in found.notes[0] == caplog.messages[-1]
    plain = drifted(fresh("vit"), 0.2)
    with pytest.raises(BaseMismatchError, match="allow_drift=True"):
        bank.port(plain)
    assert AdapterBank.of(plain) is None  # refused before anything is changed
    far = bank.port(plain, allow_drift=True)
    far.bank.save(tmp_path / "far")
    made_of = json.loads((tmp_path / "far" / "adapter.json").read_text())["made_of"]
    assert made_of["how"] == "port"
    assert made_of["drift"] == pytest.approx(0.2)


def test_other_architectures_are_refused() -> None:
    _, bank, _ = adapted("vit", vispeft.LoRA(rank=2))
    with pytest.raises(BaseMismatchError, match="new one a SwinTransformer"):
        bank.port(fresh("swin"))
    with pytest.raises(BaseMismatchError, match="new one a Eva"):
        bank.port(fresh("eva_dinov3"))  # as from DINOv2 to DINOv3
    with pytest.raises(BaseMismatchError, match="only the new backbone has reg_token"):
        bank.port(fresh("vit_reg_ls"))
    with pytest.raises(ConfigError, match="this model itself"):
        bank.port(bank.model)
    with pytest.raises(ConfigError, match="give the new backbone"):
        bank.port("vit")


def test_positions_of_another_size_are_interpolated() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    bank = vispeft.attach(model, vispeft.Full())
    with torch.no_grad():
        for tensor in bank.named_tensors("default").values():
            tensor.add_(0.01)
    larger = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, **{**sizes, "img_size": 48})
    with torch.no_grad():
        own = {key: tensor for key, tensor in model.state_dict().items() if "pos_embed" not in key}
        for key, tensor in larger.named_parameters():
            if key in own:
                tensor.copy_(own[key])
    ported = bank.port(larger, allow_drift=True)
    change = merged(ported.bank)["pos_embed"]
    assert torch.allclose(change, torch.full_like(change, 0.01), atol=1e-6)


def test_without_the_old_backbone_the_drift_is_unknown(tmp_path: Path) -> None:
    model, bank, images = adapted("vit", vispeft.LoRA(rank=2))
    bank.save(tmp_path / "mine")
    with torch.no_grad():
        before = model(images)
    same = port_file(fresh("vit"), tmp_path / "mine")
    assert (str(same.drift), same.notes) == ("0.00 %", ())
    with torch.no_grad():
        assert torch.allclose(same.bank.model(images), before)
    other = fresh("vit")
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight.mul_(1.01)
    found = port_file(other, tmp_path / "mine")
    assert str(found.drift) == "unknown"
    assert [key for key, value in found.drift.layers.items() if value is None] == ["blocks.1"]
    assert "nobody knows" in found.notes[0]
    with pytest.raises(BaseMismatchError, match="another architecture"):
        port_file(fresh("swin"), tmp_path / "mine")
    _, svfit, _ = adapted("vit", vispeft.SVFit(rank=2))
    svfit.save(tmp_path / "svfit")
    with pytest.raises(BaseMismatchError, match="change of the old weights"):
        port_file(drifted(fresh("vit"), 0.01), tmp_path / "svfit")


def test_a_classifier_is_fitted_anew() -> None:
    model, bank, _ = adapted("vit", vispeft.LoRA(rank=2))
    head = bank.head()
    assert isinstance(head, nn.Linear)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.arange(24) % 2
    images[labels == 1] += 1.0
    units = {key: tensor.clone() for key, tensor in bank.state_dict().items() if not key.startswith("head/")}
    batches = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    assert refit_head(bank, batches) > 0
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).double().mean() > 0.9
    assert all(torch.equal(bank.state_dict()[key], tensor) for key, tensor in units.items())
    for bad, error in (([], DataError), ([(images, labels + 90)], DataError), ([(images, labels * 0)], DataError)):
        with pytest.raises(error):
            refit_head(bank, bad)
    with pytest.raises(ConfigError, match="at least 1"):
        refit_head(bank, batches, count=0)
