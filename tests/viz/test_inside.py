"""Attention, attention of prompts, and the shift of activations, seen in timm's own modules under any kernel."""

import pytest
import torch
from PIL import Image

import vispeft
from tests.tiny import TINY
from vispeft.cli import inside
from vispeft.errors import BackboneError, ConfigError, DataError
from vispeft.tasks import Classification
from vispeft.viz import activation_shift, attention_of, draw_attention, draw_prompts, draw_shift

SWIN = {
    "pretrained": False, "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 4), "num_classes": 3,
}  # fmt: skip
NAMES = {
    "vit": ("vit_tiny_patch16_224", {**TINY, "num_classes": 3}),
    "average": ("vit_tiny_patch16_224", {**TINY, "num_classes": 3, "class_token": False, "global_pool": "avg"}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", {**TINY, "num_classes": 3}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make(name, method=None):
    torch.manual_seed(0)
    architecture, settings = NAMES[name]
    if name == "eva":
        architecture = "eva02_tiny_patch14_224"
        settings = {"pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = vispeft.create_model(architecture, **settings)
    if method is not None:
        vispeft.attach(model, method)
        generator = torch.Generator().manual_seed(1)
        for _, tensor in model._vispeft_bank.trainable_parameters():
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def seen_by(model, images, path):
    """Return what enters a module."""
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model.eval().forward_features(images)
    handle.remove()
    return found[-1]


def scores(module, x):
    """Compute scores (B, heads, N, N) of normalised tokens."""
    joint = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))
    q, k = joint[:, :, 0].transpose(1, 2), joint[:, :, 1].transpose(1, 2)
    return q @ k.transpose(2, 3) * module.scale


@pytest.mark.parametrize("method", [None, vispeft.LoRA(rank=2)], ids=["plain", "lora"])
def test_the_class_token_of_a_vit(images, method):
    model = make("vit", method)
    fused = [block.attn.fused_attn for block in model.blocks]
    assert all(fused)
    with torch.no_grad():
        outputs = model.train()(images)
        found = attention_of(model, images)
    assert model.training
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in model.blocks)
    with torch.no_grad():
        assert torch.equal(model(images), outputs)
        for index, attention in enumerate(found):
            x = seen_by(model, images, f"blocks.{index}.attn")
            expected = scores(model.blocks[index].attn, x).softmax(-1)[:, :, 0, 1:]
            torch.testing.assert_close(attention.to_tokens.flatten(2), expected)
            assert attention.to_tokens.shape == (2, 2, 2, 2)
            assert (attention.block, attention.by_class_token) == (index, True)
            assert attention.to_learned.shape[2] == attention.of_prompts.shape[2] == 0


def test_without_a_class_token_all_attention_is_counted(images):
    for method in (None, vispeft.Prefix(length=3), vispeft.VPT(num_tokens=3)):
        found = attention_of(make("average", method), images)
        for attention in found:
            assert not attention.by_class_token
            total = attention.to_tokens.sum((2, 3)) + attention.to_learned.sum(2)
            torch.testing.assert_close(total, torch.ones_like(total))
            assert attention.to_learned.shape[2] == (0 if method is None else 3)


def test_prompts_of_a_vit(images):
    model = make("vit", vispeft.VPT(num_tokens=3))
    found = attention_of(model, images)
    for index, attention in enumerate(found):
        x = seen_by(model, images, f"blocks.{index}.attn")
        weights = scores(model.blocks[index].attn, x).softmax(-1)
        torch.testing.assert_close(attention.of_prompts.flatten(3), weights[:, :, 1:4, 4:])
        torch.testing.assert_close(attention.to_learned, weights[:, :, 0, 1:4])
        torch.testing.assert_close(attention.to_tokens.flatten(2), weights[:, :, 0, 4:])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("swin", None),
        ("swin", vispeft.VPT(num_tokens=3)),
        ("swin", vispeft.Prefix(length=3)),
        ("swinv2", vispeft.LoRA(rank=2)),
    ],
    ids=["swin", "vpt", "prefix", "swinv2"],
)
def test_windows_of_a_swin_are_reassembled(name, method):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = make(name, method)
    found = attention_of(model, images)
    assert [tuple(a.to_tokens.shape) for a in found] == [(2, 2, 16, 16)] * 2 + [(2, 4, 8, 8)] * 2
    for attention in found:
        learned = 0 if method is None or isinstance(method, vispeft.LoRA) else 3
        assert attention.to_learned.shape[2] == learned
        share = attention.to_tokens.mean((2, 3)) * 16 + attention.to_learned.sum(2)  # windows of 4 x 4
        torch.testing.assert_close(share, torch.ones_like(share))
        prompts = 3 if isinstance(method, vispeft.VPT) else 0
        assert attention.of_prompts.shape[2] == prompts
    if name == "swin" and not learned:
        block = model.layers[0].blocks[0]
        x = seen_by(model, images, "layers.0.blocks.0.attn")
        with torch.no_grad():
            weights = (scores(block.attn, x) + block.attn._get_rel_pos_bias()).softmax(-1).mean(2)
        corner = weights[:, :, :].unflatten(0, (2, 16))[:, 0].unflatten(-1, (4, 4))  # the first window of each image
        torch.testing.assert_close(found[0].to_tokens[:, :, :4, :4], corner)


