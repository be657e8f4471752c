"""Gradients: small ones are told from none, second ones exist, and functional calls give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import MAIN, Cell, is_second_form
from vispeft.adapters import verify
from vispeft.errors import ConfigError, VerificationError

FIRST = [cell for cell in MAIN if cell.backbone in ("vit", "swin") and not is_second_form(cell)]


def unfused(model: nn.Module) -> nn.Module:
    """Switch timm's fused attention off, as ``timm.layers.set_fused_attn(False)`` does for new models."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


# ---------------------------------------------------------------------- verification


@pytest.mark.parametrize("depth", [4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40])
def test_a_ladder_of_any_depth_is_attached(depth: int) -> None:
    """Every gate starts half open, so that what reaches the first rung is halved once a block."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=3)
    bank = vispeft.attach(model, vispeft.LST(reduction=2))
    first = bank.named_tensors()["/lst.first.weight"]
    (slope,) = torch.autograd.grad(model(torch.randn(2, 3, 16, 16)).square().sum(), first)
    assert slope.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_layer_scale_of_a_millionth_hides_no_gradient(dtype: torch.dtype) -> None:
    """The prefix is behind it, and the bottleneck of the same block is not."""
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=1e-6
    )
    vispeft.attach(model.to(dtype), vispeft.MAM(length=2, bottleneck=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_errors_are_no_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single weight in front of a normalisation has no effect; its gradient is zero but for rounding."""
    model = Cell("vqt", "vit").model().to(dtype)
    bank = vispeft.attach(model, vispeft.VQT(num_queries=1, aggregate="weighted", dropout=0.0))
    unit = bank._entries["default"].units["/vqt"]
    assert unit.zero_gradient == {"weights"}
    unit.zero_gradient = frozenset()
    (slope,) = torch.autograd.grad(model(Cell("vqt", "vit").images().to(dtype)).square().sum(), unit.weights)
    assert slope.any()
    monkeypatch.setattr(verify, "DRAWS", 2)
    with pytest.raises(VerificationError, match=r"1 of 2 trainable tensors get no gradient: /vqt\.weights"):
        bank.verify()


def test_a_device_without_float64_verifies_as_far_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Apple's devices, every small gradient ended in a TypeError of PyTorch."""
    zeros = torch.zeros

    def on_such_a_device(*size: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*size, dtype=dtype, **more)

    monkeypatch.setattr(torch, "zeros", on_such_a_device)
    monkeypatch.setattr(verify, "DRAWS", 2)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, init_values=1e-6
    )
    bank = vispeft.attach(model, vispeft.MAM(length=2, bottleneck=4))  # gradients from 1 to 1e-9
    unit = next(iter(bank._entries["default"].units.values()))
    unit.register_parameter("unused", nn.Parameter(torch.ones(1)))
    with pytest.raises(VerificationError, match=r"1 of 7 trainable tensors get no gradient: blocks\.0\S+\.unused\."):
        bank.verify()


@pytest.mark.parametrize("wrapped", [False, True], ids=["no_classes", "features_only"])
def test_nothing_to_train_is_refused_at_attach(wrapped: bool) -> None:
    model = Cell("linear_probe", "vit").model(num_classes=0)
    if wrapped:
        model = vispeft.create_model("zoo:vit_tiny", features_only=True)
    with pytest.raises(ConfigError, match=r"LinearProbe has nothing to train.*num_classes"):
        vispeft.attach(model, vispeft.LinearProbe())
    assert vispeft.AdapterBank.of(model) is None
    assert vispeft.attach(model, vispeft.LinearProbe(), verify=False).names == ["default"]


# ---------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("name", ["lora_all", "ssf", "fact", "prefix", "mam", "vqt", "adapter"])
def test_the_gradient_of_a_gradient(name: str) -> None:
    """That of a penalty on the slope of the scores, in single precision, against differences in double."""
    cell = Cell(name, "vit", short=True)
    model = unfused(cell.model())
    bank = cell.attach(model)
    labels = [key for key, _ in bank.trainable_parameters() if "head" not in key]
    wide = unfused(cell.model()).double()
    other = cell.attach(wide)

    def penalty(model: nn.Module, images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images, create_graph=True)
        return slope.square().sum() + model(images).square().sum()

    parameters = dict(bank.trainable_parameters())
    found = torch.autograd.grad(penalty(model, cell.images()), [parameters[key] for key in labels])
    twins = dict(other.trainable_parameters())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(tensor.shape, generator=generator) for tensor in found]
    values = []
    for sign in (1e-5, -2e-5):
        with torch.no_grad():
            for key, direction in zip(labels, directions, strict=True):
                twins[key].add_(sign * direction)
        values.append(float(penalty(wide, cell.images().double()).detach()))
    wanted = (values[0] - values[1]) / 2e-5
    assert sum(float((a * b).sum()) for a, b in zip(found, directions, strict=True)) == pytest.approx(wanted, rel=2e-3)


