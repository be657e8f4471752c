"""The bundle of streams, tasks that branch inside a block, runs with units that are not attached, and gains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.method import Method, PlanItem
from vispeft.core.model_units import StreamUnit, TokensUnit
from vispeft.core.sites import Site, View
from vispeft.core.streams import Stream, TaskStream
from vispeft.core.units import BranchUnit, LayerPass
from vispeft.errors import ConfigError, SiteError


class Memory(StreamUnit, Stream):
    """Rows that read every block and go on from one to the next; their mean is added to the feature."""

    name = "memory"
    identity_at_start = False

    def __init__(self, widths: Sequence[int], rows: int) -> None:
        super().__init__()
        self.blocks, self.shapes = len(widths), ((rows, widths[-1]),)
        self.rows = nn.Parameter(torch.empty(rows, widths[0]))

    def reset(self, generator: Generator) -> None:
        self.rows.normal_(0, 0.02, generator=generator)

    def streams(self) -> Sequence[Stream]:
        return (self,)

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor:
        return self.rows.expand(len(tokens), -1, -1) if present is None else present

    def keeps(self, block: int) -> bool:
        return block == self.blocks - 1

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        return pooled + kept[0].mean(1)


@dataclass(frozen=True, kw_only=True)
class MemoryRows(Method):
    """A method with a stream of its own."""

    rows: int = 3
    name: ClassVar[str] = "memory_rows"
    default_roles: ClassVar[tuple[str, ...]] = ("tokens",)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        for site in self.sites(view):
            yield PlanItem(site, "memory", partial(Memory, view.widths, self.rows))

    def parameter_count(self, view: View) -> int:
        return self.rows * view.widths[0]


@pytest.mark.parametrize("backbone", ["vit", "vit_reg_ls", "eva_dinov3", "swin", "swinv2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_method_brings_a_stream_of_its_own(backbone: str, checkpointing: bool, tmp_path: Any) -> None:
    cell = Cell("lora", backbone)
    model, images = cell.model(), cell.images()
    tokens = model.forward_intermediates(images, intermediates_only=True)
    bank = vispeft.attach(model, MemoryRows())
    move(bank, "default")
    model.set_grad_checkpointing(checkpointing)
    out = model(images)
    rows = bank._entries["default"].units[next(iter(bank._entries["default"].units))].rows
    out.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.any()
    found = model.forward_intermediates(images, intermediates_only=True)
    # Rows that only read leave the tokens alone.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, tokens, strict=True))
    result = model.run(images)
    assert [kept.shape for kept in result.kept["memory"]] == [(len(images), 3, bank.view.widths[-1])]
    assert set(result.streams.beside) == {"memory"}
    assert torch.allclose(model.forward_head(model.features(result)), out, atol=1e-5)
    with bank.disabled():
        assert not torch.allclose(model(images), out)


class TaskTerm(BranchUnit):
    """The low-rank term of one task at a layer, in the form of MTLoRA: the frozen product sees the shared input."""

    def __init__(self, site: Site, task: str) -> None:
        super().__init__()
        self.task = task
        self.down = nn.Parameter(torch.empty(2, site.in_features))
        self.up = nn.Parameter(torch.empty(site.out_features, 2))

    def reset(self, generator: Generator) -> None:
        self.down.normal_(0, 0.1, generator=generator)
        self.up.zero_()

    def streams(self) -> Sequence[Stream]:
        return [TaskStream(self.task)]

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        return {self.task: layer.frozen + layer.beside.get(self.task, layer.x) @ self.down.T @ self.up.T}


class Mean(BranchUnit):
    """Adds the mean of the tasks' outputs to the shared one."""

    def reset(self, generator: Generator) -> None:
        pass

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        return {}

    def join(self, layer: LayerPass, beside: Mapping[str, Tensor]) -> Tensor:
        return layer.shared + torch.stack(list(beside.values())).mean(0)


