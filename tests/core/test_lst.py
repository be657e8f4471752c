"""The ladder: counts, its start, what it keeps, its limits, and what stands beside it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.backbones.pruning import strongest
from vispeft.errors import ConfigError, SiteError

COUNTS = {
    ("vit_base_patch16_224", vispeft.LST(reduction=2)): 25_428_876,
    ("vit_base_patch16_224", vispeft.LST(reduction=4)): 7_406_412,
    ("vit_base_patch16_224", vispeft.LST()): 2_376_492,
    ("vit_base_patch16_224", vispeft.LST(reduction=16)): 856_860,
    ("vit_base_patch16_224", vispeft.LST(blocks=(1, 2, 3, 5, 6, 7, 9, 10, 11))): 1_819_497,
    ("swin_base_patch4_window7_224", vispeft.LST()): 2_444_064,
}


@pytest.mark.parametrize(("entry", "count"), COUNTS.items(), ids=lambda value: str(value)[-40:])
def test_stated_counts(entry: tuple[str, vispeft.Method], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(entry[0])
    plan = vispeft.plan(model, entry[1])
    assert plan.trainable == count
    assert entry[1].parameter_count(vispeft.backbones.describe(model)) == count


def ladder(backbone: str, **fields: object) -> tuple[nn.Module, vispeft.AdapterBank, Tensor]:
    cell = Cell("lst", backbone)
    model = cell.model()
    return model, vispeft.attach(model, vispeft.LST(**fields)), cell.images()


def test_no_gradient_enters_the_backbone() -> None:
    model, _, images = ladder("vit", reduction=2)
    model.pos_embed.requires_grad_()  # not even where the backbone could take one
    hidden = model.read_hidden(model.side(), images, frozenset(), 2)
    assert sorted(hidden) == [-1, 0, 1]
    assert not any(tensor.requires_grad for tensor in hidden.values())
    model(images).sum().backward()
    assert model.pos_embed.grad is None
    assert all(
        p.grad is None for n, p in model.named_parameters() if not n.startswith(("adapters", "head", "adapter_"))
    )


def test_what_is_kept_shrinks_with_the_width() -> None:
    kept = {}
    for reduction in (2, 4):
        model, _, images = ladder("vit", reduction=reduction)
        hidden = model.read_hidden(model.side(), images, frozenset(), 2)
        sizes: dict[int, int] = {t.untyped_storage().data_ptr(): 0 for t in [*hidden.values(), *model.parameters()]}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.side().climb(hidden, 2, False)
        kept[reduction] = sum(sizes.values())
    assert 0.45 < kept[4] / kept[2] < 0.6


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit", "vit_siglip", "eva_dinov3", "swin"])
def test_kept_outputs_give_the_same(backbone: str) -> None:
    model, bank, images = ladder(backbone, reduction=2, blocks=(1,))
    move(bank, "default")
    method = bank.plan().method
    outputs = method.frozen_outputs(model, images)
    assert sorted(outputs) == ["block-1", "block1"]
    assert torch.equal(method.from_outputs(model, outputs), model(images))


@torch.no_grad()
def test_limits_of_the_gates() -> None:
    model, bank, _ = ladder("vit", reduction=2, start="random")
    move(bank, "default")
    unit = model.side()
    entry, *above = (torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    others = {-1: entry, **{block: tensor + 1 for block, tensor in enumerate(above)}}
    states = {-1: entry, **dict(enumerate(above))}
    for gate in unit.gates.values():
        gate.fill_(100.0)
    assert torch.equal(unit.climb(states, 2, False)[-1], unit.climb(others, 2, False)[-1])
    for gate in unit.gates.values():
        gate.fill_(-100.0)
    one, other = unit.climb(states, 2, False), unit.climb({**states, -1: entry + 1}, 2, False)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[-1], unit.climb(others, 2, False)[-1])


@pytest.mark.parametrize("backbone", ["vit", "eva02", "eva_dinov3", "swin"])
def test_nothing_pruned_is_the_backbone_itself(backbone: str) -> None:
    model, _, _ = ladder(backbone, reduction=1)
    own, base = dict(model.side().named_parameters()), Cell("lst", backbone).model().state_dict()
    compared = 0
    for name, tensor in own.items():
        index, _, rest = name.removeprefix("blocks.").partition(".")
        places = {"0": "layers.0.blocks.0", "1": "layers.0.blocks.1", "2": "layers.1.blocks.0"}
        place = places[index] if "swin" in backbone and name.startswith("blocks.") else f"blocks.{index}"
        gated = {"mlp.fc1.weight": "mlp.fc1_x.weight", "mlp.fc1.bias": "mlp.fc1_x.bias"}
        rest = gated.get(rest, rest) if backbone == "eva02" else rest
        if name.startswith("blocks.") and f"{place}.{rest}" in base:
            assert torch.equal(tensor, base[f"{place}.{rest}"]), name
            compared += 1
    assert compared >= 2 * 9
    assert torch.equal(own["norm.weight"], base["norm.weight"] if "norm.weight" in base else base["fc_norm.weight"])
    if backbone == "swin":
        assert torch.equal(own["merging.2.reduction.weight"], base["layers.1.downsample.reduction.weight"])


def test_the_strongest_rows_stay_in_each_head() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    weight[[1, 3, 4]] *= 10
    assert strongest(weight, 3).tolist() == [1, 3, 4]
    weight = torch.ones(8, 5)
    weight[[2, 3, 0]] *= 10
    weight[[5, 6]] *= 0.5
    assert strongest(weight, 4, groups=2).tolist()[2:] == [4, 7]
    assert len(set(strongest(weight, 4, groups=2).tolist()) & {0, 2, 3}) == 2


def test_the_walk_keeps_what_was_made_strong() -> None:
    cell = Cell("lst", "vit")
    model = cell.model()
    odd, odd_inside = torch.arange(24) % 2 == 1, torch.arange(96) % 2 == 1
    wanted = {"embed": odd, "qkv": ~odd, "proj": odd, "fc1": odd_inside, "fc2": ~odd}
    block = model.blocks[0]
    with torch.no_grad():
        model.patch_embed.proj.weight[wanted["embed"]] *= 50
        for part in block.attn.qkv.weight.split(24):
            part[wanted["qkv"]] *= 50
        block.attn.proj.weight[wanted["proj"]] *= 50
        block.mlp.fc1.weight[wanted["fc1"]] *= 50
        block.mlp.fc2.weight[wanted["fc2"]] *= 50
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vispeft.attach(model, vispeft.LST(reduction=2))
    side = model.side().blocks["0"].state_dict()
    rows = torch.cat([wanted["qkv"]] * 3)
    assert torch.equal(side["norm1.weight"], base["blocks.0.norm1.weight"][wanted["embed"]])
    assert torch.equal(side["attn.qkv.weight"], base["blocks.0.attn.qkv.weight"][rows][:, wanted["embed"]])
    assert torch.equal(side["attn.qkv.bias"], base["blocks.0.attn.qkv.bias"][rows])
    assert torch.equal(side["attn.proj.weight"], base["blocks.0.attn.proj.weight"][wanted["proj"]][:, wanted["qkv"]])
    assert torch.equal(side["norm2.bias"], base["blocks.0.norm2.bias"][wanted["proj"]])
    assert torch.equal(side["mlp.fc1.weight"], base["blocks.0.mlp.fc1.weight"][wanted["fc1"]][:, wanted["proj"]])
    assert torch.equal(side["mlp.fc2.weight"], base["blocks.0.mlp.fc2.weight"][wanted["fc2"]][:, wanted["fc1"]])
    following = model.side().blocks["1"].state_dict()["norm1.weight"]
    assert torch.equal(following, base["blocks.1.norm1.weight"][wanted["fc2"]])


def test_adapters_inside_need_the_gradient_of_the_backbone() -> None:
    model, bank, images = ladder("vit", reduction=2)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="inside")
    with pytest.raises(SiteError, match="detach_hidden=False"):
        bank.set_active(["default", "inside"])
    vispeft.attach(model, vispeft.LST(reduction=2, detach_hidden=False), name="open")
    bank.freeze("default")
    for names in (["open", "inside"], ["inside", "open"]):
        bank.set_active(names)
        move(bank, "inside")
        model.zero_grad()
        model(images).square().sum().backward()
        units = [p for name, p in bank.trainable_parameters() if not name.startswith("adapter_heads.")]
        assert all(p.grad is not None and p.grad.any() for p in units)


def test_levels_of_a_swin_train() -> None:
    model, bank, images = ladder("swin", reduction=2, levels=True)
    move(bank, "default")
    method = vispeft.LST(reduction=2, levels=True)
    assert bank.report().trainable == method.parameter_count(bank.view)
    assert method.parameter_count(bank.view) - vispeft.LST(reduction=2).parameter_count(bank.view) == 2 * 4 + 4 * 8 + 8
    maps = model.forward_intermediates(images, intermediates_only=True)
    with bank.disabled():
        frozen = model.forward_intermediates(images, intermediates_only=True)
    assert [m.shape for m in maps] == [m.shape for m in frozen]
    maps[0].square().sum().backward()
    reached = {name for name, p in model.side().named_parameters() if p.grad is not None}
    assert {name for name in reached if name.startswith("levels.0.")}
    assert not {name for name in reached if name.startswith(("up.", "blocks.2."))}


@torch.no_grad()
def test_a_swin_whose_size_changes_takes_its_ladder_along() -> None:
    model, bank, _ = ladder("swin", reduction=2)
    move(bank, "default")
    model.set_input_size((64, 64))
    images = Cell("lst", "swin").images(size=(64, 64))
    assert model.side().blocks["0"].window_size == model.layers[0].blocks[0].window_size == (8, 8)
    assert torch.isfinite(model(images)).all()


def test_bad_input_is_refused() -> None:
    for fields in ({"reduction": 0}, {"reduction": 2.5}, {"start": "fisher"}, {"roles": ("mlp",)}):
        with pytest.raises(ConfigError):
            vispeft.LST(**fields)
    for reduction in (13, 25):
        with pytest.raises(ConfigError, match="at most reduction=12"):
            vispeft.attach(Cell("lst", "vit").model(), vispeft.LST(reduction=reduction))
    with pytest.raises(ConfigError, match="Block 7"):
        vispeft.attach(Cell("lst", "vit").model(), vispeft.LST(reduction=2, blocks=(7,)))
    getter = timm.create_model("swin_tiny_patch4_window7_224", features_only=True)
    with pytest.raises(SiteError, match="forward_intermediates"):
        vispeft.attach(getter, vispeft.LST())
