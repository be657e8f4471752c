"""Scale and shift with the output kept instead of the input: gradients, and when the input is kept after all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vispeft
from vispeft.hosts import layers
from vispeft.hosts.affine import affine


def tensors(scale_values: float | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 9, 6, generator=generator)
    scale = 1 + 0.2 * torch.randn(6, generator=generator)
    shift = torch.randn(6, generator=generator)
    if scale_values is not None:
        scale[2] = scale_values
    return [t.to(dtype).requires_grad_() for t in (y, scale, shift)]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def kept(inputs: list[Tensor]) -> set[int]:
    """List the storages of what is kept of a call, of the input (0) and the output (-1)."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = affine(*inputs)
    places = {inputs[0].untyped_storage().data_ptr(): 0, out.untyped_storage().data_ptr(): -1}
    return {places[place] for place in saved if place in places}


@pytest.mark.parametrize("value", [None, 0.0, 1e-4, -1e-3, 0.05], ids=str)
def test_gradients_are_those_in_double_precision(value: float | None) -> None:
    single, double = tensors(value), tensors(value, torch.float64)
    wanted = gradients(double[1] * double[0] + double[2], double)
    for found, exact in zip(gradients(affine(*single), single), wanted, strict=True):
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (affine(*single) - affine(*double)).abs().max() <= 1e-6


def test_the_input_is_kept_where_it_cannot_be_recovered() -> None:
    assert kept(tensors()) == {-1}
    assert kept(tensors(0.0)) == {0}
    assert kept(tensors(1e-3)) == {0}
    assert kept(tensors(dtype=torch.float64)) == {0}
    far = tensors()
    far[2].data[3] = 1000.0
    assert kept(far) == {0}
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(tensors()) == {0}


def test_checked_by_finite_differences_where_the_input_is_kept() -> None:
    assert torch.autograd.gradcheck(affine, tensors(0.0, torch.float64))


def test_second_derivatives_are_those_in_double_precision() -> None:
    """Where the output is kept, and where the input is."""
    for value in (None, 0.0):
        single, double = tensors(value), tensors(value, torch.float64)
        pairs = []
        for y, scale, shift, out in ((*single, affine(*single)), (*double, double[1] * double[0] + double[2])):
            slopes = torch.autograd.grad(out.pow(3).sum(), [y, scale, shift], create_graph=True)
            pairs.append(torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), [y, scale, shift]))
        for found, exact in zip(*pairs, strict=True):
            assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_model_with_a_scale_of_zero_trains_rightly() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3)
    bank = vispeft.attach(model, vispeft.SSF())
    with torch.no_grad():
        for key, tensor in bank.named_tensors().items():
            if key.endswith("scale"):
                tensor[1] = 0.0
    images = torch.randn(2, 3, 16, 16)
    found = torch.autograd.grad(model(images).square().sum(), [p for _, p in bank.trainable_parameters()])
    model.double()
    wanted = torch.autograd.grad(model(images.double()).square().sum(), [p for _, p in bank.trainable_parameters()])
    for (name, _), one, other in zip(bank.trainable_parameters(), found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max(), name


def test_the_device_is_asked_once_a_step_for_all_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 48 sites of a ViT-L waited for the device in every step."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3)
    bank = vispeft.attach(model, vispeft.SSF())
    asked, images = model.train().routing.recoveries, torch.randn(2, 3, 16, 16)
    taken: list[bool | None] = []
    monkeypatch.setattr(layers, "affine", lambda *a: taken.append(a[3]) or affine(*a))  # type: ignore[func-returns-value]
    optimizer = torch.optim.AdamW([p for _, p in bank.trainable_parameters()], 1e-3, fused=True)
    before = asked.questions
    for step in range(2):
        for _ in range(2):
            model(images).square().sum().backward()
        assert asked.questions - before == step + 1
        optimizer.step()
    assert set(taken) == {True}
    first, sites = bank.named_tensors()["blocks.0.attn.qkv/ssf.scale"], len(taken) // 4
    with torch.no_grad():
        first[1] = 0.0
    model(images)
    assert asked.questions - before == 3
    assert taken[-sites:].count(False) == 1
    assert len(copy.deepcopy(model).routing.recoveries._held) == 0
    model.eval()
    assert len(asked._held) == 0


def test_few_numbers_in_reduced_precision_are_rounded_once() -> None:
    y, scale, shift = (tensor.detach() for tensor in tensors())
    found = affine(y.bfloat16(), scale, shift)
    assert torch.equal(found, (scale * y.bfloat16().float() + shift).bfloat16())


def test_the_short_way_under_autocast_equals_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3)
    bank, images, found = vispeft.attach(model, vispeft.SSF()), torch.randn(2, 3, 16, 16), []
    taken: list[Tensor | None] = []

    def counted(short: Any) -> Any:
        return lambda *a: taken.append(short(*a)) or taken[-1]

    for ways in ((counted(layers.scaled_linear), counted(layers.affine_norm)), (lambda *_: None, lambda *_: None)):
        monkeypatch.setattr(layers, "scaled_linear", ways[0])
        monkeypatch.setattr(layers, "affine_norm", ways[1])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).square().sum()
        found.append([loss, *torch.autograd.grad(loss, [p for _, p in bank.trainable_parameters()])])
    assert sum(out is not None for out in taken) == 2 * 6 + 1  # in every block, and the last norm
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_an_exported_graph_in_reduced_precision_serves_all_batches() -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    vispeft.attach(model.bfloat16().eval(), vispeft.SSF(), verify=False)
    images = torch.randn(2, 3, 16, 16).bfloat16()
    exported = torch.export.export(model, (images,), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
    assert exported.module()(images.repeat(600, 1, 1, 1)).shape == (1200, 3)
