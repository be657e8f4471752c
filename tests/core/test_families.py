"""Published counts, image sizes and feature extraction of the families."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import vispeft
from tests.conformance.cells import METHODS, REFUSED, Cell, move
from vispeft.core.streams import StreamRule
from vispeft.errors import BackboneError, SiteError
from vispeft.hosts.attention import AttentionHost
from vispeft.hosts.streams import Streams

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
    ("swin_base_patch4_window7_224", vispeft.VPT(num_tokens=50, deep=True)): 601_600,
    ("swin_base_patch4_window7_224", vispeft.VPT(num_tokens=50, deep=False)): 6_400,
    ("vit_base_patch16_224", vispeft.VPT(num_tokens=5, deep=True, project=64)): 5 * 64 * 12 + 64 * 768 + 768,
    ("vit_base_patch16_224", vispeft.VQT(num_queries=10)): 92_160,
    ("vit_base_patch16_224", vispeft.VQT(num_queries=10, aggregate="weighted")): 92_280,
    ("swin_base_patch4_window7_224", vispeft.VQT()): 12_032,
    ("vit_base_patch16_224", vispeft.Prefix(length=30)): 552_960,
    ("swin_base_patch4_window7_224", vispeft.Prefix(length=16)): 385_024,
    ("vit_base_patch16_224", vispeft.Prefix(length=4, mid_dim=800)): 4 * 768 + 769 * 800 + 801 * 2 * 9_216,
    ("vit_base_patch16_224", vispeft.MAM(length=16, bottleneck=16)): 599_232,
    ("swin_base_patch4_window7_224", vispeft.MAM(length=16, bottleneck=16)): 782_464,
}


@pytest.mark.parametrize(("entry", "count"), COUNTS.items(), ids=lambda value: str(value)[:60])
def test_published_counts(entry: tuple[str, vispeft.Method], count: int) -> None:
    name, method = entry
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = vispeft.plan(model, method)
    assert plan.trainable == count


FEATURED = [
    (m, b) for m in ("ssf", "lora_all", "bitfit", "vpt") for b in ("swin", "swinv2", "eva_dinov3", "eva02", "vit")
]


@pytest.mark.parametrize(("method", "backbone"), [cell for cell in FEATURED if cell not in REFUSED])
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
@pytest.mark.slow
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


def test_vpt_says_why_it_has_no_form_on_swinv2() -> None:
    with pytest.raises(SiteError, match=r"normalises after.*AdaptFormer"):
        vispeft.attach(Cell("vpt", "swinv2").model(), vispeft.VPT())
    with pytest.raises(SiteError, match=r"several widths.*deep=False"):
        vispeft.attach(Cell("vpt", "swin").model(), vispeft.VPT(project=4))


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


@pytest.mark.parametrize("backbone", ["swinv2", "eva02", "eva_dinov3_qkvb"])
@torch.no_grad()
def test_each_bias_the_attention_holds_meets_its_own_rows(backbone: str) -> None:
    """Forward and merge read the same rows, so they agree with each other when both are wrong: written out here."""
    cell = Cell("ssf", backbone)
    model, plain, images = cell.model().double(), cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, vispeft.SSF(roles=("attn.qkv",)), verify=False)
    move(bank, "default")
    tensors = bank.named_tensors()
    for path, attn in plain.named_modules():
        if f"{path}.qkv/ssf.scale" not in tensors:
            continue
        scale, shift = tensors[f"{path}.qkv/ssf.scale"], tensors[f"{path}.qkv/ssf.shift"]
        attn.qkv.weight.mul_(scale[:, None])
        for name, factor, term in zip("qkv", scale.chunk(3), shift.chunk(3), strict=True):
            bias = getattr(attn, f"{name}_bias")
            bias.copy_(factor * bias + term)
    assert torch.allclose(model.forward_features(images), plain.forward_features(images), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_stacked_shifts_behind_an_rms_norm_are_scaled_in_turn() -> None:
    model, x = Cell("ssf", "vit_aimv2").model(), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    normed = model.blocks[0].norm1(x)
    bank = vispeft.attach(model, vispeft.SSF(roles=("norm1",)), name="one", verify=False)
    vispeft.attach(model, vispeft.SSF(roles=("norm1",)), name="two", verify=False)
    bank.set_active(["one", "two"])
    for seed, name in enumerate(("one", "two")):
        move(bank, name, seed)
        tensors = bank.named_tensors(name)
        normed = tensors["blocks.0.norm1/ssf.scale"] * normed + tensors["blocks.0.norm1/ssf.shift"]
    assert torch.allclose(model.blocks[0].norm1(x), normed, atol=1e-6)


def test_a_fresh_swinv2_is_attached_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=3, depths=(1, 1), embed_dim=24)
    assert not model.layers[0].blocks[0].norm1.weight.any()
    bank = vispeft.attach(model, vispeft.LoRA())
    assert "8 of 8 trainable tensors get no gradient while base tensors are all zero" in caplog.text
    assert bank.names == ["default"]


HEADS = {  # backbone, queries, classes: (head, total) of the specification
    ("vit_base_patch16_224", 1): 1_007_716 - 9_216,
    ("vit_base_patch16_224", 20): 18_693_220 - 184_320,
    ("swin_base_patch4_window7_224", 1): 1_317_732 - 12_032,
}


@pytest.mark.parametrize(("entry", "count"), HEADS.items(), ids=str)
def test_the_classifier_of_queries_is_as_wide_as_published(entry: tuple[str, int], count: int) -> None:
    name, queries = entry
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    method = vispeft.VQT(num_queries=queries)
    assert (method.head_width(vispeft.backbones.describe(model)) + 1) * 100 == count


def test_queries_say_what_they_cannot_act_with() -> None:
    cell = Cell("vqt", "vit")
    model, images = cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="lora")
    bank = vispeft.attach(model, vispeft.VQT(num_queries=2, dropout=0.0), name="vqt")
    with pytest.raises(SiteError, match=r"without gradients.*'lora'.*detach_hidden=False"):
        bank.set_active(["lora", "vqt"])
    bank.detach("vqt")
    vispeft.attach(model, vispeft.VQT(num_queries=2, dropout=0.0, detach_hidden=False), name="vqt")
    for name in ("lora", "vqt"):
        move(bank, name)
    bank.set_active(["lora", "vqt"])
    bank.verify()
    model(images).square().sum().backward()
    inside = [tensor for key, tensor in bank.named_tensors("lora").items() if not key.startswith("head/")]
    tensor = max(inside, key=lambda t: float(t.grad.abs().max()))
    entry = int(tensor.grad.abs().argmax())
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            tensor.view(-1)[entry] += step
            losses.append(model(images).square().sum())
    assert torch.allclose(tensor.grad.view(-1)[entry], (losses[0] - losses[1]) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["vit", "swin", "swinv2", "eva_dinov3", "vit_glu"])
def test_queries_leave_the_backbone_without_a_graph(backbone: str) -> None:
    cell = Cell("vqt", backbone)
    model, images = cell.model().double(), cell.images().double()
    cell.attach(model)
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Block")]
    graphs: list[bool] = []
    for block in blocks:
        block.register_forward_hook(lambda _m, _a, rows: graphs.append(rows.tokens.requires_grad))
    model(images).sum().backward()
    assert graphs == [False] * len(blocks)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_reading_without_keys_and_values_is_exact(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("vqt", backbone)
    model, images = cell.model().double(), cell.images().double()
    cell.attach(model)
    attention = next(m for m in model.modules() if isinstance(m, AttentionHost))
    rule, rows = StreamRule(seen=False, reads=True), torch.zeros(1, 2, attention.qkv.in_features)
    assert attention.reads_alone(Streams(rows, {"queries": rows}, {"queries": rule}), {})
    folded = model(images)
    monkeypatch.setattr(AttentionHost, "reads_alone", lambda *_: False)
    assert torch.allclose(model(images), folded, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("method", ["vpt", "vpt_shallow", "vqt"])
def test_images_in_windows_are_computed_as_they_would_be_alone(method: str) -> None:
    cell = Cell(method, "swin")
    model, images = cell.model().double(), cell.images(3).double()
    cell.attach(model)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit", "vit_glu", "eva_dinov3", "eva02", "eva_pe", "swin", "swinv2"])
def test_own_attention_equals_timms(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beside the tokens that nothing sees leave the tokens as timm computes them."""
    cell = Cell("vqt", backbone)
    model, images = cell.model().double(), cell.images().double()
    wanted = model.forward_intermediates(images, intermediates_only=True)
    cell.attach(model)
    monkeypatch.setattr(AttentionHost, "reads_alone", lambda *_: False)
    found = model.forward_intermediates(images, intermediates_only=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_a_projection_stays_with_the_attention_that_holds_its_biases() -> None:
    cell = Cell("prefix", "swinv2")
    model, images = cell.model().double(), cell.images().double()
    vispeft.attach(model, vispeft.SSF(), name="ssf")
    bank = vispeft.attach(model, vispeft.Prefix(length=3), name="prefix")
    for name in ("ssf", "prefix"):
        move(bank, name)
    bank.set_active(["ssf", "prefix"])
    wanted = model(images)
    report = bank.merge(partial=True)
    assert {path.rpartition(".")[2] for path in report.kept} == {"attn", "qkv"}
    assert torch.allclose(model(images), wanted, rtol=1e-9, atol=1e-12)
    bank.unmerge()
    assert torch.equal(model(images), wanted)


def test_a_learned_scale_trains_from_its_start() -> None:
    model = Cell("adapter", "vit").model()
    bank = vispeft.attach(model, vispeft.Adapter(bottleneck=8, scale=None, start="bert"))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    scales = [p for name, p in bank.trainable_parameters() if name.endswith(".scale")]
    assert len(scales) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales)
