"""`vispeft.serve`: each answer is that of its adapter alone, while adapters come and go and threads ask."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.conformance.cells import move
from tests.core.test_rows import images, swin, vit
from vispeft.errors import BaseMismatchError, ConfigError, UnknownNameError

METHODS: dict[str, vispeft.Method] = {
    "probe": vispeft.LinearProbe(),
    "vqt": vispeft.VQT(num_queries=2),
    "vqt_late": vispeft.VQT(num_queries=1, blocks=[1]),
    "lst": vispeft.LST(reduction=2),
    "lora": vispeft.LoRA(rank=2),
    "adaptformer": vispeft.AdaptFormer(bottleneck=4),
    "ssf": vispeft.SSF(),
    "vpt": vispeft.VPT(num_tokens=2),
}
KINDS = ["probe", "queries", "queries", "side", "rows", "rows", "alone", "alone"]


def filled(model: nn.Module) -> tuple[vispeft.AdapterBank, dict[str | None, Tensor]]:
    """Attach one adapter of each way of acting, with classifiers of other widths, and answer by each alone."""
    for place, (name, method) in enumerate(METHODS.items()):
        bank = vispeft.attach(model, method, name=name, verify=False)
        model.reset_classifier(3 + place)
        move(bank, name, seed=place)
    model.eval()
    wanted: dict[str | None, Tensor] = {}
    with torch.no_grad():
        for name in METHODS:
            with bank.using(name):
                wanted[name] = model(images())
        with bank.disabled():
            wanted[None] = model(images())
    return bank, wanted


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_each_answer_is_that_of_its_adapter_alone(make: object) -> None:
    model = make()  # type: ignore[operator]
    bank, wanted = filled(model)
    server = vispeft.serve(model)
    assert server.names == list(METHODS)
    assert [server.kind(name) for name in METHODS] == KINDS
    every: list[str | None] = [*METHODS, None]
    for name, found in server.each(images(), every).items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-6, msg=str(name))
    for start in range(len(every)):
        names = [every[(start + 2 * place) % len(every)] for place in range(4)]
        for place, (name, found) in enumerate(zip(names, server(images(), names), strict=True)):
            torch.testing.assert_close(found, wanted[name][place], rtol=0, atol=1e-6, msg=f"{names}: {name}")
    assert bank.active == ["vpt"]  # the model's own choice stays


def test_adapters_come_and_go_from_files(tmp_path: Path) -> None:
    model = vit()
    bank, wanted = filled(model)
    for name in ("probe", "lora", "ssf"):
        bank.save(tmp_path / name / "adapter", name)
    server = vispeft.serve(vit(), {"one": tmp_path / "probe", "two": tmp_path / "lora" / "adapter"})
    assert server.names == ["one", "two"]
    assert server.add(tmp_path / "ssf") == "ssf"
    for name, source in (("one", "probe"), ("two", "lora"), ("ssf", "ssf")):
        torch.testing.assert_close(server.each(images(), [name])[name], wanted[source], rtol=0, atol=1e-6)
    for name in server.names:
        server.remove(name)
        with pytest.raises(UnknownNameError, match=name):
            server(images(), [name] * 4)
    torch.testing.assert_close(server.each(images(), [None])[None], wanted[None], rtol=0, atol=1e-6)
    assert type(server.model) is type(vit())
    assert server.add(tmp_path / "lora", "again") == "again"


@pytest.mark.slow
def test_a_name_that_comes_again_answers_with_its_new_file_and_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    model = vit()
    bank, wanted = filled(model)
    for name in ("lora", "adaptformer", "vqt"):
        bank.save(tmp_path / name, name)
    server = vispeft.serve(vit(), {"other": tmp_path / "lora"})
    counts = set()
    for source in ("lora", "vqt", "adaptformer") * 2:
        server.add(tmp_path / source, "guest")
        found = server(images(), ["guest", "other", "guest", None])
        for place, own in enumerate([source, "lora", source, None]):
            torch.testing.assert_close(found[place], wanted[own][place], rtol=0, atol=1e-6)
        tensors = [weakref.ref(tensor) for tensor in server.bank.named_tensors("guest").values()]
        server.remove("guest")
        counts.add(sum(1 for _ in server.model.parameters()))
        gc.collect()
        assert not any(tensor() is not None for tensor in tensors)
    assert len(counts) == 1


def test_a_head_of_ones_own_answers_from_pooled_features() -> None:
    model = vit()
    bank, _ = filled(model)
    with torch.no_grad(), bank.using("lora"):
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    server = vispeft.serve(model)
    server._take(bank, "lora", lambda features: nn.functional.normalize(features))
    torch.testing.assert_close(server.each(images(), ["lora"])["lora"], nn.functional.normalize(pooled))


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_decoders_read_maps_of_the_shared_pass(make: object) -> None:
    model = make()  # type: ignore[operator]
    bank, _ = filled(model)
    server = vispeft.serve(model)
    kinds = {"probe": "probe", "vqt": "probe", "lora": "rows", "ssf": "alone", "lst": "alone"}
    for name in kinds:
        server._take(bank, name, lambda maps: maps[0].mean(1) + maps[1].amax((1, 2, 3), keepdim=True)[:, 0], [0, 1])
    assert {name: server.kind(name) for name in kinds} == kinds
    found = server.each(images(), list(kinds))
    for name, maps in found.items():
        with torch.no_grad(), bank.using(name):
            first, second = model.forward_intermediates(
                images(), indices=[0, 1], norm=True, output_fmt="NCHW", intermediates_only=True
            )
        wanted = first.mean(1) + second.amax((1, 2, 3), keepdim=True)[:, 0]
        torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-5, msg=name)
    with pytest.raises(ConfigError, match="0 to 1"):
        server._take(bank, "probe", nn.Identity(), [2])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model = vit()
    bank, _ = filled(model)
    bank.save(tmp_path / "lora", "lora")
    server = vispeft.serve(model)
    with pytest.raises(UnknownNameError, match="lora"):
        server(images(), ["lara"] * 4)
    with pytest.raises(ConfigError, match="one adapter"):
        server(images(), ["lora"] * 3)
    with pytest.raises(ConfigError, match="one adapter"):
        server(images(), "lora")
    with pytest.raises(ConfigError, match="list of names"):
        server.each(images(), "lora")
    with pytest.raises(ConfigError, match="already"):
        server.add(tmp_path / "lora")
    with pytest.raises(UnknownNameError, match="lora"):
        server.remove("lara")
    other = vit(depth=3)
    with pytest.raises(BaseMismatchError, match="lora does not fit the backbone of this server"):
        vispeft.serve(other, [tmp_path / "lora"])
    assert vispeft.AdapterBank.of(other) is None
    vispeft.attach(other, vispeft.LoRA(rank=2), name="dense", tasks=["a", "b"], verify=False)
    with pytest.raises(ConfigError, match="one answer"):
        vispeft.serve(other)


def test_threads_ask_while_adapters_come_and_go(tmp_path: Path) -> None:
    model = vit()
    bank, wanted = filled(model)
    bank.save(tmp_path / "guest", "adaptformer")
    server = vispeft.serve(model)
    failures: list[str] = []
    done = threading.Event()

    def ask(names: list[str | None]) -> None:
        for _ in range(6):
            for place, (name, found) in enumerate(zip(names, server(images(), names), strict=True)):
                if not torch.allclose(found, wanted[name][place], atol=1e-6):
                    failures.append(f"{names}: {name}")

    def visit() -> None:
        while not done.is_set():
            server.add(tmp_path / "guest")
            found = server(images(), ["guest"] * 4)
            if not torch.allclose(torch.stack(found), wanted["adaptformer"], atol=1e-6):
                failures.append("guest")
            server.remove("guest")

    asking = [threading.Thread(target=ask, args=(names,)) for names in (["lora", "vqt", "ssf", None], ["lst"] * 4)]
    visiting = threading.Thread(target=visit)
    for thread in (visiting, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    done.set()
    visiting.join()
    assert not failures


def test_the_base_answers_while_the_first_adapter_comes_and_the_last_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    bank, wanted = filled(model)
    bank.save(tmp_path / "guest", "ssf")
    server = vispeft.serve(vit())
    base = wanted[None]
    assert not torch.allclose(base, wanted["ssf"][:, : base.shape[1]], atol=1e-3)
    answers: list[Tensor] = []
    asking: list[threading.Thread] = []

    def ask() -> None:
        answers.append(torch.stack(server(images(), [None] * 4)))

    def begin() -> None:
        asking.append(threading.Thread(target=ask))
        asking[-1].start()
        asking[-1].join(timeout=0.03)

    load, detach = vispeft.AdapterBank.load, vispeft.AdapterBank.detach

    def slow_load(self: vispeft.AdapterBank, *args: Any, **named: Any) -> None:
        begin()
        load(self, *args, **named)
        begin()  # here the adapter is the choice of the model

    def slow_detach(self: vispeft.AdapterBank, name: str) -> None:
        begin()
        detach(self, name)
        begin()

    monkeypatch.setattr(vispeft.AdapterBank, "load", slow_load)
    monkeypatch.setattr(vispeft.AdapterBank, "detach", slow_detach)
    server.add(tmp_path / "guest")
    torch.testing.assert_close(server.each(images(), ["guest"])["guest"], wanted["ssf"], rtol=0, atol=1e-6)
    server.remove("guest")
    for thread in asking:
        thread.join()
    assert len(answers) == 4
    for found in answers:
        torch.testing.assert_close(found, base, rtol=0, atol=1e-6)


def test_an_adapter_that_is_refused_leaves_the_server_as_it_was(tmp_path: Path) -> None:
    model = vit()
    bank, wanted = filled(model)
    bank.save(tmp_path / "guest", "lora")
    alone = vispeft.serve(vit())
    with pytest.raises(ConfigError, match="taps"):
        alone.add(tmp_path / "guest", taps=[0])
    torch.testing.assert_close(alone.each(images(), [None])[None], wanted[None], rtol=0, atol=1e-6)
    server = vispeft.serve(model)
    bank.set_active("ssf")
    with pytest.raises(ConfigError, match="taps"):
        server.add(tmp_path / "guest", taps=[0])
    assert bank.active == ["ssf"]
    assert "guest" not in bank.names


@pytest.mark.slow
def test_adapters_come_and_go_between_choice_and_pass_of_a_compiled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = vit()
    for number in range(2):
        bank = vispeft.attach(model, vispeft.SSF(), name=f"s{number}", verify=False)
        move(bank, f"s{number}", seed=number)
    bank.save(tmp_path / "guest", "s1")
    bank.compile("model", backend="eager")  # its graph follows the choice made last in any thread
    server = vispeft.serve(model)
    wanted = server(images(), ["s0"] * 4)
    using, chosen, going = vispeft.AdapterBank.using, threading.Event(), threading.Event()
    lock = server._compiled

    class Watched:
        def __enter__(self) -> None:
            if not lock.acquire(blocking=False):
                going.set()  # the change waits for the pass
                lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    monkeypatch.setattr(server, "_compiled", Watched())

    def pausing(self: vispeft.AdapterBank, *names: str, **named: Any) -> Any:
        block = using(self, *names, **named)
        if names != ("s0",):
            return block

        @contextmanager
        def entered() -> Iterator[None]:
            with block:
                chosen.set()
                going.wait(timeout=60)
                yield

        return entered()

    monkeypatch.setattr(vispeft.AdapterBank, "using", pausing)

    def change() -> None:
        chosen.wait()
        server.add(tmp_path / "guest")
        going.set()

    adding = threading.Thread(target=change)
    adding.start()
    found = server(images(), ["s0"] * 4)
    adding.join()
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def test_a_compiled_model_takes_guests_without_further_graphs(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = vit()
    for number in range(3):
        bank = vispeft.attach(model, vispeft.LoRA(rank=2), name=f"l{number}", verify=False)
        move(bank, f"l{number}", seed=number)
    bank.save(tmp_path / "guest", "l2")
    graphs = Counter[str]()

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs["made"] += 1
        return graph.forward

    bank.compile(backend=count)
    server = vispeft.serve(model)
    wanted = server(images(), ["l0", "l1", "l2", "l0"])
    made = graphs["made"]
    assert made == 1
    server.remove("l2")
    server.add(tmp_path / "guest")
    for found, own in zip(server(images(), ["l0", "l1", "guest", "l0"]), wanted, strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-6)
    assert graphs["made"] == made
