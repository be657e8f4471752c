"""Token merging with adapters: equal to no merging where it must be, and refused where it cannot be right."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from vispeft.core.token_merging import TokenMerging
from vispeft.errors import BackboneError, ConfigError, MergeError, VispeftError
from vispeft.hosts.base import Host

SMALL = {"pretrained": False, "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
METHODS = {
    "adaptformer": vispeft.AdaptFormer(bottleneck=4, dropout=0),
    "lora": vispeft.LoRA(rank=2),
    "prefix": vispeft.Prefix(length=3),
    "vpt": vispeft.VPT(num_tokens=3),
    "vqt": vispeft.VQT(num_queries=2, dropout=0.0),
}
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"global_pool": "avg"},
    "norms and scales": {"qk_norm": True, "init_values": 0.5},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "registers": {"reg_tokens": 2},
}


def vit(name: str = "vit_tiny_patch16_224", **settings: Any) -> Any:
    """Make a small ViT in float64."""
    torch.manual_seed(0)
    return vispeft.create_model(name, **{**SMALL, "num_classes": 3, **settings}).double().eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def moved(bank: vispeft.AdapterBank) -> None:
    """Move all tensors away from their start."""
    torch.manual_seed(2)
    for tensor in bank.named_tensors().values():
        tensor.add_(0.1 * torch.randn_like(tensor))


@pytest.mark.parametrize("name", METHODS)
def test_none_is_the_model_without_merging(name: str) -> None:
    model = vit()
    bank = vispeft.attach(model, METHODS[name], verify=False)
    moved(bank)
    plain, features = model(images()), model.forward_features(images())
    kinds = {path: type(module) for path, module in model.named_modules()}
    bank.merge_tokens(4)
    assert not torch.allclose(model(images()), plain)
    assert model.forward_features(images()).shape == features.shape  # a token for each patch
    bank.merge_tokens(0)
    assert torch.equal(model(images()), plain)
    assert {path: type(module) for path, module in model.named_modules()} == kinds


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "lora") for name in MODELS), *(("class token", method) for method in METHODS)]
)
def test_merging_equal_patches_changes_nothing(name: str, method: str) -> None:
    """Weighed by its size, one token stands for all patches that are equal: in attention, queries and pooling."""
    model = vit(**MODELS[name])
    with torch.no_grad():
        model.pos_embed.zero_()
    bank = vispeft.attach(model, METHODS[method], verify=False)
    moved(bank)
    two = images()[:, :, :8, :8]  # two patches, which make up both images
    pattern = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1])
    mosaic = two[pattern].reshape(1, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 32, 32)
    plain, features = model(mosaic), model.forward_features(mosaic)
    bank.merge_tokens(2)
    run = model.run(mosaic)
    assert run.streams.merged.size.shape[1] < 16
    assert float(run.streams.merged.size.sum()) == 16
    torch.testing.assert_close(model(mosaic), plain, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.forward_features(mosaic), features, rtol=1e-9, atol=1e-10)
    bank.merge_tokens(2, proportional_attention=False)
    assert not torch.allclose(model(mosaic), plain, rtol=1e-9, atol=1e-10)


def test_prompts_stay_in_front_and_whole() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.VPT(num_tokens=3), verify=False)
    bank.merge_tokens([4, 0, 2])
    run = model.run(images(), taken=frozenset({0, 2}))
    assert run.tokens.shape[1] == 1 + 3 + 16 - 6
    assert run.taps[0].shape == run.taps[2].shape == (2, 17, 24)
    merged = run.streams.merged
    assert torch.equal(
        merged.size, torch.zeros_like(merged.size).scatter_add(1, merged.source, torch.ones(2, 16).double())
    )


def test_gradients_with_and_without_checkpoints() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    moved(bank)
    bank.merge_tokens(3, inflection=-1.0)
    found = []
    for checkpoints in (False, True):
        model.set_grad_checkpointing(checkpoints)
        model.zero_grad()
        model(images()).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in bank.named_tensors().items()})
    assert all(gradient.any() for gradient in found[0].values())
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_copies_and_further_adapters_merge_too() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    bank.merge_tokens(4)
    merged = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), merged)
    vispeft.attach(model, vispeft.SSF(), name="second")
    with bank.using("default"):
        assert torch.equal(model(images()), merged)
    bank.detach("default")
    assert model.run(images()).tokens.shape[1] == 17 - 12
    bank.detach("second")
    assert not any(isinstance(module, Host) for module in model.modules())


def test_merging_weights_leaves_token_merging() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    moved(bank)
    bank.merge_tokens(4)
    before = model(images())
    with pytest.raises(MergeError, match="no plain model merges tokens"):
        bank.merge()
    report = bank.merge(partial=True)
    assert report.merged
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear
    torch.testing.assert_close(model(images()), before, rtol=1e-9, atol=1e-10)
    bank.unmerge()
    assert torch.equal(model(images()), before)


def test_lower_precision_and_training() -> None:
    model = vit().float()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    bank.merge_tokens(2)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images().float())
    assert torch.isfinite(out).all()
    model.bfloat16()
    assert torch.isfinite(model(images().bfloat16())).all()


REFUSED = {
    "a swin": (lambda: vispeft.create_model("swin_tiny_patch4_window7_224", pretrained=False), BackboneError, "Swin"),
    "rotary": (
        lambda: vit("eva02_tiny_patch14_224", patch_size=8),
        BackboneError,
        "rotary positions belong to single patches",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot(name: str) -> None:
    make, kind, message = REFUSED[name]
    bank = vispeft.attach(make(), vispeft.LinearProbe(), verify=False)
    with pytest.raises(kind, match=message):
        bank.merge_tokens(4)


METHODS_BY_PLACE = (
    vispeft.Convpass(bottleneck=4),
    vispeft.Mona(bottleneck=4),
    vispeft.ConformerAdapter(reduction=6, kernel=4),
    vispeft.LST(reduction=2),
)


def test_adapters_that_cannot() -> None:
    for method in METHODS_BY_PLACE:
        model = vit()
        bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="first", verify=False)
        bank.merge_tokens(4)
        before = model(images())
        with pytest.raises(ConfigError, match=rf"merges tokens, and adapter 'second' \({method.name}\)"):
            vispeft.attach(model, method, name="second", verify=False)
        assert bank.names == ["first"]
        assert torch.equal(model(images()), before)
        bank.merge_tokens(0)
        vispeft.attach(model, method, name="second", verify=False)
        with pytest.raises(ConfigError, match="merges tokens, and adapter 'second'"):
            bank.merge_tokens(4)


def test_calls_that_cannot() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    bank.merge_tokens(4)
    with pytest.raises(ConfigError, match="Maps were asked for"):
        model.forward_intermediates(images())
    with pytest.raises(ConfigError, match="attention mask"):
        model.forward_features(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with bank.using("default"), pytest.raises(ConfigError, match="Leave"):
        bank.merge_tokens(2)
    getter = vispeft.create_model("vit_tiny_patch16_224", **SMALL, features_only=True, out_indices=(2,))
    maps = vispeft.attach(getter, vispeft.LoRA(rank=2))
    with pytest.raises(ConfigError, match="features_only"):
        maps.merge_tokens(4)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": -1},
        {"r": 1.5},
        {"r": True},
        {"r": "8"},
        {"r": [4, -1]},
        {"r": [1, 2, 3, 4]},
        {"r": 4, "inflection": 2.0},
        {"r": 4, "inflection": float("nan")},
        {"r": [4], "inflection": 1.0},
        {"r": 4, "proportional_attention": 1},
    ],
)
def test_settings_that_cannot(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Token merging was asked for"):
        TokenMerging(**settings).schedule(3)


def test_settings_of_the_command_line() -> None:
    assert TokenMerging.parsed("8") == TokenMerging(8)
    assert TokenMerging.parsed("16,8") == TokenMerging([16, 8])
    assert not TokenMerging.parsed("off")
    for text in ("", "8,", "-1", "x", "1.5"):
        with pytest.raises(VispeftError, match="Token merging was asked for as"):
            TokenMerging.parsed(text)


@pytest.mark.slow
def test_compiled_blocks() -> None:
    model = vit()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2))
    moved(bank)
    bank.merge_tokens(3)
    before = model(images())
    bank.compile("blocks", backend="aot_eager")
    torch.testing.assert_close(model(images()), before, rtol=1e-9, atol=1e-10)