@dataclass(frozen=True, kw_only=True)
class Branches(Method):
    """Task branches in the last block of every stage."""

    own: tuple[str, ...] = ("seg", "depth")
    joins: bool = False
    name: ClassVar[str] = "toy_branches"
    default_roles: ClassVar[tuple[str, ...]] = ("attn.proj", "mlp.fc1", "mlp.fc2")
    multi_task: ClassVar[bool] = True

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        last = {blocks[-1] for blocks in view.stages}
        for site in self.sites(view):
            if site.block in last:
                yield from (PlanItem(site, f"term_{task}", partial(TaskTerm, site, task)) for task in self.own)
                if self.joins:
                    yield PlanItem(site, "mean", Mean)


@pytest.mark.parametrize("backbone", ["vit", "vit_glu", "eva_dinov3", "swin", "swinv2"])
def test_tasks_branch_inside_a_block(backbone: str) -> None:
    cell = Cell("lora", backbone)
    model, images = cell.model().double(), cell.images().double()
    with torch.no_grad():
        plain = model.forward_features(images)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2, roles=("attn.proj", "mlp.fc1", "mlp.fc2")), name="shared")
    move(bank, "shared")
    with torch.no_grad():
        wanted = model.forward_features(images)
    vispeft.attach(model, Branches(), name="tasks", verify=False)
    bank.set_active(["shared", "tasks"])
    result = model.run(images)
    assert torch.allclose(
        model.forward_features(images), wanted, rtol=1e-9, atol=1e-12
    )  # the shared stream is what it was
    assert not torch.allclose(wanted, plain)
    stages = [stage.beside for stage in result.stages]
    assert all(set(beside) == {"seg", "depth"} for beside in stages)
    for stage in result.stages:
        assert torch.equal(stage.beside["seg"], stage.beside["depth"])  # equal while the second factors are zero
        assert stage.beside["seg"].shape == stage.tokens.shape
        assert not torch.allclose(stage.beside["seg"], stage.tokens)  # the shared terms are not in the tasks'
    move(bank, "tasks")
    result = model.run(images)
    assert not torch.allclose(result.stages[-1].beside["seg"], result.stages[-1].beside["depth"])
    loss = sum(map_.square().sum() for stage in result.stages for map_ in stage.beside.values())
    loss.backward()
    assert all(e.tensor.grad is not None and e.tensor.grad.any() for e in bank._entries["tasks"].tensors())


def test_zero_branches_equal_the_plain_stage() -> None:
    """With no shared term, and zero second factors, every task map is the map of its stage."""
    cell = Cell("lora", "swin")
    model, images = cell.model().double(), cell.images().double()
    vispeft.attach(model, Branches(), verify=False)
    result = model.run(images)
    for stage in result.stages:
        assert torch.allclose(stage.beside["seg"], stage.tokens, rtol=1e-10, atol=1e-12)


def test_a_branch_may_change_the_shared_output() -> None:
    """The mean of the tasks' outputs is added at the projection of the last block alone: its shared map doubles."""
    cell = Cell("lora", "vit", short=True)
    model, images = cell.model().double(), cell.images().double()
    block = model.blocks[0]
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    attended = tokens + 2 * block.attn(block.norm1(tokens))
    wanted = attended + block.mlp(block.norm2(attended))
    vispeft.attach(model, Branches(joins=True, roles=("attn.proj",)), verify=False)
    result = model.run(images)
    assert torch.allclose(result.tokens, wanted, rtol=1e-9, atol=1e-12)
    assert set(result.streams.beside) == {"seg", "depth"}


def test_terms_of_a_branching_layer_drop_the_same_entries() -> None:
    x = torch.ones(2, 50)
    layer = LayerPass(x, {}, x, x)
    assert layer.dropped(0.0) is x
    assert layer.dropped(0.5) is layer.dropped(0.5)
    assert 0 < (layer.dropped(0.5) == 0).sum() < 100
    assert layer.dropped(0.25) is not layer.dropped(0.5)


