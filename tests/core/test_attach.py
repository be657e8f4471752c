"""Attaching: plans, wrong names, refused models, verification, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import Cell
from vispeft.core.method import method_from_dict
from vispeft.errors import (
    BackboneError,
    ConfigError,
    SiteError,
    UnknownNameError,
    VerificationError,
)

VIT = Cell("ssf", "vit")


def test_published_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    assert vispeft.plan(vit, vispeft.SSF()).trainable == 205_824
    assert vispeft.plan(vit, vispeft.LoRA(rank=8)).trainable == 294_912
    assert vispeft.plan(vit, vispeft.LoRA(rank=8, roles=("attn.qkv",))).trainable == 294_912
    assert vispeft.plan(vit, vispeft.Full()).trainable == 85_798_656


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: vispeft.method("sff"), UnknownNameError, "'ssf'"),
        (lambda: vispeft.method("lora", rnk=2), UnknownNameError, "'rank'"),
        (lambda: vispeft.LoRA(rank=0), ConfigError, "at least 1"),
        (lambda: vispeft.LoRA(rank=2.5), ConfigError, "at least 1"),
        (lambda: vispeft.VPT(num_tokens=1.5), ConfigError, "at least 1"),
        (lambda: vispeft.LoRA(dropout=1.0), ConfigError, "dropout"),
        (lambda: vispeft.LoRA(alpha=float("nan")), ConfigError, "alpha"),
        (lambda: vispeft.SSF(start="zero"), ConfigError, "identity"),
        (lambda: vispeft.SSF(roles=("attn.qvk",)), UnknownNameError, "'attn.qkv'"),
        (lambda: vispeft.SSF(roles=()), ConfigError, "nothing"),
        (lambda: vispeft.LinearProbe(roles=("norm1",)), ConfigError, "nothing"),
    ],
)
def test_wrong_configurations(make: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("make", [lambda: vispeft.LoRA(roles="attn.q"), lambda: vispeft.LoRA(blocks=3)])
def test_a_single_value_where_a_list_belongs(make: object) -> None:
    with pytest.raises(ConfigError, match="give a list"):
        make()


def test_lora_scales() -> None:
    assert vispeft.LoRA(rank=4, alpha=8).scale == 2
    assert vispeft.LoRA(rank=4, alpha=8, rslora=True).scale == 4


def test_methods_survive_plain_values() -> None:
    for method in (vispeft.LoRA(roles=("attn.q",), blocks=(0, -1)), vispeft.SSF(), vispeft.Full(drop_path=0.1)):
        assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_places_inside_one_module_have_names_of_their_own() -> None:
    view = vispeft.attach(Cell("ssf", "eva_dinov3").model(), vispeft.SSF()).view
    keys = [site.key for site in view.sites]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        (vispeft.SSF(roles=("downsample.norm",)), SiteError, "no patch merging"),
        (vispeft.SSF(roles=("attn.q_norm",)), SiteError, "matches nothing"),
        (vispeft.SSF(roles=("attn.q",)), SiteError, "part of"),
        (vispeft.LoRA(roles=("norm1",)), SiteError, "linear"),
        (vispeft.SSF(blocks=(5,)), ConfigError, "2 blocks"),
        (vispeft.SSF(roles=("patch_embed",), blocks=(0,)), SiteError, "not in the chosen blocks"),
        ("ssf", ConfigError, r"vispeft.method\('ssf'\)"),
    ],
)
def test_refused_attachments_change_nothing(
    model: nn.Module, method: vispeft.Method, error: type[Exception], says: str
) -> None:
    before = list(model.state_dict())
    with pytest.raises(error, match=says):
        vispeft.attach(model, method)
    assert list(model.state_dict()) == before
    assert type(model) is VisionTransformer
    assert all(p.requires_grad for p in model.parameters())
    assert vispeft.AdapterBank.of(model) is None


def test_a_refused_second_adapter_leaves_the_first(model: nn.Module) -> None:
    bank = VIT.attach(model)
    wanted = model(VIT.images())
    with pytest.raises(SiteError):
        vispeft.attach(model, vispeft.SSF(roles=("downsample.norm",)), name="two")
    with pytest.raises(ConfigError, match="already"):
        vispeft.attach(model, vispeft.SSF())
    with pytest.raises(ConfigError, match="letters"):
        vispeft.attach(model, vispeft.SSF(), name="a.b")
    assert bank.names == bank.active == ["default"]
    assert torch.equal(model(VIT.images()), wanted)


@pytest.mark.parametrize("block", [ParallelScalingBlock, type("MyBlock", (Block,), {})])
def test_unknown_blocks_are_refused(block: type[nn.Module]) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, block_fn=block)
    with pytest.raises(BackboneError, match=f"{block.__name__}.*Block"):
        vispeft.attach(model, vispeft.SSF())


def test_unknown_models_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"ResNet.*VisionTransformer"):
        vispeft.attach(timm.create_model("resnet18"), vispeft.SSF())


def test_another_image_size_is_refused(model: nn.Module) -> None:
    VIT.attach(model)
    with pytest.raises(BackboneError, match=r"40 x 40.*32 x 32.*flexible_size"):
        model(torch.zeros(1, 3, 40, 40))
    flexible = VIT.model(dynamic_img_size=True)
    VIT.attach(flexible)
    with pytest.raises(BackboneError, match="patches of 8 x 8"):
        flexible.forward_intermediates(torch.zeros(1, 3, 44, 40))
    assert flexible(torch.zeros(1, 3, 48, 40)).shape == (1, 5)


def test_features_only_models_can_be_adapted(saved: Path) -> None:
    wrapper = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(5, 11))
    plain = [m.shape for m in wrapper(torch.zeros(1, 3, 64, 64))]
    bank = vispeft.attach(wrapper, vispeft.SSF(roles=("attn.qkv", "mlp.fc1")))
    assert [m.shape for m in wrapper(torch.zeros(1, 3, 64, 64))] == plain
    assert bank.report().trainable == 12 * 2 * (3 + 4) * 192


def test_attaching_follows_the_seed() -> None:
    states = []
    for _ in range(2):
        model = VIT.model()
        torch.manual_seed(5)
        states.append(vispeft.attach(model, vispeft.SSF()).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_a_unit_the_model_does_not_use_is_found(model: nn.Module) -> None:
    class Unused(type(model.blocks[1])):
        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return x

    bank = vispeft.attach(model, vispeft.SSF(), verify=False)
    model.blocks[1].__class__ = Unused
    with pytest.raises(VerificationError, match=r"blocks\.1\."):
        bank.verify()


def test_a_gradient_that_is_not_finite_is_none(model: nn.Module) -> None:
    class Broken(type(model.blocks[1])):
        def forward(self, x: torch.Tensor, **arguments: object) -> torch.Tensor:
            return super().forward(x, **arguments) + (x - x).sqrt()  # infinitely steep at zero, and zero times infinity

    bank = vispeft.attach(model, vispeft.SSF(), verify=False)
    model.blocks[1].__class__ = Broken
    assert torch.isfinite(model(VIT.images())).all()
    with pytest.raises(VerificationError, match=r"blocks\.0\."):
        bank.verify()


def test_verify_puts_everything_back(model: nn.Module) -> None:
    bank = vispeft.attach(model, vispeft.LoRA())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn: list[torch.Tensor] = []
    model.get_submodule("norm").register_forward_hook(lambda *_: drawn.append(torch.rand(1)))  # as a user's module may
    state = torch.get_rng_state()
    model.train()
    bank.verify()
    assert drawn
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_half_precision_base_keeps_its_classifier_wide() -> None:
    model = VIT.model().bfloat16()
    bank = VIT.attach(model)
    head = bank.head()
    assert head is not None
    assert head.weight.dtype == torch.float32
    optimiser = torch.optim.AdamW(bank.parameter_groups(1e-5, 0.0))
    before = head.weight.detach().clone()
    model(VIT.images().bfloat16()).sum().backward()
    optimiser.step()
    assert (head.weight != before).float().mean() > 0.9
    wide = model.head
    bank.merge()
    assert type(model.head) is nn.Linear
    bank.unmerge()
    assert model.head is wide


@pytest.mark.parametrize("name", ["train", "half", "keys", "training", "a.b", ""])
def test_names_that_modules_cannot_hold_are_refused_and_change_nothing(model: nn.Module, name: str) -> None:
    """PyTorch's containers refused some with a KeyError, half of the units in place already."""
    classes = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ConfigError, match="to be called"):
        vispeft.attach(model, vispeft.SSF(), name=name)
    assert {path: type(module) for path, module in model.named_modules()} == classes


@pytest.mark.parametrize("mode", [True, False])
def test_everything_that_is_attached_has_the_mode_of_the_model(model: nn.Module, mode: bool) -> None:
    model.train(mode)
    vispeft.attach(model, vispeft.SSF(drop_path=0.1), name="one")
    vispeft.attach(model, vispeft.VPT(num_tokens=2), name="two")
    modes = {name: module.training for name, module in model.named_modules()}
    assert mode or not any(modes.values())
    model.train(mode)
    assert {name: module.training for name, module in model.named_modules()} == modes
