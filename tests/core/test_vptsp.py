"""VPTSP: counts of the published configurations, the state of classes, prompts in host memory, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import BACKBONES, Cell
from vispeft.core.families import describe
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.model import BANK
from vispeft.proxies.class_prompts import ROW_BY_ROW, BankedPrompts
from vispeft.proxies.losses import proxy_loss
from vispeft.proxies.semantic import SemanticProxies

DIM, CLASSES = 6, 4
LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


def criterion(bank: bool = False, model: Any = None, **fields: Any) -> SemanticProxies:
    """Make a criterion for a tiny ViT, without its adapter's head."""
    torch.manual_seed(0)
    model = Cell("vptsp", "vit").model() if model is None else model
    method = vispeft.VPTSP(**{"num_tokens": 3, "class_tokens": 2, "bank": bank, **fields})
    vispeft.attach(model, method, verify=False)
    return method.criterion(model, nn.Linear(24, DIM), CLASSES, DIM)


def images(count: int = len(LABELS)) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def embeddings() -> Tensor:
    return torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------- counts

CONFIGURATIONS = [
    # model, d, classes, prompts, class prompts, all that trains and all that is deployed in the public code
    ("small", 384, 100, (10, 12, 0), (3, 12, 0), 2_701_824, 246_144),
    ("base", 512, 100, (20, 12, 0), (5, 4, 5), 4_239_872, 682_496),
    ("small", 384, 98, (80, 11, 2), (50, 8, 2), 16_663_296, 495_744),
    ("base", 512, 98, (80, 10, 2), (50, 8, 2), 33_238_528, 1_043_456),
    ("small", 384, 11_318, (90, 12, 0), (5, 12, 0), 266_762_496, 614_784),
    ("small", 384, 3_997, (90, 12, 0), (80, 12, 0), 1_476_638_592, 614_784),
    ("base", 512, 5_690, (90, 12, 5), (10, 12, 0), 530_601_472, 1_074_176),
]


@pytest.mark.parametrize(("size", "dim", "classes", "shared", "own", "trained", "deployed"), CONFIGURATIONS)
def test_counts_are_those_of_the_public_code(
    size: str, dim: int, classes: int, shared: tuple[int, ...], own: tuple[int, ...], trained: int, deployed: int
) -> None:
    names = ("num_tokens", "depth", "step"), ("class_tokens", "class_depth", "class_step")
    fields = dict(zip(names[0], shared, strict=True)) | dict(zip(names[1], own, strict=True))
    method = vispeft.VPTSP(**fields)
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
        width = model.embed_dim
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        made = method.criterion(model, head, classes, dim)
    adapter = method.parameter_count(describe(model))
    plan = vispeft.plan(model, method)
    head_size = sum(p.numel() for p in head.parameters())
    assert plan.trainable == adapter
    assert adapter + head_size + made.trainable == trained
    unused = (sum(range(shared[1])) * shared[2]) * width  # prompts that a block has and does not use
    assert adapter - unused + head_size == deployed


# ---------------------------------------------------------------------- the criterion


def test_without_class_prompts_it_is_proxy_anchor_on_learned_proxies() -> None:
    made = criterion(class_tokens=0, learned_share=1.0, pull="present").train()
    loss = made(embeddings(), LABELS, images())
    assert torch.equal(loss, proxy_loss(embeddings(), made.offsets, LABELS, pull="present"))


@pytest.mark.parametrize("integrator", ["gru_relu", "gru", "momentum"])
def test_only_classes_of_the_batch_change_their_state(integrator: str) -> None:
    made = criterion(integrator=integrator).train()
    before = made.state.clone()
    made(embeddings(), LABELS, images()).backward()
    changed = (made.state - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, True, True, False]
    assert torch.allclose(made.state.norm(dim=1), torch.ones(CLASSES))
    made.eval()(embeddings(), LABELS, images())
    assert torch.equal(made.state, made.eval().state)


def test_the_unit_runs_over_the_samples_of_a_class_in_their_order() -> None:
    made = criterion(integrator="gru")
    found = made.make(images(), LABELS)
    state = made.state[2:3]
    for sample in (0, 2, 5):
        state = made.integrator.step(found.vectors[sample : sample + 1], state)
    assert torch.allclose(found.folded[2], state[0], atol=1e-6)
    cell = nn.GRUCell(DIM, DIM, bias=True)  # the same function, with its own layout and order of gates
    with torch.no_grad():
        unit = made.integrator
        cell.weight_ih.copy_(torch.cat([unit.W_ir, unit.W_iz, unit.W_in], 1).T)
        cell.weight_hh.copy_(torch.cat([unit.W_hr, unit.W_hz, unit.W_hn], 1).T)
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
    vector = found.vectors[3:4]
    assert torch.allclose(found.folded[1], cell(vector, made.state[1:2])[0], atol=1e-6)


def test_a_moving_average_takes_the_mean_of_the_class() -> None:
    made = criterion(integrator="momentum", keep=0.7)
    found = made.make(images(), LABELS)
    wanted = 0.7 * made.state[0] + 0.3 * found.vectors[[1, 4]].mean(0)
    assert torch.allclose(found.folded[0], wanted, atol=1e-6)


