"""Polyhistor: what belongs to one task, what is generated when, and its plain form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.core.families import describe
from vispeft.core.sites import View
from vispeft.errors import ConfigError, SiteError, UnknownNameError
from vispeft.interop import export_task
from vispeft.methods import HyperNetwork, Polyhistor

TASKS = ("parts", "depth")
SIZES = {"task_dim": 5, "hidden_dim": 8, "embed_dim": 6, "reduction": 2}
FORMS = {
    "blocks": {},
    "stages": {"share": "stage", "roles": ("attn", "mlp")},
    "lite": {"lite": True, "roles": ("attn", "mlp")},
    "lite, full, sequential": {"lite": True, "rank_divisor": None, "parallel": False, "kernel_front": False},
}


def adapted(backbone: str = "swin", **fields: object) -> tuple[nn.Module, AdapterBank]:
    model = Cell("lora", backbone).model()
    bank = vispeft.attach(model, Polyhistor(**SIZES, **fields), tasks=TASKS, verify=False)
    move(bank, "default")
    return model, bank


def images() -> Tensor:
    return Cell("lora", "swin").images()


@torch.no_grad()
def outputs(model: nn.Module, bank: AdapterBank) -> dict[str, Tensor]:
    found = {}
    for task in bank.tasks("default"):
        with bank.using("default", task=task):
            found[task] = model(images())
    return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """List the task of each call of a generator."""
    calls: list[str] = []
    generate = HyperNetwork.generate

    def count(self: HyperNetwork, task: str, *rest: object) -> object:
        calls.append(task)
        return generate(self, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(HyperNetwork, "generate", count)
        yield calls


@pytest.fixture(scope="module")
def swin_t() -> View:
    with torch.device("meta"):
        return describe(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0))


BESIDE = {"roles": ("mlp",), "reduction": 2, "parallel": True, "layernorm": "out", "activation": "swish"}
"""The adapters of the comparison: parallel to the MLP, half as wide, with a LayerNorm."""
WITHOUT_FINAL_NORM = ("patch_embed", "patch_embed.norm", "block", "downsample.norm")
COUNTS = {
    "Polyhistor": (Polyhistor(tasks=tuple("abcd")), 1, 6_410_684),
    "Lite": (Polyhistor(tasks=tuple("abcd"), lite=True), 1, 413_552),
    "Lite, 1": (Polyhistor(tasks=tuple("abcd"), lite=True, reduction=1), 1, 791_072),
    "Lite, 4": (Polyhistor(tasks=tuple("abcd"), lite=True, reduction=4), 1, 280_952),
    "Lite, 8": (Polyhistor(tasks=tuple("abcd"), lite=True, reduction=8), 1, 228_692),
    "HyperFormer": (Polyhistor(tasks=tuple("abcd"), rank_divisor=None, reduction=4), 1, 71_911_184),
    "BitFit": (vispeft.BitFit(roles=WITHOUT_FINAL_NORM, include_rel_pos_bias=True), 4, 299_112),
    "relative bias": (vispeft.BitFit(roles=("rel_pos",)), 4, 93_288),
    "VPT shallow": (vispeft.VPTWindow(deep=False), 4, 19_200),
    "VPT deep": (vispeft.VPTWindow(), 4, 883_200),
    "Adapter": (vispeft.Adapter(**BESIDE, start="small"), 4, 8_688_000),
    "shared adapter": (vispeft.Adapter(**BESIDE, start="small"), 1, 2_172_000),
    "LoRA": (vispeft.LoRA(roles=("attn.qkv",), rank=4), 4, 282_624),
    "Compacter++": (vispeft.Compacter(**BESIDE, rule_start=0.01), 4, 115_072),
}
"""The sizes of the published comparison on Swin-T: method, copies, trainable parameters."""


@pytest.mark.parametrize("row", COUNTS.values(), ids=COUNTS.keys())
def test_published_sizes(row: tuple[vispeft.Method, int, int], swin_t: View) -> None:
    method, copies, wanted = row
    assert copies * method.parameter_count(swin_t) == wanted


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_code_belongs_to_its_task_and_all_generators_train(form: dict[str, object]) -> None:
    model, bank = adapted(**form)
    bank.verify()
    before = outputs(model, bank)
    assert not torch.allclose(before["parts"], before["depth"], atol=1e-4)
    codes = [key for key in bank.named_tensors() if "/polyhistor_task@" in key]
    assert [key.rpartition("@")[2] for key in codes] == [f"{task}.code" for task in TASKS]
    with torch.no_grad():
        bank.named_tensors()[codes[1]].add_(0.5)
    after = outputs(model, bank)
    assert torch.equal(after["parts"], before["parts"])
    assert not torch.allclose(after["depth"], before["depth"], atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
def test_templates_get_gradients_from_every_stage(stage: int) -> None:
    model, bank = adapted(lite=True)
    with bank.using("default", task="depth"):
        result = model.run(images())
    bundle = result.stages[stage].tokens
    # What the stage adds to its own input, so that only its own adapters count.
    (bundle - result.entries[stage].tokens.detach()).square().sum().backward()
    generators = {key: t for key, t in bank.named_tensors().items() if "/polyhistor_network." in key}
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in generators.values())


def test_generated_once_per_task_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = adapted()
    blocks = 3
    with counted(monkeypatch) as calls:
        first, second = outputs(model, bank), outputs(model, bank)
        assert sorted(calls) == sorted(blocks * TASKS)
        assert all(torch.equal(first[task], second[task]) for task in TASKS)
        calls.clear()
        model.train()
        loss = torch.zeros(())
        for task in TASKS:
            with bank.using("default", task=task):
                loss = loss + model(images()).square().mean()
        assert sorted(calls) == sorted(blocks * TASKS)
    loss.backward()
    optimizer = torch.optim.AdamW([p for _, p in bank.trainable_parameters()], 0.01)
    optimizer.step()
    third = outputs(model.eval(), bank)
    assert not any(torch.allclose(third[task], first[task], atol=1e-5) for task in TASKS)


@pytest.mark.parametrize("backbone", ["swin", "swinv2", "vit"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_task_becomes_a_plain_adapter(form: dict[str, object], backbone: str, tmp_path: Path) -> None:
    model, bank = adapted(backbone, **form)
    wanted = outputs(model, bank)
    name = export_task(bank, "depth", "default")
    assert bank.active == ["default"]
    bank.save(tmp_path, name)
    fresh = Cell("lora", backbone).model()
    loaded = vispeft.load(fresh, tmp_path)
    assert type(loaded.plan().method) is vispeft.Adapter
    with torch.no_grad():
        found = fresh(images())
    assert torch.allclose(found, wanted["depth"], rtol=1e-6, atol=1e-6 * float(found.abs().max()))


@torch.no_grad()
def test_a_copy_for_a_task_becomes_that_method() -> None:
    model = Cell("lora", "vit").model()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), tasks=TASKS, verify=False)
    move(bank, "default")
    wanted = outputs(model, bank)["parts"]
    bank.set_active(export_task(bank, "parts", "default", "alone"))
    assert torch.equal(model(images()), wanted)
    with pytest.raises(UnknownNameError, match="task to export"):
        export_task(bank, "nothing", "default")


@pytest.mark.parametrize("form", [{}, {"lite": True}], ids=["blocks", "lite"])
def test_another_task_comes_trains_and_goes(form: dict[str, object]) -> None:
    model, bank = adapted(**form)
    before = outputs(model, bank)
    bank.add_task("edges")
    with torch.no_grad():
        assert all(torch.equal(outputs(model, bank)[task], before[task]) for task in TASKS)
    trained = {name: p for name, p in bank.trainable_parameters() if p.requires_grad}
    assert [name.rpartition("@")[2] for name in trained] == ["edges.code"]
    model.train()
    with bank.using("default", task="edges"):
        model(images()).square().mean().backward()
    torch.optim.SGD(trained.values(), 0.1).step()
    after = outputs(model.eval(), bank)
    assert all(torch.equal(after[task], before[task]) for task in TASKS)
    assert not torch.allclose(after["edges"], after["depth"], atol=1e-4)
    bank.rename_task("depth", "relief")
    bank.drop_task("parts")
    last = outputs(model, bank)
    assert torch.equal(last["relief"], before["depth"])
    assert torch.equal(last["edges"], after["edges"])


def maps_and_gradients(model: nn.Module, bank: AdapterBank) -> list[Tensor]:
    model.zero_grad()
    maps = [level for levels in vispeft.forward_tasks(model, images().double()).values() for level in levels]
    torch.stack([level.square().mean() for level in maps]).sum().backward()
    gradients = [tensor.grad for key, tensor in bank.named_tensors().items() if not key.startswith("head/")]
    return [level.detach() for level in maps] + gradients


def test_maps_of_all_tasks_under_checkpointing() -> None:
    model, bank = adapted(lite=True)
    wanted = maps_and_gradients(model.double().train(), bank)
    model.set_grad_checkpointing(True)
    found = maps_and_gradients(model, bank)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_maps_of_all_tasks_with_compiled_blocks() -> None:
    model = Cell("lora", "vit", short=True).model()
    bank = vispeft.attach(model, Polyhistor(**SIZES), tasks=TASKS, verify=False)
    wanted = maps_and_gradients(model.double(), bank)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = maps_and_gradients(model, bank)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_tasks_come_from_the_field_or_from_attach(tmp_path: Path) -> None:
    model = Cell("lora", "vit").model()
    bank = vispeft.attach(model, Polyhistor(**SIZES, tasks=TASKS), verify=False)
    assert bank.tasks() == list(TASKS)
    with pytest.raises(ConfigError, match="none was chosen"):
        model(images())
    bank.save(tmp_path)
    fresh = Cell("lora", "vit").model()
    assert vispeft.load(fresh, tmp_path).tasks() == list(TASKS)
    wanted, found = outputs(model, bank), outputs(fresh, vispeft.AdapterBank.of(fresh))
    assert all(torch.equal(found[task], wanted[task]) for task in TASKS)
    with pytest.raises(ConfigError, match="Name the tasks once"):
        vispeft.attach(model, Polyhistor(tasks=TASKS), name="other", tasks=["edges"])
    with pytest.raises(ConfigError, match="different"):
        vispeft.attach(model, Polyhistor(tasks=("a", "a")), name="other")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="one network serves the whole model"):
        Polyhistor(lite=True, share="stage")
    with pytest.raises(SiteError, match="acts at attn and mlp"):
        Polyhistor(roles=("norm1",))
    model = Cell("lora", "swin").model()
    bank = vispeft.attach(model, Polyhistor(**{**SIZES, "reduction": 3}, lite=True), tasks=TASKS, verify=False)
    with pytest.raises(ConfigError, match="choose a reduction that divides"):
        export_task(bank, "depth", "default")
    assert bank.names == ["default"]
    assert bank.active == ["default"]