class Bound(TokensUnit):
    """Tokens made for one batch: their number differs by block, and a block may have none."""

    pool = "patches"

    def __init__(self, lengths: Sequence[int], width: int) -> None:
        super().__init__()
        self.own = [torch.randn(4, length, width, generator=Generator().manual_seed(length)) for length in lengths]

    def tokens(self, block: int, batch: int) -> Tensor:
        return self.own[block][:batch]


@torch.no_grad()
def test_units_of_one_batch_run_without_being_attached() -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    plain = model(images)
    vispeft.attach(model, vispeft.LoRA(rank=2))  # makes the model a host; its start changes nothing
    for lengths in ((3, 1), (2, 0), (0, 4)):
        result = model.run(images, [Bound(lengths, 24)])
        assert result.inserted == (lengths[-1],)
        assert result.tokens.shape[1] == 1 + 16 + lengths[-1]
        features = model.features(result)
        assert features.shape[1] == 17
        assert not torch.allclose(model.forward_head(features), plain)
    nothing = model.run(images, [Bound((0, 0), 24)])
    assert torch.allclose(model.forward_head(model.features(nothing)), plain, atol=1e-6)
    cell = Cell("lora", "swin")
    swin = cell.model()
    vispeft.attach(swin, vispeft.LoRA(rank=2))
    with pytest.raises(ConfigError, match="Attach a method that makes streams"):
        swin.run(cell.images(), [Bound((2, 2, 2), 8)])


GAINS = {
    "lora": vispeft.LoRA(rank=2),
    "ssf": vispeft.SSF(),
    "adaptformer": vispeft.AdaptFormer(bottleneck=4),
    "hydra": vispeft.Hydra(rank=2),
    "repadapter": vispeft.RepAdapter(bottleneck=4, groups=1),
    "bitfit": vispeft.BitFit(),
    "dora": vispeft.method("lora", rank=2, dora=True),
}


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["vit", "swinv2"])
@pytest.mark.parametrize("name", GAINS)
def test_a_gain_scales_the_contribution_of_a_unit(name: str, backbone: str) -> None:
    cell = Cell("lora", backbone)
    model, images = cell.model().double(), cell.images().double()
    plain = model.forward_features(images)
    bank = vispeft.attach(model, GAINS[name])
    move(bank, "default")
    full, units = model.forward_features(images), bank._entries["default"].units.values()

    def scaled(gain: float | None) -> Tensor:
        for unit in units:
            unit.gain = None if gain is None else torch.tensor(gain, dtype=torch.float64)
        return model.forward_features(images)

    assert torch.allclose(scaled(1.0), full, rtol=1e-10, atol=1e-12)
    assert torch.allclose(scaled(0.0), plain, rtol=1e-10, atol=1e-12)
    half = scaled(0.5)
    assert not torch.allclose(half, full)
    assert not torch.allclose(half, plain)
    if name != "adaptformer":
        bank.merge()
        assert torch.allclose(model.forward_features(images), half, rtol=1e-9, atol=1e-12)
        bank.unmerge()
    assert torch.allclose(scaled(None), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_low_rank_terms_act_on_the_convolution_of_the_patches(backbone: str, tmp_path: Any) -> None:
    cell = Cell("lora", backbone)
    model, images = cell.model().double(), cell.images().double()
    method = vispeft.LoRA(rank=2, roles=("patch_embed",))
    bank = vispeft.attach(model, method)
    move(bank, "default")
    conv = model.patch_embed.proj
    assert (
        bank.report().trainable == method.parameter_count(bank.view) == 2 * (conv.out_channels + conv.weight[0].numel())
    )
    wanted = model(images)
    wanted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.named_tensors().values())
    bank.merge()
    assert type(conv) is nn.Conv2d
    assert torch.allclose(model(images), wanted, rtol=1e-9, atol=1e-12)


def test_streams_start_at_the_layers_that_run_on_them_only() -> None:
    model = Cell("lora", "vit").model()
    with pytest.raises(SiteError, match=r"attn\.qkv\); streams start at attn\.proj"):
        vispeft.attach(model, Branches(roles=("attn.qkv",)))
    assert type(model.blocks[0].attn.qkv) is nn.Linear
