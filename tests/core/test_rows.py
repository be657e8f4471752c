"""Images of one batch that take different adapters: choices, classifiers, modes, threads, graphs, and refusals."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import move
from vispeft.adapters import routes
from vispeft.errors import ConfigError, UnknownNameError

ROWS = ["a", "b", None, "a"]


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
    return VisionTransformer(**{**sizes, **options})


def swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8}
    return SwinTransformer(**sizes, depths=(2, 1), num_heads=(2, 2), num_classes=4)


def adapted(
    model: nn.Module, *, first: vispeft.Method | None = None, second: vispeft.Method | None = None
) -> vispeft.AdapterBank:
    bank = vispeft.attach(model, first or vispeft.LoRA(rank=2, alpha=4), name="a", verify=False)
    move(bank, "a", seed=1)
    vispeft.attach(model, second or vispeft.LoRA(rank=3, roles=("attn.q", "mlp.fc2")), name="b", verify=False)
    move(bank, "b", seed=2)
    model.eval()
    return bank


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def alone(model: nn.Module, bank: vispeft.AdapterBank, rows: list[str | None], batch: Tensor) -> list[Tensor]:
    found = []
    for image, name in zip(batch.split(1), rows, strict=True):
        with bank.disabled() if name is None else bank.using(name):
            found.append(model(image)[0])
    return found


def test_scores_of_classifiers_of_several_widths_are_filled_with_minus_infinity() -> None:
    model = vit()
    bank = adapted(model, second=vispeft.SSF())
    for name, classes in (("a", 7), ("b", 2)):
        bank.set_active(name)
        model.reset_classifier(classes)
    wanted = alone(model, bank, ROWS, images())
    with torch.no_grad(), bank.using(rows=ROWS):
        assert model.num_classes == 7
        found = model(images())
        features = model.forward_features(images())
        assert torch.equal(model.forward_head(features, False), found)
        assert model.forward_head(features, True).shape == (4, 24)
    assert found.shape == (4, 7)
    for row, scores in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(scores)], scores, rtol=0, atol=1e-6)
        assert (row[len(scores) :] == -torch.inf).all()
    assert [len(scores) for scores in wanted] == [7, 2, 4, 7]


@torch.no_grad()
def test_features_of_one_shape_are_joined_and_others_refused() -> None:
    model = swin()
    bank = adapted(model, second=vispeft.SSF())
    with bank.using("b"):
        features, (first, _) = model.forward_features(images()), model.forward_intermediates(images())[1]
    with bank.using(rows=["b", "a", None, "b"]):
        found, (maps, _) = model.forward_features(images()), model.forward_intermediates(images())[1]
    torch.testing.assert_close(found[[0, 3]], features[[0, 3]], rtol=0, atol=1e-6)
    torch.testing.assert_close(maps[[0, 3]], first[[0, 3]], rtol=0, atol=1e-6)
    bank.detach("b")
    vispeft.attach(model, vispeft.VQT(dropout=0.0), name="b")
    with bank.using(rows=["b", "a", None, "b"]), pytest.raises(ConfigError, match="several shapes"):
        model.forward_head(model.forward_features(images()), pre_logits=True)


def test_choices_nest_and_end() -> None:
    model = vit()
    bank = adapted(model)
    bank.set_active("b")
    with bank.using(rows=ROWS):
        assert bank.active == ["a", "b"]
        with bank.using():  # keeps the rows
            wanted = model(images())
        with bank.using("a"):
            assert bank.active == ["a"]
        assert torch.equal(model(images()), wanted)
        with pytest.raises(ConfigError, match="which adapter's"):
            model.reset_classifier(3)
        with pytest.raises(ConfigError, match="Leave"):
            bank.merge()
    assert bank.active == ["b"]


def test_bad_rows_are_refused() -> None:
    model = vit()
    bank = adapted(model)
    for rows in ("ab", [], 3, {"a": 1}):
        with pytest.raises(ConfigError, match="a list with one adapter"):
            bank.using(rows=rows)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no adapter"):
        bank.using(rows=["a", 1])  # type: ignore[list-item]
    with pytest.raises(UnknownNameError, match="'a'"):
        bank.using(rows=["a", "aa"])
    with pytest.raises(UnknownNameError, match="task"):
        bank.using(rows=ROWS, task="depth")
    for rows in (ROWS[:3], ["a"] * 5, ["a"]):
        with bank.using(rows=rows), pytest.raises(ConfigError, match=f"{len(rows)} rows, and the batch has 4"):
            model(images())
    with bank.using(rows=ROWS), pytest.raises(ConfigError, match="without a batch"):
        model()


def test_tasks_of_a_row_need_one_chosen() -> None:
    model = vit()
    bank = adapted(model)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="dense", tasks=["parts", "depth"], verify=False)
    move(bank, "dense", seed=4)
    model.eval()
    with bank.using(rows=["a", "dense", None, "a"]), pytest.raises(ConfigError, match="none was chosen"):
        model(images())
    with torch.no_grad(), bank.using("dense", task="depth"):
        wanted = model(images())[1]
    with torch.no_grad(), bank.using(rows=["a", "dense", None, "a"], task="depth"):
        torch.testing.assert_close(model(images())[1], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_backward_comes_after_the_block_with_and_without_checkpointing(make: partial[nn.Module]) -> None:
    model, gradients = make(), []
    bank = adapted(model, second=vispeft.AdaptFormer(bottleneck=16, dropout=0))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with bank.using(rows=ROWS):
            scores = model(images())
        scores.square().sum().backward()
        gradients.append([parameter.grad.clone() for _, parameter in bank.trainable_parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_dropout_and_drop_path_act_on_the_rows_of_their_adapter() -> None:
    model = vit()
    bank = adapted(model, first=vispeft.LoRA(rank=2, dropout=0.5, drop_path=0.5))
    model.train()
    batch = images().repeat(32, 1, 1, 1)
    with torch.no_grad(), bank.using(rows=["a", "b"] * 64):
        once, again = model(batch), model(batch)
        changed = (once - again).abs().amax(1) > 0
    assert changed[::2].float().mean() > 0.9
    assert not changed[1::2].any()


def test_reduced_precision_stays_close() -> None:
    model = swin()
    bank = adapted(model)
    with torch.no_grad(), bank.using(rows=ROWS):
        wanted = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images())
        model.bfloat16()
        cast = model(images().bfloat16())
    assert torch.allclose(found.float(), wanted, atol=0.05)
    assert torch.allclose(cast.float(), wanted, atol=0.05)


def test_rows_follow_new_classifiers_and_removed_adapters() -> None:
    model = vit()
    bank = adapted(model)
    with torch.no_grad(), bank.using(rows=ROWS):
        model(images())
        bank.put_head("a", nn.Linear(24, 9))
        assert model(images()).shape == (4, 9)
    bank.detach("b")
    with pytest.raises(UnknownNameError, match="'b'"):
        bank.using(rows=ROWS)
    with torch.no_grad(), bank.using(rows=["a", None, None, "a"]):
        assert model(images()).shape == (4, 9)


def test_of_many_choices_those_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "KEPT", 3)
    model = vit()
    bank = adapted(model)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="c", verify=False)
    for names in itertools.permutations("abc"):
        bank.set_active(names)
    assert len(bank._routes) == 3
    sets = [["a", "b"], ["a", "c"], ["b", "c"], ["a", "b"], ["a", None], ["b", None]]
    for rows in sets:
        with bank.using(rows=rows):
            assert bank._routing.present().rows.names == tuple(rows)
    assert [names for names, _ in bank._row_routes._shared] == [("a", "b"), ("a", None), ("b", None)]


def test_threads_take_rows_of_their_own() -> None:
    model = vit()
    bank = adapted(model, second=vispeft.SSF())
    wanted = {name: alone(model, bank, [name] * 4, images()) for name in ("a", "b", None)}
    failures: list[str] = []

    def work(rows: list[str | None]) -> None:
        for _ in range(15):
            with torch.no_grad(), bank.using(rows=rows):
                found = model(images())
            for place, (row, name) in enumerate(zip(found, rows, strict=True)):
                if not torch.allclose(row, wanted[name][place], atol=1e-6):
                    failures.append(f"{rows}: {name}")

    orders = [ROWS, ["b", None, "b", "a"], [None] * 4, ["b"] * 4]
    threads = [threading.Thread(target=work, args=(rows,)) for rows in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_compiled_blocks_serve_all_orders_and_switches_without_further_graphs() -> None:
    torch._dynamo.reset()
    model = vit()
    bank = adapted(model, second=vispeft.LoRA(rank=2, alpha=4))
    graphs = Counter[str]()

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs["made"] += 1
        return graph.forward

    wanted = {name: alone(model, bank, [name] * 4, images()) for name in ("a", "b", None)}
    bank.compile(backend=count)
    with torch.no_grad():
        for name in ("a", "b"):
            bank.set_active(name)
            model(images())
        switched = graphs["made"]
        for name in ("a", "b", "a"):
            bank.set_active(name)
            assert torch.allclose(model(images()), torch.stack(wanted[name]), atol=1e-6)
        assert graphs["made"] == switched == 1
        for rows in (ROWS, ["b", None, "a", "a"], [None, None, "b", "a"]):
            with bank.using(rows=rows):
                found = model(images())
            for place, (row, name) in enumerate(zip(found, rows, strict=True)):
                torch.testing.assert_close(row, wanted[name][place], rtol=0, atol=1e-6)
        assert graphs["made"] == switched + 1


def test_an_adapter_that_decides_about_tokens_runs_for_its_own_images_alone() -> None:
    model = vit()
    bank = adapted(model, first=vispeft.DyT(bottleneck=4, start_bias=0.0, complete=False))
    model.eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), bank.using(rows=ROWS):
        together = model(images)
    for image, name in enumerate(ROWS):
        with torch.no_grad(), bank.disabled() if name is None else bank.using(name):
            torch.testing.assert_close(together[image : image + 1], model(images[image : image + 1]), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="decide which tokens pass"):
        bank.stack(["a", "b"], weights=[0.5, 1.0])