# ---------------------------------------------------------------------- attention maps


@pytest.mark.parametrize(
    ("name", "backbone", "added"),
    [
        ("lora", "vit", 0),
        ("prefix", "vit", 3),
        ("mam", "eva02", 2),
        ("vqt", "eva_dinov3", 0),
        ("vpt", "swin", 3),
        ("prefix", "swin", 3),
        ("prefix", "swinv2", 3),
    ],
)
@torch.no_grad()
def test_hooks_see_attention_where_it_is_not_fused(name: str, backbone: str, added: int) -> None:
    cell = Cell(name, backbone)
    model = unfused(cell.model())
    cell.attach(model)
    wanted = model(cell.images())
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    assert torch.allclose(model(cell.images()), wanted, atol=1e-5)
    maps = AttentionExtract(unfused(model), method="hook")(cell.images())
    assert len(maps) == sum(path.endswith("attn.attn_drop") for path, _ in model.named_modules())
    for attention in maps.values():
        assert attention.shape[-1] == attention.shape[-2] + added
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)


# ---------------------------------------------------------------------- functional calls, sizes, empty batches


@pytest.mark.parametrize("cell", FIRST, ids=str)
def test_functional_calls_with_plain_tensors(cell: Cell) -> None:
    """Values, gradients of ``torch.func.grad``, and an empty batch where the plain model takes one."""
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    plain = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    trained = {name: plain[name] for name, _ in bank.trainable_parameters()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**plain, **tensors}, (images,)).square().sum()

    wanted = model(images).square().sum()
    wanted.backward()
    found, value = torch.func.grad_and_value(loss)(trained)
    assert torch.allclose(value, wanted, rtol=1e-5)
    for name, parameter in bank.trainable_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()) + 1e-6), name
    if cell.backbone == "vit":
        assert model(images[:0]).shape == (0, 5)


def test_functional_gradients_of_matrices_with_few_bits() -> None:
    cell = Cell("lora_2bit", "vit", short=True)
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    trained = {name: parameter.detach().clone() for name, parameter in bank.trainable_parameters()}
    found = torch.func.grad(lambda t: torch.func.functional_call(model, t, (images,)).square().sum())(trained)
    model(images).square().sum().backward()
    for name, parameter in bank.trainable_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["vit", "vit_reg_ls", "eva02", "swin"])
@torch.no_grad()
def test_another_image_size_after_attaching_full(backbone: str) -> None:
    """Trained positions follow as those of a plain model with the same weights do; the base's follow untrained."""
    cell, size = Cell("full", backbone), (64, 32)
    model, plain, trained = cell.model(), cell.model(), cell.model()
    bank = cell.attach(model)
    tensors: dict[str, Any] = dict(trained.named_parameters())
    for key, tensor in bank.named_tensors().items():
        path, _, name = key.partition("/")
        path = bank.view.head_path if path == "head" else path
        tensors[f"{path}.{name.removeprefix('full.')}".lstrip(".")].copy_(tensor)
    images = torch.randn(2, 3, *size)
    for each in (model, plain, trained):
        each.set_input_size(img_size=size)
    assert torch.equal(model(images), trained(images))
    with bank.disabled():
        assert torch.equal(model(images), plain(images))


def test_another_patch_size_is_refused_where_adapters_act_on_the_patches() -> None:
    model = Cell("ssf", "vit").model()
    bank = vispeft.attach(model, vispeft.SSF(), verify=False)
    with pytest.raises(ConfigError, match=r"patch_size=4.*default.*attach anew"):
        model.set_input_size(patch_size=4)
    assert model.patch_embed.patch_size == (8, 8)
    model.set_input_size(img_size=64, patch_size=8)
    bank.detach("default")
    vispeft.attach(model, vispeft.LoRA(), verify=False)
    model.set_input_size(patch_size=4)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
