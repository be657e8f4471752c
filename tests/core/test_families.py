"""Published counts, image sizes and feature extraction of the families."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import vispeft
from tests.conformance.cells import METHODS, Cell, move
from vispeft.errors import BackboneError, SiteError

COUNTS = {
    ("swin_base_patch4_window7_224", vispeft.SSF()): 267_264,
    ("swin_base_patch4_window7_224", vispeft.SSF(patch_merging=True)): 274_432,
    ("swin_base_patch4_window7_224", vispeft.LoRA(rank=8)): 385_024,
    ("swin_base_patch4_window7_224", vispeft.Full()): 86_743_224,
    ("swin_base_patch4_window7_224", vispeft.BitFit()): 137_216,
    ("swin_base_patch4_window7_224", vispeft.BitFit(include_rel_pos_bias=True)): 200_760,
    ("swin_large_patch4_window7_224", vispeft.BitFit(include_rel_pos_bias=True)): 301_140,
    ("swin_base_patch4_window7_224", vispeft.NormTuning()): 57_600,
    ("vit_base_patch16_224", vispeft.BitFit()): 102_912,
    ("vit_base_patch16_224", vispeft.NormTuning()): 38_400,
    ("vit_base_patch16_224", vispeft.VPT(num_tokens=50, deep=True)): 460_800,
    ("vit_base_patch16_224", vispeft.VPT(num_tokens=50, deep=False)): 38_400,
}


@pytest.mark.parametrize(("entry", "count"), COUNTS.items(), ids=lambda value: str(value)[:60])
def test_published_counts(entry: tuple[str, vispeft.Method], count: int) -> None:
    name, method = entry
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = vispeft.plan(model, method)
    assert plan.trainable == count


@pytest.mark.parametrize("backbone", ["swin", "swinv2", "eva_dinov3", "eva02", "vit"])
@pytest.mark.parametrize("method", ["ssf", "lora_all", "bitfit"])
def test_features_only_models_work_adapted(method: str, backbone: str, tmp_path) -> None:
    name = {
        "swin": "swin_tiny_patch4_window7_224",
        "swinv2": "swinv2_tiny_window8_256",
        "eva_dinov3": "vit_small_patch16_dinov3",
        "eva02": "eva02_tiny_patch14_224",
        "vit": "vit_tiny_patch16_224",
    }[backbone]
    size = {"swin": 224, "swinv2": 256}.get(backbone, 56 if backbone == "eva02" else 64)
    options = {} if backbone.startswith("swin") else {"img_size": size}
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=3, **options).eval()
    torch.manual_seed(0)
    wrapper = timm.create_model(name, features_only=True, out_indices=(0, 1), **options).eval()
    for module in whole.modules():  # a fresh SwinV2 has norms of weight zero, which no gradient passes
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    weights = {key.replace("layers.", "layers_"): tensor for key, tensor in whole.state_dict().items()}
    own = wrapper.state_dict()
    wrapper.load_state_dict(
        {
            key: weights.get(
                key, weights.get(key.removeprefix("model."), whole.state_dict().get(key.removeprefix("model.")))
            )
            for key in own
        }
    )
    images = torch.randn(1, 3, size, size)
    plain = wrapper(images)
    bank = vispeft.attach(whole, METHODS[method])
    move(bank, "default")
    bank.save(tmp_path)
    wanted = whole.forward_intermediates(images, indices=(0, 1), intermediates_only=True)
    vispeft.load(wrapper, tmp_path)
    maps = wrapper(images)
    assert [m.shape for m in maps] == [m.shape for m in plain]
    for found, reference, before in zip(maps, wanted, plain, strict=True):
        found = found if found.shape == reference.shape else found.permute(0, 3, 1, 2)
        before = before if before.shape == reference.shape else before.permute(0, 3, 1, 2)
        assert torch.allclose(found, reference, atol=1e-5)
        assert not torch.equal(found, before)


SIZES = [(448, 448), (256, 320), (224, 224)]


def _swin(size: tuple[int, int], **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return vispeft.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=4, **options).eval()


@torch.no_grad()
def test_flexible_swin_at_other_sizes() -> None:
    flexible = _swin((224, 224), flexible_size=True)
    bank = vispeft.attach(flexible, vispeft.SSF())
    wanted = {size: flexible(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))) for size in SIZES}
    with bank.disabled():
        for size in SIZES:
            images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
            fixed = _swin(size, img_size=size)
            fixed.load_state_dict({k: v for k, v in flexible.state_dict().items() if "adapter" not in k})
            assert torch.allclose(flexible(images), fixed(images), atol=1e-5), size
    bank.merge()
    for size, out in wanted.items():
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(flexible(images), out, atol=1e-5), size


@torch.no_grad()
def test_flexible_swin_equals_the_fixed_one_at_its_own_size() -> None:
    flexible, fixed = _swin((224, 224), flexible_size=True), _swin((224, 224))
    fixed.load_state_dict(flexible.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.allclose(flexible(images), fixed(images), atol=1e-5)


def test_a_size_the_window_cannot_serve_is_refused() -> None:
    model = SwinTransformer(img_size=32, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    vispeft.attach(model, vispeft.SSF())
    with pytest.raises(BackboneError, match=r"40 x 40.*flexible_size"):
        model(torch.zeros(1, 3, 40, 40))


def test_vpt_says_why_it_has_no_form_on_swin() -> None:
    with pytest.raises(SiteError, match=r"windows.*SSF"):
        vispeft.attach(Cell("vpt", "swin").model(), vispeft.VPT())


@pytest.mark.parametrize("backbone", ["swinv2", "eva02", "eva_dinov3", "eva_dinov3_qkvb"])
def test_lora_reaches_weights_that_models_read(backbone: str) -> None:
    """Hugging Face peft trains nothing at the first two: the model reads the projection's weight beside its wrapper."""
    cell = Cell("lora", backbone)
    model, images = cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, vispeft.LoRA(roles=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")))
    move(bank, "default")
    model(images).square().sum().backward()
    gradients = [tensor.grad for key, tensor in bank.named_tensors().items() if not key.startswith("head/")]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    wanted = model(images)
    bank.merge()
    assert torch.allclose(model(images), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", ["swinv2", "eva02", "eva_dinov3_qkvb"])
def test_a_merged_shift_of_the_keys_gets_a_bias_that_is_saved(backbone: str) -> None:
    cell = Cell("ssf", backbone)
    model, images = cell.model().double(), cell.images().double()
    bank = cell.attach(model)
    wanted = model(images)
    report = bank.merge()
    created = [key for key in report.created if key.endswith("qkv.bias")]
    assert created
    assert len(report.removed) == 2 * len(created)
    state = {key: tensor for key, tensor in model.state_dict().items() if "adapter" not in key}
    assert set(created) <= set(state)
    assert not set(report.removed) & set(state)
    assert torch.allclose(model(images), wanted, rtol=1e-9, atol=1e-12)
    bank.unmerge()
    assert torch.equal(model(images), wanted)


def test_a_fresh_swinv2_is_attached_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=3, depths=(1, 1), embed_dim=24)
    assert not model.layers[0].blocks[0].norm1.weight.any()
    bank = vispeft.attach(model, vispeft.LoRA())
    assert "8 of 8 trainable tensors get no gradient while base tensors are all zero" in caplog.text
    assert bank.names == ["default"]