def test_the_second_pass_sees_biases_and_not_the_prompts_of_the_adapter() -> None:
    model = Cell("vptsp", "vit").model()
    made = criterion(model=model)
    adapter = model.__dict__[BANK]
    first = made.make(images(), LABELS).vectors
    tensors = adapter.named_tensors()
    with torch.no_grad():
        tensors["/vptsp.prompts"].add_(1)
    assert torch.equal(made.make(images(), LABELS).vectors, first)
    with torch.no_grad():
        tensors["blocks.0.mlp.fc1/bitfit.bias"].add_(1)
    assert not torch.allclose(made.make(images(), LABELS).vectors, first)


# ---------------------------------------------------------------------- prompts in host memory


def test_rows_of_absent_classes_stay_and_a_checkpoint_has_everything() -> None:
    made = criterion(bank=True).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.1)
    made.watch(optimizer)

    def step(labels: Tensor, given: SemanticProxies, by: torch.optim.Optimizer) -> None:
        by.zero_grad()
        given(embeddings()[: len(labels)], labels, images(len(labels))).backward()
        by.step()

    before = made.prompts.bank.clone()
    step(LABELS, made, optimizer)
    moved = (made.prompts.bank - before).abs().amax((1, 2, 3)) > 0
    assert moved.tolist() == [True, True, True, False]

    again = criterion(bank=True).train()
    other = torch.optim.AdamW(again.parameters(), lr=0.1, weight_decay=0.1)
    again.watch(other)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for given, by in ((made, optimizer), (again, other)):
        step(torch.tensor([3, 0]), given, by)
        step(torch.tensor([1, 1, 2]), given, by)
    assert torch.equal(again.prompts.bank, made.prompts.bank)
    assert torch.equal(again.state, made.state)
    fewer = criterion(bank=True, class_tokens=1)
    with pytest.raises(ConfigError, match=r"\(4, 2, 2, 24\).*\(4, 2, 1, 24\)"):
        fewer.prompts.set_extra_state(made.prompts.get_extra_state())


def test_class_prompts_in_host_memory_need_the_optimiser() -> None:
    made = criterion(bank=True).train()
    with pytest.raises(ConfigError, match="watch"):
        made(embeddings(), LABELS, images())
    with pytest.raises(ConfigError, match="does not train the class prompts"):
        made.watch(torch.optim.AdamW(made.head.parameters()))


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_rows_of_a_class_that_is_seen_each_time_are_those_of_an_optimiser_for_it_alone(name: str) -> None:
    prompts = BankedPrompts((2,), (3, 2, 4)).train()
    alone = nn.Parameter(prompts.bank[0].clone())
    extra = {"momentum": 0.9} if name == "SGD" else {}
    optimizer, other = (
        getattr(torch.optim, name)(given, lr=0.01, **extra) for given in (prompts.parameters(), [alone])
    )
    prompts.watch(optimizer)
    for classes in ([0, 1], [0, 2], [1, 0], [0]):
        rows, place = prompts.rows(torch.tensor(classes)), classes.index(0)
        for by, loss in ((optimizer, rows.pow(3).sum()), (other, alone.pow(3).sum())):
            by.zero_grad()
            loss.backward()
            by.step()
        assert torch.allclose(prompts.bank[0], alone, rtol=1e-6), place


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "Rprop", "ASGD"])
def test_optimisers_whose_state_cannot_be_taken_apart_are_refused(name: str) -> None:
    prompts = BankedPrompts((2,), (3, 2, 4)).train()
    with pytest.raises(ConfigError, match=f"{name} keeps a state .* Choose Adadelta"):
        prompts.watch(getattr(torch.optim, name)(prompts.parameters(), lr=0.01))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fields",
    [
        {"num_tokens": 0},
        {"class_tokens": -1},
        {"step": -1},
        {"learned_share": 1.5},
        {"integrator": "ema"},
        {"pull": "none"},
        {"alpha": 0.0},
        {"alpha": -32.0},
        {"margin": float("nan")},
        {"class_step": 0.5},
        {"blocks": (0,)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        vispeft.VPTSP(**fields)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    for field in ("depth", "class_depth"):
        with pytest.raises(SiteError, match="the model has 2"):
            vispeft.plan(BACKBONES["vit"].make(), vispeft.VPTSP(**{field: 3}))


def test_the_loss_follows_its_formula() -> None:
    scores = F.normalize(embeddings(), dim=1) @ F.normalize(torch.eye(DIM)[:CLASSES], dim=1).T
    near, far = [], []
    for column in range(CLASSES):
        own = column == LABELS
        near.append(torch.log1p((-32 * (scores[own, column] - 0.1)).exp().sum()))
        far.append(torch.log1p((32 * (scores[~own, column] + 0.1)).exp().sum()))
    wanted = torch.stack(near).mean() + torch.stack(far).mean()
    assert torch.allclose(proxy_loss(embeddings(), torch.eye(DIM)[:CLASSES], LABELS), wanted)
    present = torch.stack(near).sum() / 3 + torch.stack(far).mean()
    assert torch.allclose(proxy_loss(embeddings(), torch.eye(DIM)[:CLASSES], LABELS, pull="present"), present)
