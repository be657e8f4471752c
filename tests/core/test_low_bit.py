"""Matrices of a few bits: sizes of the paper's table, files, classifiers and what training does to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import move
from vispeft.errors import ConfigError
from vispeft.storage.files import read_adapter
from vispeft.storage.quantize import LowBit, codebook, quantize

CONFIGURATIONS = {
    "Bi-AdaptFormer": lambda bits, h: vispeft.AdaptFormer(bottleneck=h, bias=False, bits=bits),
    "Bi-LoRA": lambda bits, h: vispeft.LoRA(rank=h, bits=bits),
}
# Payload bytes without head on ViT-B/16 and Swin-B, by bits (the method's specification, section 5).
SIZES = [
    ("Bi-AdaptFormer", 32, {1: (73_920, 96_640), 2: (147_648, 192_896), 4: (295_104, 385_408)}),
    ("Bi-AdaptFormer", 1, {1: (2_496, 3_392)}),
    ("Bi-LoRA", 32, {1: (147_840, 193_280), 2: (295_296, 385_792), 4: (590_208, 770_816)}),
    ("Bi-LoRA", 1, {1: (4_992, 6_784)}),
]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    names = ("vit_base_patch16_224", "swin_base_patch4_window7_224")
    first, second = (vispeft.create_model(name, pretrained=False, num_classes=0) for name in names)
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "sizes"), SIZES, ids=[f"{name}-{width}" for name, width, _ in SIZES])
def test_bytes_are_the_papers(
    name: str, width: int, sizes: dict[int, tuple[int, int]], models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    for bits, wanted in sizes.items():
        for model, payload in zip(models, wanted, strict=True):
            bank = vispeft.attach(model, CONFIGURATIONS[name](bits, width), verify=False)
            assert bank.report().stored_bytes == payload
            bank.save(tmp_path)
            stored = load_file(tmp_path / "adapter.safetensors")
            assert sum(tensor.numel() for tensor in stored.values()) == payload
            assert (tmp_path / "adapter.safetensors").stat().st_size <= payload + 2048 + 160 * len(stored)
            bank.detach("default")


def vit(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = VisionTransformer(num_classes=3, **size).eval()
    if classes != 3:
        model.reset_classifier(classes)
    return model


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_are_medians_of_their_cells(bits: int) -> None:
    levels, thresholds = codebook(bits)
    assert len(levels) == 2**bits
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
    inner = torch.special.ndtr(torch.cat([torch.tensor([-torch.inf]), thresholds, torch.tensor([torch.inf])]).double())
    middles = torch.special.ndtri((inner[:-1] + inner[1:]) / 2)
    assert torch.allclose(levels.double(), middles, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gradient_is_that_of_the_written_out_quantiser(bits: int) -> None:
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    unit = LowBit()
    unit.bits, unit.matrices = bits, ("weight",)
    unit.weight = nn.Parameter(weight.detach().clone())
    cotangent = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    mean, std = weight.mean(), weight.std()
    normed = (weight - mean) / (std + 1e-5)
    levels = codebook(bits)[0].double()[quantize(weight, bits).codes]
    straight = normed + (levels - normed).detach()
    ((straight * std + mean) * cotangent).sum().backward()
    (unit.matrix("weight") * cotangent).sum().backward()
    assert torch.allclose(unit.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_file_is_never_quantised_again(bits: int, tmp_path: Path) -> None:
    method = vispeft.AdaptFormer(bottleneck=5, scale=10, bias=False, bits=bits, head_bits=bits)
    images, model = torch.randn(2, 3, 16, 16), vit()
    bank = vispeft.attach(model, method)
    move(bank, "default")
    wanted = model(images)
    bank.save(tmp_path / "0")
    for turn in range(3):
        model = vit()
        bank = vispeft.load(model, tmp_path / str(turn))
        assert torch.equal(model(images), wanted)
        bank.save(tmp_path / str(turn + 1))
    for name in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_loaded_matrix_trains_again(tmp_path: Path) -> None:
    images, model = torch.randn(2, 3, 16, 16), vit()
    vispeft.attach(model, vispeft.LoRA(rank=4, alpha=40, bits=2)).save(tmp_path)
    model = vit()
    bank = vispeft.load(model, tmp_path)
    optimizer = torch.optim.SGD([p for _, p in bank.trainable_parameters()], 0.1)
    before = model(images)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(images), before)
    bank.save(tmp_path)
    again = vit()
    vispeft.load(again, tmp_path)
    assert torch.equal(again(images), model(images))


def test_a_low_bit_classifier_has_another_class_count_and_merges(tmp_path: Path) -> None:
    images, model = torch.randn(2, 3, 16, 16), vit(classes=7)
    bank = vispeft.attach(model, vispeft.LoRA(rank=4, bits=1, head_bits=1))
    move(bank, "default")
    wanted = model(images)
    bank.save(tmp_path)
    again = vit(classes=3)
    bank = vispeft.load(again, tmp_path)
    assert torch.equal(again(images), wanted)
    bank.merge()
    assert type(again.head) is nn.Linear
    assert torch.allclose(again(images), wanted, atol=1e-5)
    bank.unmerge()
    assert torch.equal(again(images), wanted)


def test_the_tensors_of_a_file_start_another_adapter(tmp_path: Path) -> None:
    images, method, model = torch.randn(2, 3, 16, 16), vispeft.LoRA(rank=4, alpha=40, bits=2, head_bits=1), vit()
    bank = vispeft.attach(model, method)
    move(bank, "default")
    bank.save(tmp_path)
    _, units, head = read_adapter(tmp_path)
    assert {key: t.shape for key, t in {**units, **head}.items()} == {k: t.shape for k, t in bank.state_dict().items()}
    again = vit()
    vispeft.attach(again, method).load_state_dict({**units, **head})
    assert torch.isfinite(again(images)).all()


@pytest.mark.parametrize("bits", [0, 3, 16, True])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="choose 1, 2, 4, 8, or 32"):
        vispeft.LoRA(bits=bits)
