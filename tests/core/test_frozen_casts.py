"""Frozen matrices in the type of autocast: cast once, equal to autocast's bit for bit, dropped on every change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vispeft

ROLES = ("attn.qkv", "mlp.fc1")


def adapted(method: vispeft.Method | None = None) -> tuple[VisionTransformer, vispeft.AdapterBank]:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    bank = vispeft.attach(model, method or vispeft.LoRA(rank=2, roles=ROLES))
    return model.train(), bank


def run(model: VisionTransformer, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out: Tensor = model(images)
    return out


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_they_are_made_once_and_for_training_alone(images: Tensor) -> None:
    model, _ = adapted()
    casts = model.routing.casts
    with torch.no_grad():
        run(model, images)
    model(images)
    assert len(casts) == 0  # neither in evaluation nor without autocast
    run(model, images)
    made = [held.made for held in casts._held.values()]
    assert len(made) == 4
    assert all(cast.dtype == torch.bfloat16 for pair in made for cast in pair if cast is not None)
    run(model, images)
    assert all(held.made is before for held, before in zip(casts._held.values(), made, strict=True))


@pytest.mark.parametrize("method", [vispeft.LoRA(rank=2, roles=ROLES), vispeft.SSF()], ids=["lora", "ssf"])
def test_outputs_and_gradients_are_those_of_autocast(method: vispeft.Method, images: Tensor) -> None:
    """The second step reads what the first one kept."""
    model, bank = adapted(method)
    tensors = [parameter for _, parameter in bank.trainable_parameters()]
    steps = []
    for kept in (False, True, True):
        if not kept:
            model.routing.casts.get = lambda weight, bias, dtype: (weight, bias)
        else:
            vars(model.routing.casts).pop("get", None)
        out = run(model, images)
        steps.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for other in steps[1:]:
        assert all(torch.equal(one, two) for one, two in zip(steps[0], other, strict=True))


@pytest.mark.parametrize("change", ["in place", "bias", "data", "state dict", "unfrozen"])
def test_a_changed_matrix_is_cast_again(change: str, images: Tensor) -> None:
    model, _ = adapted()
    run(model, images)
    layer = model.blocks[1].mlp.fc1
    with torch.no_grad():
        if change == "in place":
            layer.weight.mul_(2)
        elif change == "bias":
            layer.bias.add_(1)
        elif change == "data":
            layer.weight.data = layer.weight.data * 2
        elif change == "state dict":
            model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
        else:
            layer.weight.requires_grad_()
    found = run(model, images)
    other = copy.deepcopy(model)
    assert len(other.routing.casts) == 0
    assert torch.equal(found, run(other, images))
    if change == "unfrozen":
        assert torch.autograd.grad(found.float().sum(), layer.weight)[0].any()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_a_fused_optimiser_has_trained_meanwhile_is_cast_again(name: str, images: Tensor) -> None:
    """Such an optimiser does not count its changes; schedules over layers freeze tensors again behind it."""
    model, _ = adapted()
    run(model, images)
    tensor = getattr(model.blocks[1].mlp.fc1, name).requires_grad_()
    optimizer = torch.optim.AdamW([tensor], lr=0.5, fused=True)
    version = tensor._version
    run(model, images).float().square().sum().backward()
    optimizer.step()
    tensor.requires_grad_(False)
    assert tensor._version == version
    assert torch.equal(run(model, images), run(copy.deepcopy(model), images))


def test_they_are_dropped_and_in_no_copy(images: Tensor) -> None:
    model, bank = adapted()
    casts = model.routing.casts
    drops = {
        "train": lambda: model.train(),
        "eval": lambda: model.eval(),
        "move": lambda: model.to("cpu"),
        "load": lambda: model.load_state_dict(model.state_dict()),
        "detach": lambda: bank.detach("default"),
    }
    for name, drop in drops.items():
        run(model, images)
        assert len(casts) == 4, name
        assert len(pickle.loads(pickle.dumps(casts))) == len(copy.deepcopy(casts)) == 0
        drop()
        assert len(casts) == 0, name
