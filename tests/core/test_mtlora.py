"""MTLoRA: counts of the paper, streams of tasks, modes, what trains, and bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.task_maps import map_shapes
from vispeft.core.families import describe
from vispeft.errors import BackboneError, ConfigError, SiteError, UnknownNameError
from vispeft.interop import load_official, to_official

TASKS = ("seg", "depth")
slow = partial(pytest.param, marks=pytest.mark.slow)
SMALL: dict[str, Any] = {"rank": 3, "task_rank": 2, "dropout": 0.0}


def mtlora(**fields: Any) -> vispeft.MTLoRA:
    return vispeft.MTLoRA(**{"tasks": TASKS, **SMALL, **fields})


def adapted(backbone: str, moved: bool = True, **fields: Any) -> tuple[Any, Tensor, vispeft.AdapterBank]:
    """Adapt a small model, in double precision."""
    cell = Cell("lora", backbone)
    model, images = cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, mtlora(**fields), verify=False)
    if moved:
        move(bank, "default")
    return model, images, bank


# ---------------------------------------------------------------------- counts

PAPER = [
    # plus, rank, rank of a task, low-rank terms, rest of the backbone: the public code's own counts for four tasks
    (False, 4, 4, 559_104, 1_599_546),
    (False, 8, 8, 1_118_208, 1_599_546),
    (False, 16, 4, 1_406_976, 1_599_546),
    (False, 32, 4, 2_537_472, 1_599_546),
    (False, 64, 4, 4_798_464, 1_599_546),
    (True, 4, 4, 575_232, 51_258),
    (True, 8, 8, 1_150_464, 51_258),
    (True, 16, 4, 1_471_488, 51_258),
    (True, 16, 16, 2_300_928, 51_258),
    (True, 32, 4, 2_666_496, 51_258),
    (True, 64, 4, 5_056_512, 51_258),
]


@pytest.fixture(scope="module")
def swin_tiny() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=448, num_classes=0)


def test_the_backbone_has_the_size_of_the_public_one(swin_tiny: nn.Module) -> None:
    sizes = describe(swin_tiny).tensors
    assert sum(sum(own.values()) for path, own in sizes.items() if path != "norm") == 27_517_818


@pytest.mark.parametrize(("plus", "rank", "task_rank", "terms", "rest"), PAPER)
def test_counts_are_those_of_the_public_code(
    plus: bool, rank: int, task_rank: int, terms: int, rest: int, swin_tiny: nn.Module
) -> None:
    method = vispeft.MTLoRA(
        tasks=("semseg", "normals", "sal", "human_parts"), rank=rank, task_rank=task_rank, plus=plus
    )
    view = describe(swin_tiny)
    chosen = sum(view.tensors[path][name] for path, name in method._chosen(view))
    assert (method.parameter_count(view) - chosen, chosen) == (terms, rest)


def test_the_plan_has_the_counted_size(swin_tiny: nn.Module) -> None:
    method = vispeft.MTLoRA(tasks=("semseg", "normals", "sal", "human_parts"), plus=True)
    found = vispeft.plan(swin_tiny, method)
    assert found.trainable == method.parameter_count(describe(swin_tiny)) == 1_471_488 + 51_258
    assert found.tasks == method.tasks
    base = {
        name: sum(t.numel() for t in item.build().parameters())
        for name, item in ((item.key, item) for item in found)
        if item.unit == "base"
    }
    assert sum(size for name, size in base.items() if name.startswith("patch_embed")) == 4_896


# ---------------------------------------------------------------------- streams


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone", ["vit", slow("vit_glu"), slow("vit_aimv2"), slow("eva_dinov3"), "eva02", "swin", "swinv2"]
)
def test_maps_of_tasks_start_at_those_of_the_plain_model(backbone: str) -> None:
    model, images, bank = adapted(backbone, moved=False)
    maps = vispeft.forward_tasks(model, images)
    assert list(maps) == list(TASKS)
    with bank.disabled():
        plain = model.task_maps(images, ["x"], bank.view.map_taps(None))["x"]
    channels, strides = map_shapes(model)
    for levels in maps.values():
        assert [level.shape[1] for level in levels] == channels
        assert [images.shape[-1] // level.shape[-1] for level in levels] == strides
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(levels, plain, strict=True))
    if backbone.startswith("swin"):
        assert strides == [4, 4]  # behind patch merging, which the last stage lacks


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "mode"),
    [
        ("vit", "matrixv2"),
        slow("vit_reg_ls", "matrix"),
        ("swin", "matrix"),
        slow("swin", "addition"),
        slow("swinv2", "matrixv2"),
    ],
)
def test_a_chosen_task_gives_its_maps_alone(backbone: str, mode: str) -> None:
    model, images, bank = adapted(backbone, mode=mode)
    maps = vispeft.forward_tasks(model, images)
    assert not torch.allclose(maps["seg"][-1], maps["depth"][-1])
    for task in TASKS:
        with bank.using(task=task):
            features, own = model.forward_intermediates(images, norm=True)
            # The other task's terms do not act, unless the shared map is made of them.
            here = model.blocks[-1] if backbone.startswith("vit") else model.layers[-1].blocks[-1]
            assert len(here.attn.proj.acting.branch) == (3 if mode == "addition" else 1)
        level = (
            own[-1]
            if backbone.startswith("vit")
            else model.norm(maps[task][-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        )
        assert torch.allclose(own[-1], level, rtol=1e-10, atol=1e-12)
        if backbone.startswith("vit"):
            assert torch.allclose(own[-1], maps[task][-1], rtol=1e-10, atol=1e-12)
            assert torch.equal(features[:, -own[-1][0, 0].numel() :].mT.reshape(own[-1].shape), own[-1])
        else:
            assert torch.equal(features.permute(0, 3, 1, 2), own[-1])
            # Merged, the maps behind the first stage are those handed out.
            merged = model.layers[1].downsample(own[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert torch.allclose(merged, maps[task][0], rtol=1e-10, atol=1e-12)
    assert torch.equal(model(images), model(images))  # without a task the shared stream answers


def test_dropout_and_drop_path_are_drawn_for_each_stream() -> None:
    model, images, _ = adapted("swin", moved=False, drop_path=0.5)
    torch.manual_seed(0)
    model.train()
    maps = vispeft.forward_tasks(model, images.repeat(8, 1, 1, 1))
    # The factors are at their start, so streams differ by nothing but the branches that were dropped.
    assert not torch.allclose(maps["seg"][-1], maps["depth"][-1])
    model, images, _ = adapted("swin", dropout=0.5)
    same = vispeft.forward_tasks(model, images)["seg"][0]
    model.train()
    assert not torch.allclose(vispeft.forward_tasks(model, images)["seg"][0], same)


def test_only_the_stated_tensors_train_and_each_gets_a_gradient() -> None:
    model, images, bank = adapted("swin", trainable_scale_shared=True, trainable_scale_per_task=True)
    bank.verify()
    loss = sum(level.square().sum() for levels in vispeft.forward_tasks(model, images).values() for level in levels)
    loss.backward()
    none = {name for name, tensor in bank.named_tensors().items() if tensor.grad is None}
    last = "layers.1.blocks.0.mlp.fc2/lora."
    assert none == {f"{last}A", f"{last}B", f"{last}multiplier", "head/weight", "head/bias"}
    names = {key.partition("/")[2] for key in bank.named_tensors()}
    assert {"task@seg.A", "task@depth.multiplier", "lora.multiplier"} <= names
    base = {key.replace("/base", "") for key in bank.named_tensors() if "/base" in key}
    assert "patch_embed.proj.weight" in base
    assert "layers.1.downsample.reduction.weight" in base
    assert sum(key.endswith("relative_position_bias_table") for key in base) == 3
    assert not any(key.startswith("norm.") for key in base)


def test_switches_choose_what_trains_of_the_base() -> None:
    off = {f"train_{part}": False for part in ("patch_embed", "norms", "rel_pos", "merging")}
    model = Cell("lora", "swin").model()
    assert all(item.unit in ("lora", "task") for item in vispeft.plan(model, mtlora(**off)))
    for part, paths in {
        "patch_embed": {"patch_embed.proj", "patch_embed.norm"},
        "merging": {"layers.1.downsample.reduction"},
        "rel_pos": {f"layers.{stage}.blocks.{block}.attn" for stage, block in ((0, 0), (0, 1), (1, 0))},
    }.items():
        found = vispeft.plan(model, mtlora(**{**off, f"train_{part}": True}))
        assert {item.site.path for item in found if item.unit == "base"} == paths


@torch.no_grad()
def test_shared_terms_merge_where_no_task_branches() -> None:
    model, images, bank = adapted("swin", plus=True)
    wanted = vispeft.forward_tasks(model, images)
    report = bank.merge(partial=True)
    assert "layers.0.blocks.0.mlp.fc1" in report.merged
    assert "layers.1.downsample.reduction" in report.merged
    assert "layers.0.blocks.1.mlp.fc1" in report.kept
    found = vispeft.forward_tasks(model, images)
    for task in TASKS:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(found[task], wanted[task], strict=True))
    bank.unmerge()
    assert all(map(torch.equal, vispeft.forward_tasks(model, images)["seg"], wanted["seg"]))


# ---------------------------------------------------------------------- files, tasks, bad input


@torch.no_grad()
def test_files_hold_the_tasks_and_the_numbers_of_each(tmp_path: Path) -> None:
    ranks = {"seg": (2, 3), "depth": 1}
    model, images, bank = adapted("swin", task_rank=ranks, scale=(4.0, 2.0), bits=1)
    model, images = model.float(), images.float()  # a file holds the spread of few-bit matrices in float32
    bank.save(tmp_path)
    header = json.loads((tmp_path / "adapter.json").read_text())
    assert header["tasks"] == list(TASKS)
    assert header["method"]["fields"]["task_rank"] == {"seg": [2, 3], "depth": 1}
    again = Cell("lora", "swin").model()
    loaded = vispeft.load(again, tmp_path)
    assert loaded.plan().method == bank.plan().method
    assert loaded.tasks() == list(TASKS)
    found, wanted = vispeft.forward_tasks(again, images), vispeft.forward_tasks(model, images)
    assert all(torch.equal(a, b) for task in TASKS for a, b in zip(found[task], wanted[task], strict=True))


def test_public_names_tell_the_norms_of_maps_from_that_of_patches() -> None:
    model, images, bank = adapted("swin", train_norms=False)
    fresh = Cell("lora", "swin").model().double()
    load_official(fresh, "mtlora", to_official(bank, "mtlora"), {"lora_dropout": 0.0})
    found, wanted = (vispeft.forward_tasks(one.eval(), images) for one in (fresh, model))
    for task in TASKS:
        assert all(map(torch.allclose, found[task], wanted[task]))


def test_tasks_of_attach_and_of_the_method_are_the_same() -> None:
    cell = Cell("lora", "swin")
    first, second = (
        vispeft.attach(cell.model(), method, tasks=tasks, verify=False)
        for method, tasks in ((mtlora(), None), (mtlora(tasks=()), list(TASKS)))
    )
    assert first.tasks() == second.tasks() == list(TASKS)
    assert first.plan().method == second.plan().method
    assert list(first.named_tensors()) == list(second.named_tensors())


@pytest.mark.parametrize(
    ("fields", "tasks", "says"),
    [
        ({"tasks": ()}, None, r"MTLoRA has no tasks\. Name them"),
        ({}, ["seg", "edge"], r"Name the tasks once"),
        ({"tasks": ("a b",)}, None, r"different names"),
        ({"tasks": "seg"}, None, r"different names"),
        ({"rank": (2, 3, 4)}, None, r"rank=\(2, 3, 4\)\): 3 numbers were given, and this model has 2 stages"),
        ({"task_rank": {"seg": (1, 2, 3), "depth": 1}}, None, r"3 numbers were given"),
        ({"task_rank": {"seg": 1}}, None, r"Give one entry for each task"),
        ({"task_scale": {"seg": 1.0, "depth": 0.0}}, None, r"other than zero"),
        ({"rank": (2, 0)}, None, r"at least 1"),
        ({"dropout": (0.1, 1.0)}, None, r"share"),
        ({"roles": ("norm1",)}, None, r"acts at"),
        ({"roles": ("downsample.reduction",)}, None, r"acts at"),
    ],
)
def test_bad_input_is_refused(fields: dict[str, Any], tasks: Any, says: str) -> None:
    model = Cell("lora", "swin").model()
    before = list(model.state_dict())
    with pytest.raises((ConfigError, SiteError), match=says):
        vispeft.attach(model, mtlora(**fields), tasks=tasks)
    assert list(model.state_dict()) == before


def test_a_choice_without_task_branches_is_refused() -> None:
    model = Cell("lora", "swin").model()
    with pytest.raises(SiteError, match=r"branch at attn\.proj.*have none"):
        vispeft.plan(model, mtlora(blocks=(0,)))
    with pytest.raises(SiteError, match="no patch merging"):
        vispeft.plan(Cell("lora", "vit").model(), mtlora(plus=True))
    with pytest.raises(ConfigError, match="has 2 quarters"):
        vispeft.plan(Cell("lora", "vit").model(), mtlora(rank=(1, 2, 3)))


def test_two_adapters_cannot_branch_for_one_task() -> None:
    off = {f"train_{part}": False for part in ("patch_embed", "norms", "rel_pos", "merging")}
    model, images, bank = adapted("swin", **off)
    vispeft.attach(model, mtlora(tasks=("depth", "edge"), **off), name="other", verify=False)
    with pytest.raises(SiteError, match="'default' and 'other' both branch for the task 'depth'"):
        bank.set_active(["default", "other"])
    bank.rename_task("depth", "height", "other")
    bank.set_active(["default", "other"])
    assert list(vispeft.forward_tasks(model, images)) == ["seg", "depth", "height", "edge"]


def test_unknown_tasks_are_refused() -> None:
    model, images, bank = adapted("swin")
    with pytest.raises(UnknownNameError, match=r"'sg'.*'seg'"):
        bank.using(task="sg")
    with pytest.raises(UnknownNameError, match=r"'sg'.*'seg'"):
        vispeft.forward_tasks(model, images, tasks=["sg"])
    with pytest.raises(ConfigError, match="taps"):
        vispeft.forward_tasks(model, images, taps=[2])
    with bank.disabled(), pytest.raises(ConfigError, match="Name them"):
        vispeft.forward_tasks(model, images)
    getter = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32, out_indices=(8, 11))
    vispeft.attach(getter, mtlora(), verify=False)
    with pytest.raises(BackboneError, match="features_only"):
        vispeft.forward_tasks(getter, images)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["swin", "swinv2"])
def test_maps_in_front_of_patch_merging_are_those_of_other_methods(backbone: str) -> None:
    model, images, bank = adapted(backbone, moved=False, merged_maps=False)
    maps = vispeft.forward_tasks(model, images)
    channels, strides = map_shapes(model)
    with bank.disabled():
        *plain, last = model.forward_intermediates(images)[1]
    for levels in maps.values():
        assert [level.shape[1] for level in levels] == channels
        assert [images.shape[-1] // level.shape[-1] for level in levels] == strides
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(levels, plain, strict=False))
        assert torch.allclose(levels[-1], last, rtol=1e-9, atol=1e-10)
    other = mtlora(
        tasks=("edge",), train_patch_embed=False, train_norms=False, train_rel_pos=False, train_merging=False
    )
    vispeft.attach(model, other, name="other", verify=False)
    with bank.using("default", "other"), pytest.raises(ConfigError, match="merged_maps"):
        vispeft.forward_tasks(model, images)


@torch.no_grad()
def test_other_adapters_run_once_per_task_or_once_for_all() -> None:
    cell = Cell("lora", "swin")
    model, images = cell.model(), cell.images()
    plain = vispeft.forward_tasks(model, images, ["seg", "depth"])
    assert all(a is b for a, b in zip(plain["seg"], plain["depth"], strict=True))
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), tasks=["seg", "depth"], verify=False)
    move(bank, "default")
    maps = vispeft.forward_tasks(model, images, taps=[1])
    channels, strides = map_shapes(model, taps=[1])
    for task, (level,) in maps.items():
        with bank.using(task=task):
            assert torch.equal(level, model.forward_intermediates(images, norm=True)[1][1])
        assert ([level.shape[1]], [images.shape[-1] // level.shape[-1]]) == (channels, strides)
    assert not torch.allclose(maps["seg"][0], maps["depth"][0])


# ---------------------------------------------------------------------- training in other ways


def gradients(model: Any, images: Tensor, bank: vispeft.AdapterBank) -> tuple[list[Tensor], list[Tensor | None]]:
    model.zero_grad()
    maps = [level for levels in vispeft.forward_tasks(model, images).values() for level in levels]
    torch.stack([level.square().mean() for level in maps]).sum().backward()
    return [level.detach() for level in maps], [tensor.grad for tensor in bank.named_tensors().values()]


def assert_same(found: Any, wanted: Any) -> None:
    for ours, others in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        if ours is None or others is None:  # a compiled block gives zeros for what nothing reads
            assert all(tensor is None or not tensor.any() for tensor in (ours, others))
        else:
            assert torch.allclose(ours, others, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("backbone", "mode"), [slow("vit", "matrix"), ("swin", "addition"), slow("swinv2", "matrixv2")]
)
def test_checkpointing_changes_nothing(backbone: str, mode: str) -> None:
    model, images, bank = adapted(backbone, mode=mode, plus=backbone != "vit")
    model.train()
    wanted = gradients(model, images, bank)
    model.set_grad_checkpointing(True)
    assert_same(gradients(model, images, bank), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_blocks_compiled_one_by_one_change_nothing(backbone: str) -> None:
    cell = Cell("lora", backbone, short=True)  # each block takes seconds
    model, images = cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, mtlora(), verify=False)
    move(bank, "default")
    wanted = gradients(model, images, bank)
    for block in model.blocks if backbone == "vit" else [stage.blocks[0] for stage in model.layers]:
        # Of a Swin block only the capture is tested: the backward graph takes most of a minute to make.
        block.compile(backend="aot_eager" if backbone == "vit" else "eager", fullgraph=True)
    assert_same(gradients(model, images, bank), wanted)
