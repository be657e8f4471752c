"""The fused low-rank linear layer: values, gradients and dropout against plain formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.low_rank import Branch, Dropout, dropped_draws
from vispeft.errors import ConfigError
from vispeft.hosts import masks, terms
from vispeft.hosts.low_rank import low_rank_linear

PLACES = ["input", "hidden"]
KEPT = 1 - round(0.4 * 2**16) / 2**16
"""Of a share of 0.4 dropped, drawn with 16 bits."""


def tensors(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, 6), "a": (2, 6), "b": (3, 2), "c": (1, 6), "d": (5, 1), "weight": (5, 6), "bias": (5,)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for name in "xabcd":
        made[name].requires_grad_()
    return made


def whole(source: Tensor, rows: Tensor, columns: int, share: float) -> Tensor:
    return torch.cat([mask for _, mask in masks.mask_blocks(source, rows, columns, share)])


def two_terms(t: dict[str, Tensor], dropout: Dropout) -> Tensor:
    first = Branch(t["a"], t["b"], 0.7, 1, 4, dropout)
    return low_rank_linear(t["x"], t["weight"], t["bias"], [first, Branch(t["c"], t["d"], -1.5, 0, 5)])


@pytest.mark.parametrize("rows", [4, 9], ids=["added", "folded"])
@pytest.mark.parametrize("dropout", [Dropout(), *(Dropout(0.4, place) for place in PLACES)], ids=str)  # type: ignore[arg-type]
def test_gradients_agree_with_differences(rows: int, dropout: Dropout) -> None:
    made = tensors(rows)

    def compute(*values: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same draws in every call
        return two_terms({**made, **dict(zip("xabcd", values, strict=True))}, dropout)

    assert torch.autograd.gradcheck(compute, tuple(made[name] for name in "xabcd"))
    assert torch.autograd.gradgradcheck(compute, tuple(made[name] for name in "xabcd"))


def test_terms_on_all_channels_have_right_gradients() -> None:
    """They are added by PyTorch's own nodes, in place."""
    made = tensors(4)
    made["b"] = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def compute(*values: Tensor) -> Tensor:
        t = {**made, **dict(zip("xabcd", values, strict=True))}
        terms = [Branch(t["a"], t["b"], 0.7, 0, 5), Branch(t["c"], t["d"], -1.5, 0, 5)]
        return low_rank_linear(t["x"].view(2, 2, 6), t["weight"], t["bias"], terms)

    values = tuple(made[name] for name in "xabcd")
    assert torch.autograd.gradcheck(compute, values)
    assert torch.autograd.gradgradcheck(compute, values)
    x, a, b, c, d = values
    wanted = x @ made["weight"].t() + made["bias"] + 0.7 * x @ a.t() @ b.t() - 1.5 * x @ c.t() @ d.t()
    assert torch.allclose(compute(*values).flatten(0, 1), wanted, rtol=1e-12)


