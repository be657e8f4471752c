"""What was built on LoRA: DoRA, LoRA+, LoRA-FA and PiSSA, each against its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import vispeft
from tests.conformance.cells import LINEARS, Cell, move
from vispeft.errors import ConfigError

S = 12 * 768  # widths of a ViT-B's blocks, summed up
COUNTS = {
    vispeft.LoRA(rank=8): 4 * 8 * S,
    vispeft.LoRA(rank=8, start="pissa"): 4 * 8 * S,
    vispeft.LoRA(rank=8, freeze_a=True): 2 * 8 * S,
    vispeft.LoRA(rank=8, dora=True): 4 * 8 * S + 2 * S,
    vispeft.LoRA(rank=8, dora=True, freeze_a=True): 2 * 8 * S + 2 * S,
}


@pytest.mark.parametrize(("method", "count"), COUNTS.items(), ids=lambda value: str(value)[:40])
def test_counts(method: vispeft.LoRA, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    plan = vispeft.plan(model, method)
    assert plan.trainable == count == method.parameter_count(vispeft.AdapterBank(model).view)


def adapted(method: vispeft.LoRA, backbone: str = "vit", moved: bool = True) -> tuple[Any, Any]:
    model = Cell("lora", backbone).model().double()
    bank = vispeft.attach(model, method)
    if moved:
        move(bank, "default")
    return model, bank


def parts(bank: Any, site: str) -> list[Tensor]:
    state = bank.state_dict()
    return [state[f"{site}/lora.{name}"] for name in ("A", "B", "magnitude")]


def test_dora_is_magnitude_times_direction() -> None:
    model, bank = adapted(vispeft.LoRA(rank=3, alpha=6, dora=True, roles=("mlp.fc2", "attn.v")))
    layer, x = model.blocks[1].mlp.fc2, torch.randn(4, 96, dtype=torch.float64)
    a, b, m = parts(bank, "blocks.1.mlp.fc2")
    direction = layer.weight + 2 * b @ a
    weight = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ weight.t() + layer.bias, rtol=1e-10, atol=1e-12)
    a, b, m = parts(bank, "blocks.1.attn.qkv:v")
    layer, x = model.blocks[1].attn.qkv, torch.randn(4, 24, dtype=torch.float64)
    rows = layer.weight[48:] + 2 * b @ a
    whole = torch.cat([layer.weight[:48], m[:, None] * rows / rows.norm(dim=1, keepdim=True)])
    assert torch.allclose(layer(x), x @ whole.t() + layer.bias, rtol=1e-10, atol=1e-12)


def test_the_length_of_a_row_counts_as_a_constant_in_doras_gradient() -> None:
    model, bank = adapted(vispeft.LoRA(rank=3, dora=True, roles=("mlp.fc1",)))
    layer, x = model.blocks[0].mlp.fc1, torch.randn(4, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    named = bank.named_tensors()
    a, b, m = (named[f"blocks.0.mlp.fc1/lora.{name}"] for name in ("A", "B", "magnitude"))
    copies = [t.detach().clone().requires_grad_() for t in (a, b, m)]
    direction = layer.weight.detach() * 1.0 + copies[1] @ copies[0] * (8 / 3)
    for length, equal in (
        (direction.norm(dim=1, keepdim=True).detach(), True),
        (direction.norm(dim=1)[:, None], False),
    ):
        weight = copies[2][:, None] * direction / length
        loss = (x @ weight.t() + layer.bias.detach()).square().sum()
        gradients = torch.autograd.grad(loss, copies, retain_graph=True)
        assert torch.allclose(a.grad, gradients[0], rtol=1e-8) == equal
        assert torch.allclose(b.grad, gradients[1], rtol=1e-8) == equal
        assert torch.allclose(m.grad, gradients[2], rtol=1e-8)


def test_dora_starts_with_the_lengths_of_the_frozen_weight() -> None:
    model, bank = adapted(vispeft.LoRA(dora=True, roles=LINEARS), moved=False)
    for item in bank.plan():
        lengths = bank.state_dict()[f"{item.key}.magnitude"]
        assert torch.allclose(lengths, model.get_submodule(item.site.path).weight.norm(dim=1), rtol=1e-6)


def test_the_ratio_of_lora_plus_is_the_rate_of_b() -> None:
    _, bank = adapted(vispeft.LoRA(lr_ratio=16.0))
    rates = {id(p): group["lr"] for group in bank.parameter_groups(1e-3, 0.1) for p in group["params"]}
    for key, tensor in bank.named_tensors().items():
        assert rates[id(tensor)] == pytest.approx(16e-3 if key.endswith(".B") else 1e-3), key


def test_lora_fa_trains_b_alone_and_keeps_a(tmp_path: Path) -> None:
    model, bank = adapted(vispeft.LoRA(rank=4, freeze_a=True))
    assert {key.rsplit(".", 1)[1] for key in bank.named_tensors() if "/lora" in key} == {"B"}
    bank.save(tmp_path)
    assert {key.rsplit(".", 1)[1] for key in load_file(tmp_path / "adapter.safetensors")} == {"A", "B"}
    again = Cell("lora", "vit").model().double()
    vispeft.load(again, tmp_path)
    images = Cell("lora", "vit").images().double()
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("alpha", [6.0, -3.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_from_the_largest_singular_values(alpha: float, rslora: bool, tmp_path: Path) -> None:
    method = vispeft.LoRA(rank=3, alpha=alpha, rslora=rslora, start="pissa", roles=("attn.q", "mlp.fc1"))
    model, bank = adapted(method, moved=False)
    frozen = {name: t.clone() for name, t in Cell("lora", "vit").model().double().state_dict().items()}
    for name, tensor in frozen.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    state = bank.state_dict()
    for key, rows in (("blocks.0.attn.qkv:q", slice(0, 24)), ("blocks.1.mlp.fc1", slice(0, 96))):
        u, s, v = torch.linalg.svd(frozen[f"{key.partition(':')[0]}.weight"][rows], full_matrices=False)
        term = method.scale * state[f"{key}/lora.B"] @ state[f"{key}/lora.A"]
        assert torch.allclose(term, u[:, :3] * s[:3] @ v[:3], atol=1e-6)
        assert torch.allclose(state[f"{key}/lora.A"].norm(dim=1), state[f"{key}/lora.B"].norm(dim=0), rtol=1e-5)
    move(bank, "default")
    bank.save(tmp_path)
    header = json.loads((tmp_path / "adapter.json").read_text())
    assert header["method"]["fields"]["rank"] == 6
    assert header["method"]["fields"]["start"] == "uniform"
    again, images = Cell("lora", "vit").model().double(), Cell("lora", "vit").images().double()
    loaded = vispeft.load(again, tmp_path)
    assert torch.allclose(again(images), model(images), rtol=1e-10, atol=1e-12)
    loaded.merge()
    assert torch.allclose(again(images), model(images), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dora": True, "dropout": 0.1}, "dropout=0"),
        ({"start": "pissa", "dora": True}, "does not go together with dora=True"),
        ({"start": "pissa", "bits": 2}, "bits=2"),
        ({"freeze_a": True, "bits": 1}, "bits=32"),
        ({"start": "svd"}, "'uniform' or 'pissa'"),
        ({"lr_ratio": 0.0}, "above 0"),
    ],
)
def test_contradicting_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vispeft.LoRA(**fields)


def test_a_rank_beyond_the_singular_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank=25.*24 singular values"):
        adapted(vispeft.LoRA(rank=25, start="pissa"))


def test_pissa_starts_from_the_singular_values_of_a_convolution_as_a_matrix() -> None:
    cell = Cell("lora", "vit", short=True)
    model, images = cell.model(), cell.images()
    wanted = model(images)
    bank = vispeft.attach(model, vispeft.LoRA(start="pissa", rank=2, roles=("patch_embed",)), verify=False)
    assert torch.allclose(model(images), wanted, atol=1e-5)
    a, b = (bank.named_tensors()[f"patch_embed.proj/lora.{name}"] for name in "AB")
    values = torch.linalg.svdvals(model.patch_embed.proj._parameters["weight"].flatten(1).double())
    found = torch.linalg.svdvals((b @ a).double())[:2]
    assert torch.allclose(found * bank.units()["patch_embed.proj/lora"].scale, values[:2], rtol=1e-4)