def test_a_rotated_sequence(images):
    found = attention_of(make("eva", vispeft.VPT(num_tokens=2)), images)
    assert [tuple(a.to_tokens.shape) for a in found] == [(2, 2, 2, 2)] * 2
    assert [a.of_prompts.shape[2] for a in found] == [2, 2]


def test_other_methods_are_seen_too(images):
    for method in (vispeft.VQT(), vispeft.SSF(), vispeft.AdaptFormer(bottleneck=4)):
        assert len(attention_of(make("vit", method), images)) == 2


def test_the_shift_of_a_known_change(images):
    model = make("vit", vispeft.SSF(roles=["final_norm"]))
    assert all(shift.relative == 0 and shift.cosine > 0.99999 for shift in activation_shift(model, images))
    model = make("vit", vispeft.VPT(num_tokens=3))
    model.train()
    first, second = activation_shift(model, images)
    assert model.training
    assert (first.block, second.block) == (0, 1)
    with torch.no_grad():
        taps = model.eval().run(images, taken=frozenset({0})).taps[0]
        with model._vispeft_bank.disabled():
            before = model.run(images, taken=frozenset({0})).taps[0]
    assert taps.shape == before.shape == (2, 5, 32)
    torch.testing.assert_close(first.relative, float(((taps - before).norm(dim=2) / before.norm(dim=2)).mean()))
    assert first.relative > 0
    assert -1 <= second.cosine < 1


def modes(module):
    return {name: part.training for name, part in module.named_modules()}


@pytest.mark.parametrize("look", [attention_of, activation_shift])
def test_each_module_gets_its_own_mode_back(images, look):
    model = make("vit", vispeft.LoRA(rank=2)).train()
    units = list(model._vispeft_bank.units().values())
    units[0].eval()
    before = modes(model)
    assert units[1].training
    look(model, images)
    assert modes(model) == before
    with pytest.raises(BackboneError):
        look(model, images[..., :9, :9])
    assert modes(model) == before


def test_pictures_that_fail_leave_the_modes_of_a_task(images, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no attention")

    task = Classification(
        backbone="vit_tiny_patch16_224", backbone_args=TINY, method=vispeft.LoRA(rank=2), num_classes=3
    )
    next(iter(task.train().bank.units().values())).eval()
    before = modes(task)
    monkeypatch.setattr(inside, "attention_of", broken)
    with pytest.raises(ValueError, match="no attention"):
        inside.draw_inside(task, inside.Seen(images, None, task.preprocessing), tmp_path)
    assert modes(task) == before


def test_the_shift_of_a_swin():
    images = torch.randn(2, 3, 32, 32)
    assert len(activation_shift(make("swin", vispeft.LoRA(rank=2)), images)) == 4


def test_pictures(images, tmp_path):
    pictures = [(torch.rand(3, 16, 16) * 255).byte() for _ in range(2)]
    model = make("vit", vispeft.VPT(num_tokens=3))
    found = attention_of(model, images)
    drawn = [
        draw_attention(pictures, found, tmp_path / "attention.png"),
        draw_prompts(pictures[0], found, tmp_path / "prompts.png"),
        draw_shift({"vpt": activation_shift(model, images)}, tmp_path / "shift.png"),
    ]
    for path in drawn:
        with Image.open(path) as image:
            assert min(image.size) > 200
    assert draw_prompts(pictures[0], attention_of(make("vit"), images), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ConfigError, match=r"blocks=\[5\]: choose some of 0 to 1"):
        draw_attention(pictures, found, tmp_path / "a.png", blocks=[5])
    with pytest.raises(DataError, match="3 pictures, and the attention was seen on 2 images"):
        draw_attention([*pictures, pictures[0]], found, tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no shift to draw"):
        draw_shift({}, tmp_path / "a.png")


def test_what_cannot_be_seen_is_said(images):
    model = make("vit")
    with pytest.raises(ConfigError, match="No adapter acts on this model"):
        activation_shift(model, images)
    model = make("vit", vispeft.SSF())
    model._vispeft_bank.set_active([])
    with pytest.raises(ConfigError, match="No adapter acts"):
        activation_shift(model, images)
    with pytest.raises(ConfigError, match="compiled"):
        attention_of(torch.compile(model), images)