@pytest.mark.parametrize("start", [0, 1], ids=["all", "slice"])
def test_gradients_under_autocast_have_the_type_of_the_factors(start: int) -> None:
    made = {name: value.detach().float() for name, value in tensors(4).items()}
    x, a = (made[name].requires_grad_() for name in "xa")
    b = torch.randn(5 - start, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank_linear(x, made["weight"], made["bias"], [Branch(a, b, 0.5, start, 5)])
    assert out.dtype == torch.bfloat16
    exact = x @ made["weight"].t() + torch.nn.functional.pad(0.5 * x @ a.t() @ b.t(), (start, 0))
    for found, wanted in zip(
        torch.autograd.grad(out.float().square().sum(), [x, a, b]),
        torch.autograd.grad((exact + made["bias"]).square().sum(), [x, a, b]),
        strict=True,
    ):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_gradients_with_a_graph_stop_at_their_layer() -> None:
    """Two layers share their factors, and the second one reads the first one's output."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 4), (4, 4), (2, 4), (4, 2))
    )

    def plain(y: Tensor) -> Tensor:
        return y @ weight.detach().t() + y @ a.t() @ b.t()

    def fused(y: Tensor) -> Tensor:
        return low_rank_linear(y, weight.detach(), None, [Branch(a, b, 1.0, 0, 4)])

    for create_graph in (False, True):
        found, wanted = (
            torch.autograd.grad(layer(layer(x)).square().sum(), [x, a, b], create_graph=create_graph)
            for layer in (fused, plain)
        )
        assert all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True))


def test_second_derivatives_where_some_tensors_are_frozen() -> None:
    """The input is kept only where a first factor trains; without a trained factor it is not needed."""
    made = tensors(9)
    for names in ("xac", "x"):
        for name in set("abcd") - set(names):
            made[name].requires_grad_(False)

        def compute(*values: Tensor, names: str = names) -> Tensor:
            return two_terms({**made, **dict(zip(names, values, strict=True))}, Dropout()).square()

        assert torch.autograd.gradgradcheck(compute, tuple(made[name] for name in names))
    made["b"].requires_grad_()
    with pytest.raises(ConfigError, match=r"create_graph=True.*first factor is frozen"):
        torch.autograd.grad(two_terms(made, Dropout()).square().sum(), made["x"], create_graph=True)


def test_derivatives_in_forward_mode() -> None:
    made = tensors(9)
    inputs = [made[name].detach() for name in "xab"]

    def compute(*values: Tensor) -> Tensor:
        return two_terms({**made, **dict(zip("xab", values, strict=True))}, Dropout())

    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(value, torch.ones_like(value)) for value in inputs]
        found = torch.autograd.forward_ad.unpack_dual(compute(*duals)).tangent
    step = 1e-6
    ahead, behind = (compute(*(value + sign * step for value in inputs)) for sign in (1, -1))
    assert torch.allclose(found, (ahead - behind) / (2 * step), atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
def test_a_share_next_to_one_stays_finite(place: Any) -> None:
    made = tensors(9)
    out = two_terms(made, Dropout(1 - 1e-9, place))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(made[name].grad.isfinite().all() for name in "xabcd")  # type: ignore[union-attr]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_dropped_is_dropped_from_one_term_only(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, drawn = tensors(9), []

    def recorded(rows: Tensor, columns: int, share: float) -> Tensor:
        drawn.append(whole(masks.mask_source(rows, columns, share), rows, columns, share))
        return drawn[-1].bool()

    monkeypatch.setattr(terms, "mask_source", recorded)
    out = two_terms(made, Dropout(0.4, place))
    (kept,) = drawn
    assert 0 < kept.mean() < 1
    seen = made["x"] * kept / KEPT if place == "input" else made["x"]
    hidden = seen @ made["a"].t()
    hidden = hidden * kept / KEPT if place == "hidden" else hidden
    expected = made["x"] @ made["weight"].t() + made["bias"] - 1.5 * made["x"] @ made["c"].t() @ made["d"].t()
    expected[:, 1:4] += 0.7 * hidden @ made["b"].t()
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(y.square().sum(), [made[name] for name in "xab"]) for y in (out, expected))
    assert all(torch.allclose(one, other, rtol=1e-11, atol=1e-12) for one, other in zip(found, wanted, strict=True))


class Special(Tensor):
    """A tensor of a class of its own, whose masks are kept."""


@pytest.mark.parametrize(
    ("share", "dtype", "kind"),
    [
        *((share, torch.float32, Tensor) for share in (0.001, 0.1, 0.5, 0.999)),
        (0.1, torch.bfloat16, Tensor),
        (0.1, torch.float32, Special),
    ],
)
def test_the_share_that_is_dropped(share: float, dtype: torch.dtype, kind: type[Tensor]) -> None:
    torch.manual_seed(0)
    rows = torch.empty(401, 0, dtype=dtype).as_subclass(kind)
    source = masks.mask_source(rows, 399, share)
    assert source.dtype == (torch.int64 if kind is Tensor else torch.bool)
    kept = whole(source, rows, 399, share)
    assert kept.dtype == dtype
    assert torch.equal(kept, whole(source, rows, 399, share))
    kept = kept.double()
    assert kept.shape == (401, 399)
    assert set(kept.unique().tolist()) == {0, 1}
    for part in (kept, kept[:, 0], kept.flatten()[3::4]):
        spread = (share * (1 - share) / part.numel()) ** 0.5
        assert abs(1 - part.mean() - share) < 5 * spread + 2**-16
    # Entries are independent of their neighbours, of those of the next mask, and of those of the next seed.
    others = [kept.roll(shift, axis) for axis in (0, 1) for shift in (1, 2, 3, 4)]
    others += [whole(masks.mask_source(rows, 399, share), rows, 399, share).double()]
    if kind is Tensor:
        others += [whole(source + 1, rows, 399, share).double()]
    for other in others:
        common = ((kept - kept.mean()) * (other - other.mean())).mean() / kept.var()
        assert abs(common) < 5 * kept.numel() ** -0.5 + 2**-14


@pytest.mark.parametrize("share", [0.0001, 1 / 256, 0.1, 0.5, 255 / 256, 0.999, 1.0 - 1e-9])
def test_the_share_is_exact_over_all_pairs_of_bytes(share: float) -> None:
    """Each row begins with its own byte."""
    byte = torch.arange(256, dtype=torch.uint8)
    pairs = torch.cat([byte[:, None], byte.expand(256, 256)], 1)
    mask = masks._mask(pairs.flatten().view(torch.int64), torch.empty(256, 0), 256, share)
    assert int((mask == 0).sum()) == dropped_draws(share)


def test_a_mask_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.empty(103, 0)
    source = masks.mask_source(rows, 7, 0.5)
    wanted = whole(source, rows, 7, 0.5)
    monkeypatch.setattr(masks, "BLOCK", 60)
    assert len(list(masks.mask_blocks(source, rows, 7, 0.5))) == 13
    assert torch.equal(whole(source, rows, 7, 0.5), wanted)
    assert whole(source, rows[:0], 7, 0.5).shape == (0, 7)


@pytest.mark.parametrize("place", PLACES)
def test_masks_are_drawn_again_and_not_kept(place: Any) -> None:
    made = tensors(900)
    kept: dict[bool, int] = {}
    for drops in (False, True):
        sizes = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = two_terms(made, Dropout(0.4 if drops else 0.0, place))
        kept[drops] = sum(sizes)
        # A graph that is kept goes backward again with the same mask, whatever was drawn in between.
        first = torch.autograd.grad(out.sum(), made["x"], retain_graph=True)[0]
        torch.rand(3)
        assert torch.equal(first, torch.autograd.grad(out.sum(), made["x"])[0])
    assert kept[True] == kept[False] + 8


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_dropout_changes_no_mean(place: Any, plain: bool) -> None:
    made = tensors(9)
    torch.manual_seed(0)
    drops, still = Dropout(0.4, place), Dropout()
    if plain:
        made["bias"].requires_grad_()  # the base trains: autograd does the work
    with torch.no_grad():
        mean = torch.stack([two_terms(made, drops) for _ in range(4000)]).mean(0)
        exact = two_terms(made, still)
    assert (mean - exact).abs().max() < 0.12
    assert not torch.allclose(two_terms(made, drops), exact)


@pytest.mark.parametrize(
    "method",
    [
        vispeft.LoRA(rank=3, dropout=0.3, roles=("mlp.fc1",)),
        vispeft.LoRA(rank=3, dropout=0.3, dropout_place="hidden", roles=("mlp.fc1",)),
        vispeft.LoRA(rank=3, dropout=0.3, start="pissa", roles=("mlp.fc1",)),
        vispeft.FacT(rank=3, dropout=0.3, roles=("mlp.fc1",)),
        vispeft.FacT(rank=3, dropout=0.3, variant="tk", roles=("mlp.fc1",)),
    ],
    ids=["lora", "hidden", "pissa", "fact", "fact_tk"],
)
def test_dropout_of_a_method_changes_no_mean(method: vispeft.Method) -> None:
    model = Cell("lora", "vit").model().double()
    move(vispeft.attach(model, method), "default")
    layer, x = model.blocks[1].mlp.fc1, torch.randn(4, 24, dtype=torch.float64)
    with torch.no_grad():
        model.eval()
        exact = layer(x)
        model.train()
        draws = torch.stack([layer(x) for _ in range(3000)])
    spread = draws.std(0)
    assert spread.max() > 0
    assert ((draws.mean(0) - exact).abs() <= 5 * spread / 3000**0.5 + 1e-12).all()


def test_dropout_leaves_the_start_of_pissa_alone() -> None:
    model = Cell("lora", "vit").model().double()
    bank = vispeft.attach(model, vispeft.LoRA(rank=3, dropout=0.5, start="pissa", roles=("mlp.fc1",)))
    layer, x = model.train().blocks[1].mlp.fc1, torch.randn(4, 24, dtype=torch.float64)
    unit = next(iter(layer.adapters["default"].values()))
    with torch.no_grad():
        unit.A.zero_()
        drawn = [layer(x) for _ in range(2)]
    without = layer.weight - bank.plan().method.scale * unit.B0 @ unit.A0
    assert torch.equal(drawn[0], drawn[1])
    assert torch.allclose(drawn[0], x @ without.t() + layer.bias, rtol=1e-10, atol=1e-12)


def test_dropout_at_a_convolution_is_refused_but_in_files() -> None:
    """Its terms are added to its weight; until it was refused, the dropout did nothing."""
    method = vispeft.LoRA(rank=2, dropout=0.1, roles=("patch_embed", "attn.qkv"))
    model = Cell("lora", "vit").model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"dropout=0.1 .* 'patch_embed.proj' .* Conv2d"):
        vispeft.attach(model, method)
    assert [type(module) for module in model.modules()] == classes
    bank = vispeft.attach(model, dataclasses.replace(method, dropout=0.0), verify=False)
    with bank.adding(method, "of_a_file", None, None):
        pass
    assert bank.names == ["default", "of_a_file"]


@pytest.mark.parametrize(
    "method", [vispeft.LoRA(rank=2), vispeft.LoRA(rank=2, dropout=0.3), vispeft.SSF()], ids=["lora", "dropout", "ssf"]
)
def test_autocast_leaves_a_float64_model_alone(method: vispeft.Method) -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model().double(), cell.images().double()
    bank = vispeft.attach(model, method, verify=False)
    move(bank, "default")
    model.train()
    tensors = [parameter for _, parameter in bank.trainable_parameters()]
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(images)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert out.dtype == torch.float64
    torch.testing.assert_close(found[1], found[0])
