"""Tasks that pass the backbone in one batch: the same maps and gradients as one pass per task."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from tests.conformance.cells import METHODS, Cell, move
from vispeft.errors import ConfigError, UnknownNameError

slow = partial(pytest.param, marks=pytest.mark.slow)
TASKS = ("parts", "depth", "sal")
POLYHISTOR = {"task_dim": 5, "hidden_dim": 8, "embed_dim": 6, "reduction": 2}
FORMS: dict[str, vispeft.Method] = {
    **METHODS,
    "polyhistor": vispeft.Polyhistor(**POLYHISTOR, roles=("attn", "mlp")),
    "polyhistor_lite": vispeft.Polyhistor(**POLYHISTOR, lite=True, roles=("attn", "mlp"), parallel=False),
    "ssf_linears": vispeft.SSF(roles=("attn.proj", "mlp.fc1")),
}


def adapted(method: str, backbone: str, short: bool = True) -> tuple[Any, Tensor, vispeft.AdapterBank]:
    cell = Cell("lora", backbone, short=short)
    model = cell.model().double()
    bank = vispeft.attach(model, FORMS[method], tasks=list(TASKS), verify=False)
    move(bank, "default")
    return model, cell.images().double(), bank


def maps_and_gradients(model: Any, images: Tensor, bank: vispeft.AdapterBank, batched: bool) -> list[Tensor]:
    model.zero_grad()
    maps = vispeft.forward_tasks(model, images, batched=batched)
    assert list(maps) == list(TASKS)
    levels = [level for own in maps.values() for level in own]
    torch.stack([(i + 1) * level.square().mean() for i, level in enumerate(levels)]).sum().backward()
    gradients = [tensor.grad for key, tensor in bank.named_tensors().items() if not key.startswith("head/")]
    return [level.detach() for level in levels] + gradients


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("polyhistor", "swin"),
        ("polyhistor_lite", "swinv2"),
        ("lora_all", "vit"),
        slow("polyhistor", "swinv2"),
        slow("polyhistor_lite", "vit"),
        slow("lora", "swin"),
        slow("hydra", "vit"),
        slow("repadapter", "swin"),
        slow("convpass", "vit"),
        slow("fact", "vit"),
        slow("ssf_linears", "swin"),
    ],
)
def test_one_batch_equals_one_pass_per_task(method: str, backbone: str) -> None:
    model, images, bank = adapted(method, backbone)
    wanted = maps_and_gradients(model, images, bank, batched=False)
    assert not torch.allclose(wanted[0], wanted[2], rtol=1e-4)
    assert_same(maps_and_gradients(model, images, bank, batched=True), wanted)
    assert bank.task is None


@pytest.mark.parametrize("backbone", [slow("vit"), "swin"])
def test_one_batch_under_checkpointing(backbone: str) -> None:
    model, images, bank = adapted("polyhistor", backbone)
    wanted = maps_and_gradients(model.train(), images, bank, batched=False)
    model.set_grad_checkpointing(True)
    assert_same(maps_and_gradients(model, images, bank, batched=True), wanted)


@torch.no_grad()
def test_one_batch_beside_an_adapter_without_tasks_and_with_gains() -> None:
    model, images, bank = adapted("lora", "vit")
    for name, method in (("other", vispeft.Hydra(rank=2)), ("last", vispeft.SSF(roles=("attn.qkv",)))):
        vispeft.attach(model, method, name=name, verify=False)
        move(bank, name)
    model.double()
    bank.set_active(["last", "other", "default"], task="sal")
    for index, unit in enumerate(bank._entries["default"].units.values()):
        unit.gain = torch.tensor(0.5 + index / 4).double()
    wanted = vispeft.forward_tasks(model, images)
    found = vispeft.forward_tasks(model, images, batched=True)
    for task in TASKS:
        assert_same(found[task], wanted[task])
    assert bank.task == "sal"


@torch.no_grad()
def test_tasks_are_chosen_and_follow_their_order() -> None:
    model, images, bank = adapted("polyhistor", "swin")
    wanted = vispeft.forward_tasks(model, images)
    found = vispeft.forward_tasks(model, images, ["sal", "parts"], batched=True)
    assert list(found) == ["sal", "parts"]
    assert_same(found["sal"], wanted["sal"])
    bank.drop_task("parts")
    assert_same(vispeft.forward_tasks(model, images, batched=True)["sal"], wanted["sal"])
    with bank.together(["sal", "depth"]), pytest.raises(ConfigError, match=r"2 tasks .* batch of 3"):
        model(images[:1].repeat(3, 1, 1, 1))
    with pytest.raises(UnknownNameError, match="'parts'"):
        bank.together(["sal", "parts"])
    with pytest.raises(ConfigError, match="different names"):
        bank.together(["sal", "sal"])


@pytest.mark.parametrize(
    ("method", "backbone", "says"),
    [
        ("bitfit", "vit", "'default'.*'bitfit'.*'selection'"),
        ("ssf", "vit", "'ssf'.*'affine'"),
        ("vpt", "vit", "'vpt'.*'tokens'"),
        ("dora", "swin", "'lora'.*'weight'.*Linear"),
        ("prefix", "vit", "'prefix'.*'prefix'.*Attention"),
        ("lora_all", "swinv2", "'lora'.*'delta'"),
    ],
)
def test_units_that_act_on_whole_batches_are_refused(method: str, backbone: str, says: str) -> None:
    model, images, _ = adapted(method, backbone)
    with pytest.raises(ConfigError, match=says):
        vispeft.forward_tasks(model, images, batched=True)


@torch.no_grad()
def test_methods_of_one_pass_and_no_tasks_are_as_before() -> None:
    cell = Cell("lora", "swin", short=True)
    model, images = cell.model(), cell.images()
    vispeft.attach(model, METHODS["mtlora"], verify=False)
    for batched in (True, False):
        assert vispeft.forward_tasks(model, images, batched=batched)["seg"][0].shape == (2, 16, 8, 8)
