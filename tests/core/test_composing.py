"""Stacks of adapters, and arithmetic on what they change."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.compose.arithmetic import draw_mask
from vispeft.compose.low_rank import Term, compress, concatenate
from vispeft.errors import ConfigError, FileError

LORAS: dict[str, vispeft.Method] = {
    "a": vispeft.LoRA(rank=2),
    "b": vispeft.LoRA(rank=3, alpha=6, rslora=True, roles=("attn.qkv", "mlp.fc1"), blocks=(1,)),
    "c": vispeft.LoRA(rank=1, roles=("attn.q", "patch_embed")),  # a convolution
}
WHOLE: dict[str, vispeft.Method] = {
    "dora": vispeft.LoRA(rank=2, dora=True, roles=("attn.qkv", "mlp.fc2")),
    "ssf": vispeft.SSF(),
    "svfit": vispeft.SVFit(rank=3),
    "sparse": vispeft.Sparse(budget=0.02),
    "miss": vispeft.Bone(rank=4),
}


def adapted(backbone: str, methods: dict[str, vispeft.Method]) -> tuple[Any, AdapterBank, Tensor]:
    """Make a model in double precision with moved adapters, of which the last acts."""
    cell = Cell("lora", backbone)
    model, images = cell.model().double().eval(), cell.images().double()
    for name, method in methods.items():
        bank = vispeft.attach(model, method, name=name, verify=False)
        move(bank, name)
    return model, bank, images


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)


def near(found: Tensor, wanted: Tensor, limit: float = 1e-9) -> bool:
    return bool((found - wanted).abs().max() <= limit * wanted.abs().max())


# ------------------------------------------------------------------ stacks


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_stack_adds_what_its_adapters_add(backbone: str) -> None:
    model, bank, images = adapted(backbone, {**LORAS, "adapter": vispeft.Adapter(bottleneck=4)})
    bank.stack(["a", "b"])
    both = features(model, images)
    assert bank.weights == {"a": 1.0, "b": 1.0} == dict.fromkeys(bank.active, 1.0)
    bank.stack(["a", "b"], weights=[0.5, -2.0])
    weighted = features(model, images)
    assert not near(weighted, both)
    assert bank.weights == {"a": 0.5, "b": -2.0}
    with bank.using("a"):  # alone and unweighted
        alone = features(model, images)
    bank.set_active("a")
    assert torch.equal(features(model, images), alone)
    assert bank.weights == {"a": 1.0}
    # By hand: the factors themselves multiplied.
    with torch.no_grad():
        for name, weight in (("a", 0.5), ("b", -2.0)):
            for key, tensor in bank.named_tensors(name).items():
                if key.endswith(".B"):
                    tensor.mul_(weight)
    bank.stack(["a", "b"])
    assert near(features(model, images), weighted)


def test_swapping_the_lower_adapter_there_and_back_changes_no_bit() -> None:
    methods = {name: vispeft.Adapter(bottleneck=4) for name in ("domain_a", "domain_b", "task")}
    model, bank, images = adapted("vit", methods)
    bank.stack(["domain_a", "task"], weights=[0.7, 1.0], freeze_lower=True)
    assert bank.frozen == ["domain_a"]
    first = features(model, images)
    bank.swap("domain_a", "domain_b")
    assert bank.weights == {"domain_b": 0.7, "task": 1.0}
    assert not near(features(model, images), first)
    bank.swap("domain_b", "domain_a")
    assert torch.equal(features(model, images), first)
    bank.stack(["task", "domain_a"])  # one after the other: the order counts
    second = features(model, images)
    bank.stack(["domain_a", "task"])
    assert not near(features(model, images), second)


@pytest.mark.parametrize(
    "method",
    [
        vispeft.LoRA(rank=2),
        pytest.param(WHOLE["dora"], marks=pytest.mark.slow),
        pytest.param(vispeft.SSF(), marks=pytest.mark.slow),
        pytest.param(vispeft.RepAdapter(bottleneck=4), marks=pytest.mark.slow),
    ],
    ids=["lora", "dora", "ssf", "repadapter"],
)
def test_weights_reach_training_copies_merging_and_detaching(method: vispeft.Method) -> None:
    model, bank, images = adapted("vit", {"a": method, "b": vispeft.LoRA(rank=2)})
    bank.stack(["b", "a"], weights=[1.0, 0.25])
    before = features(model, images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(features(twin, images), before)
    bank.memory = "plain"
    grads = []
    for memory in ("plain", "lean"):  # `lean` computes weights again in the backward pass
        bank.memory = memory
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p in bank.named_tensors("a").items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    assert all(near(grads[1][key], grad, 1e-8) for key, grad in grads[0].items())
    bank.merge()
    assert near(features(model, images), before)
    bank.unmerge()
    bank.detach("b")
    assert bank.weights == {"a": 0.25}


BAD_STACKS: list[tuple[Callable[[AdapterBank], Any], str]] = [
    (lambda bank: bank.stack("a"), "give a list of names"),
    (lambda bank: bank.stack([]), "give a list of names"),
    (lambda bank: bank.stack(["a", "nobody"]), "Unknown adapter 'nobody'"),
    (lambda bank: bank.stack(["a", "a"]), "named twice"),
    (lambda bank: bank.stack(["a", "b"], weights=[1.0]), "1 weights were given for 2 adapters"),
    (lambda bank: bank.stack(["a", "b"], weights=[1.0, float("nan")]), "a finite number is needed"),
    (lambda bank: bank.stack(["a"], weights=["1"]), "a finite number is needed"),
    (lambda bank: bank.stack(["vpt", "a"], weights=[0.5, 1.0]), "no difference that a weight could multiply"),
    (lambda bank: bank.swap("b", "c"), "'b' does not act"),
    (lambda bank: bank.swap("a", "nobody"), "Unknown adapter"),
]


def test_bad_stacks_are_refused() -> None:
    _, bank, _ = adapted("vit", {**LORAS, "vpt": vispeft.VPT(num_tokens=2)})
    bank.stack(["a", "c"], weights=[0.5, 1.0])
    for call, message in BAD_STACKS:
        with pytest.raises(ConfigError, match=message):
            call(bank)
        assert bank.weights == {"a": 0.5, "c": 1.0}  # as before


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_sums_are_of_changes(backbone: str) -> None:
    """A composed adapter does what its parts do together, and merging one after the other gives the same."""
    model, bank, images = adapted(backbone, {**LORAS, **WHOLE})
    weights = [0.5, -1.0, 2.0]
    bank.stack(["a", "b", "c"], weights=weights)
    wanted = features(model, images)
    made = bank.compose("sum", ["a", "b", "c"], how="sum", weights=weights, head="a")
    assert (made.method, made.kept_energy, made.head) == ("lora", None, "a")
    assert bank.active == ["sum"]
    assert near(features(model, images), wanted)
    bank.compose("mean", ["a", "b", "c"], head="a")
    bank.stack(["a", "b", "c"], weights=[1 / 3] * 3)
    mean = features(model, images)
    bank.set_active("mean")
    assert near(features(model, images), mean)
    for name in ("svfit", "sparse", "miss"):  # additive, and not all of them of low rank
        bank.stack(["a", name])
        wanted = features(model, images)
        found = bank.compose("two", ["a", name], how="sum", head="a")
        assert [part.kind for part in found.parts] == ["additive", "additive"]
        assert near(features(model, images), wanted, 1e-6), name
        bank.detach("two")


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_changes_that_depend_on_the_weights_enter_as_differences(backbone: str) -> None:
    model, bank, images = adapted(backbone, {**LORAS, **WHOLE})
    plain = {key: tensor.clone() for key, tensor in bank.base_tensors()}
    changes = []
    for name in ("ssf", "dora"):
        bank.set_active(name)
        bank.merge()
        changes.append({key: model.state_dict()[key] - tensor for key, tensor in plain.items()})
        bank.unmerge()
    made = bank.compose("both", ["ssf", "dora"], how="average", weights=[0.25, 0.5], head="ssf")
    assert made.method == "full"
    assert [part.kind for part in made.parts] == ["dependent", "dependent"]
    bank.merge()
    for key, tensor in plain.items():
        wanted = tensor + 0.25 * changes[0][key] + 0.5 * changes[1][key]
        assert near(model.state_dict()[key], wanted, 1e-6), key
    bank.unmerge()
    bank.compose("alone", ["ssf"], how="sum", head="ssf")
    with bank.using("ssf"):
        wanted = features(model, images)
    assert near(features(model, images), wanted, 1e-6)


def test_a_negative_weight_takes_a_change_away() -> None:
    model, bank, images = adapted("vit", LORAS)
    with bank.disabled():
        base = features(model, images)
    made = bank.compose("minus", ["a"], how="sum", weights=[-1.0], head="a")
    assert made.rank == 2
    bank.stack(["a", "minus"])
    assert near(features(model, images), base, 1e-12)


def test_lower_ranks_keep_the_energy_that_is_reported() -> None:
    model, bank, images = adapted("vit", LORAS)
    exact = bank.compose("exact", ["a", "b"], how="concat", head="a")
    whole = features(model, images)
    same = bank.compose("same", ["a", "b"], how="svd", rank=exact.rank, head="a")
    assert same.kept_energy == pytest.approx(1.0)
    assert near(features(model, images), whole)
    kept = [bank.compose(f"cut{rank}", ["a", "b"], how="sum", rank=rank, head="a").kept_energy for rank in (1, 2)]
    assert 0 < kept[0] < kept[1] < 1
    assert bank.compose("default", ["a", "b"], how="svd", head="a").rank == 3  # the largest rank of the parts
    a, b = torch.randn(5, 9, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    term, energy, total = compress(Term(a, b), 2)
    values = torch.linalg.svdvals(b @ a).square()
    assert energy == pytest.approx(float(values[:2].sum()))
    assert total == pytest.approx(float(values.sum())) == float((b @ a).square().sum())
    assert float((term.product() - b @ a).square().sum()) == pytest.approx(float(values[2:].sum()))
    assert concatenate([Term(a, b), term], [1.0, -1.0]).rank == 7


def test_entries_are_elected_and_dropped_by_the_seed() -> None:
    model, bank, images = adapted("vit", LORAS)
    ties = bank.compose("ties", ["a", "b", "c"], how="ties", density=0.1, head="a")
    assert (ties.method, ties.settings) == ("sparse", {"density": 0.1, "sign": "total"})
    outputs = []
    for seed in (0, 0, 1):
        bank.compose("dare", ["a", "b"], how="dare", weights=[1.0, 1.0], density=0.5, seed=seed, head="a")
        outputs.append(features(model, images))
        bank.detach("dare")
    assert torch.equal(outputs[0], outputs[1])
    assert not near(outputs[0], outputs[2])
    bank.compose("none", ["a", "b"], how="dare", weights=[1.0, 1.0], density=1.0, head="a")
    bank.stack(["a", "b"])
    wanted = features(model, images)
    bank.set_active("none")
    assert near(features(model, images), wanted, 1e-6)
    cut = bank.compose("cut", ["a", "b"], how="ties", density=0.5, rank=2, head="a")
    assert (cut.method, cut.rank) == ("lora", 2)
    assert 0 < cut.kept_energy < 1
    drawn = draw_mask((200, 200), 0.3, torch.Generator().manual_seed(0))
    assert float(drawn.float().mean()) == pytest.approx(0.3, abs=0.01)


# ------------------------------------------------------------------ classifiers, files, refusals


def test_classifiers_are_averaged_where_the_classes_are_the_same() -> None:
    _, bank, _ = adapted("vit", LORAS)
    heads = {name: bank.head(name) for name in LORAS}
    for index, head in enumerate(heads.values()):
        assert isinstance(head, nn.Linear)
        nn.init.constant_(head.weight, float(index))
    count = heads["a"].out_features
    bank.annotate("a", class_names=[f"kind {i}" for i in range(count)])
    with pytest.raises(ConfigError, match="cannot be averaged"):
        bank.compose("mean", ["a", "b"])
    bank.annotate("b", class_names=[f"kind {i}" for i in range(count)])
    assert bank.compose("mean", ["a", "b"], weights=[1.0, 3.0], how="sum").head == "average"
    assert torch.equal(bank.head("mean").weight, torch.full_like(heads["a"].weight, 0.75))
    assert bank.notes("mean")["class_names"] == bank.notes("a")["class_names"]
    with pytest.raises(ConfigError, match="needs weights of at least 0"):
        bank.compose("minus", ["a", "b"], weights=[1.0, -1.0], how="sum")
    bank.compose("named", ["a", "b"], weights=[1.0, -1.0], how="sum", head="b")
    assert torch.equal(bank.head("named").weight, heads["b"].weight)
    bank.put_head("c", nn.Linear(heads["c"].in_features, 9, dtype=torch.float64))
    with pytest.raises(ConfigError, match="9 outputs here"):
        bank.compose("other", ["b", "c"])


@pytest.mark.parametrize("how", ["average", "ties", pytest.param("svd", marks=pytest.mark.slow)])
def test_a_composed_adapter_is_an_ordinary_file(how: Any, tmp_path: Path) -> None:
    model, bank, images = adapted("swin", {name: vispeft.LoRA(rank=2) for name in ("a", "b")})
    bank.compose("made", ["a", "b"], how=how, density=0.1)
    wanted = features(model, images)
    bank.save(tmp_path / "made")
    made_of = json.loads((tmp_path / "made" / "adapter.json").read_text())["made_of"]
    assert made_of["how"] == how
    assert [part["name"] for part in made_of["parts"]] == ["a", "b"]
    assert len({part["digest"] for part in made_of["parts"]}) == 2
    other = Cell("lora", "swin").model().double().eval()
    again = vispeft.load(other, tmp_path / "made")
    assert near(features(other, images), wanted, 1e-6)
    again.save(tmp_path / "again")  # what it was made of goes along
    assert json.loads((tmp_path / "again" / "adapter.json").read_text())["made_of"] == made_of
    report = again.merge()
    assert report.merged


BAD_COMPOSITIONS: list[tuple[Any, dict[str, Any], str]] = [
    ("a", {}, "give a list of names"),
    ([], {}, "give a list of names"),
    (["a", "nobody"], {}, "Unknown adapter 'nobody'"),
    (["a", "a"], {}, "named twice"),
    (["a", "b"], {"how": "mean"}, "Unknown way to compose 'mean'"),
    (["a", "b"], {"weights": [1.0]}, "1 weights were given for 2 adapters"),
    (["a", "b"], {"weights": [1.0, float("inf")]}, "a finite number is needed"),
    (["a", "b"], {"rank": 6}, "the exact result has rank 3"),
    (["a", "b"], {"rank": 0}, "at least 1"),
    (["a", "b"], {"rank": 2, "how": "concat"}, "take how='svd'"),
    (["a", "ssf"], {"how": "concat"}, "ssf changes weights by no low-rank term"),
    (["a", "ssf"], {"rank": 2, "head": "a"}, "no low-rank term of a layer's weight holds"),
    (["ssf"], {"how": "svd"}, "give the rank of the result"),
    (["a", "b"], {"how": "ties", "density": 0.0}, "a share above 0"),
    (["a", "b"], {"how": "ties", "sign": "most"}, "Unknown way to elect a sign"),
    (["a", "b"], {"how": "dare", "seed": -1}, "from 0 on"),
    (["a", "b"], {"head": "nobody"}, "Unknown adapter 'nobody'"),
    (["a", "vpt"], {"head": "a"}, "is no change of weights"),
    (["a", "adaptformer"], {"head": "a"}, "bank.stack"),
    (["a", "tasks"], {"head": "a"}, "has tasks"),
]


def test_bad_compositions_are_refused() -> None:
    methods = {**LORAS, "ssf": vispeft.SSF(), "vpt": vispeft.VPT(num_tokens=2), "adaptformer": vispeft.AdaptFormer()}
    model, bank, images = adapted("vit", methods)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="tasks", tasks=["x", "y"], verify=False)
    bank.stack(["a", "c"], weights=[0.5, 1.0])
    before, attached = features(model, images), bank.names
    for names, settings, message in BAD_COMPOSITIONS:
        with pytest.raises(ConfigError, match=message):
            bank.compose("new", names, **settings)
        assert bank.names == attached
    with pytest.raises(ConfigError, match="There is an adapter 'a'"):
        bank.compose("a", ["b"])
    assert bank.weights == {"a": 0.5, "c": 1.0}
    assert torch.equal(features(model, images), before)


def test_values_that_are_not_finite_are_refused() -> None:
    _, bank, _ = adapted("vit", LORAS)
    with torch.no_grad():
        next(iter(bank.named_tensors("a").values())).fill_(float("nan"))
    for how in ("average", "ties"):
        with pytest.raises((ConfigError, FileError), match="not finite"):
            bank.compose("new", ["a", "b"], how=how, head="b")
    assert "new" not in bank.names
