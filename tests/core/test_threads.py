"""Predictions in two threads beside changes in a third one: every output is of exactly one state, or refused."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vispeft
from tests.conformance.cells import METHODS, Cell, move
from vispeft.adapters import task_maps
from vispeft.adapters.bank import AdapterBank
from vispeft.core import gate
from vispeft.errors import ConfigError, MergeError

Change = Callable[[AdapterBank, Path], None]


def switch(bank: AdapterBank, folder: Path) -> None:
    bank.set_active("two" if bank.active == ["one"] else "one")


def choose(bank: AdapterBank, folder: Path) -> None:
    with bank.using("two"):
        assert bank.active == ["two"]
    with bank.disabled():
        assert bank.active == []


def merge(bank: AdapterBank, folder: Path) -> None:
    bank.merge()
    bank.unmerge()


def load_and_detach(bank: AdapterBank, folder: Path) -> None:
    bank.load(folder, "three")
    bank.set_active("one")
    bank.detach("three")


def replace(bank: AdapterBank, folder: Path) -> None:
    bank.load_state_dict(bank.state_dict("two"), "one")
    bank.load_state_dict(torch.load(folder / "one.pt"), "one")


PAIRS = [
    *(("lora", change) for change in (switch, choose, merge, load_and_detach, replace)),
    *((method, change) for method in ("ssf", "vpt", "lst", "lora_2bit") for change in (switch, load_and_detach)),
    ("ssf", merge),
    ("full", merge),
]


@pytest.mark.parametrize(("method", "change"), PAIRS)
def test_predictions_beside_changes_are_of_one_state(
    method: str, change: Change, tmp_path: Path, one_thread: None
) -> None:
    """Of these outputs, 20 to 57 % were of no state: half a pass of one adapter and half of another."""
    cell = Cell(method, "vit")
    model, images = cell.model().eval(), cell.images()
    for number, name in enumerate(("one", "two")):
        bank = vispeft.attach(model, METHODS[method], name=name, verify=False)
        move(bank, name, seed=number)
    states = {}
    with torch.no_grad():
        for name in ("one", "two"):
            bank.set_active(name)
            states[name] = model(images)
    bank.set_active("one")
    bank.save(tmp_path, "two")
    torch.save(bank.state_dict("one"), tmp_path / "one.pt")
    found, failed, stop = [], [], threading.Event()

    def predict() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    found.append(model(images))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        changes = 0
        while (changes < 5 or len(found) < 5) and not failed:
            change(bank, tmp_path)
            changes += 1
            time.sleep(0.0005)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failed
    for out in found:
        assert any(torch.allclose(out, state, rtol=1e-4, atol=1e-5) for state in states.values())


def beside(work: Callable[[threading.Event, threading.Event], Any], change: Callable[[], Any]) -> None:
    """Run a change while another thread is in the middle of its work."""
    reached, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=work, args=(reached, go_on))
    thread.start()
    try:
        assert reached.wait(60)
        change()
    finally:
        go_on.set()
        thread.join(60)


def test_a_merge_under_the_choice_of_another_thread_is_refused() -> None:
    """It gave the outputs of the merged adapter to a thread that had chosen the base."""
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    move(bank, "default")
    with bank.disabled():
        base, found = model(images), {}

    def work(reached: threading.Event, go_on: threading.Event) -> None:
        with bank.disabled():
            reached.set()
            assert go_on.wait(60)
            found["base"] = model(images)

    def refused() -> None:
        with pytest.raises(MergeError, match="Another thread has chosen"):
            bank.merge()

    beside(work, refused)
    assert torch.equal(found["base"], base)
    block = bank.disabled()
    bank.merge()
    with pytest.raises(MergeError, match="is merged"), block:
        pass
    bank.unmerge()

    def chosen(reached: threading.Event, go_on: threading.Event) -> None:
        with bank.using("default"):
            reached.set()
            assert go_on.wait(60)

    def kept() -> None:
        with pytest.raises(ConfigError, match="in a block of using"):
            bank.detach("default")

    beside(chosen, kept)
    bank.detach("default")


def test_a_change_inside_of_a_forward_pass_is_refused() -> None:
    cell = Cell("lora", "vit")
    model = cell.model()
    bank = cell.attach(model)
    handle = model.blocks[0].register_forward_hook(lambda *_: bank.merge())
    with pytest.raises(ConfigError, match="in the middle of its own forward pass"):
        model(cell.images())
    handle.remove()
    assert bank.merge().max_error < 1e-4


def at_block(model: torch.nn.Module, hook: Callable[..., None]) -> Any:
    return model.blocks[0].register_forward_hook(hook)  # type: ignore[index]


def at_call(model: torch.nn.Module, hook: Callable[..., None]) -> Any:
    return model.register_forward_pre_hook(hook)


def at_return(model: torch.nn.Module, hook: Callable[..., None]) -> Any:
    return model.register_forward_hook(hook)


@pytest.mark.parametrize("place", [at_block, at_call, at_return])
def test_a_first_adapter_waits_for_passes_of_the_plain_model(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier is called by such a pass after the change has begun: it was that of the adapter."""
    cell = Cell("lora", "vit")
    other = cell.model()
    bank = cell.attach(other)
    other.reset_classifier(7)
    bank.save(tmp_path)
    model, images = cell.model(), cell.images()
    wanted, found = model(images), {}
    reached, go_on = threading.Event(), threading.Event()
    # The pass goes on once the change waits for it, and no earlier.
    monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: go_on.set()))

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(20)

    handle = place(model, wait)
    thread = threading.Thread(target=lambda: found.update(out=model(images)))
    thread.start()
    assert reached.wait(60)
    bank = vispeft.load(model, tmp_path)
    thread.join(60)
    handle.remove()
    assert torch.equal(found["out"], wanted)
    assert bank.active == ["default"]
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("place", [at_block, at_call, at_return])
def test_a_first_adapter_inside_of_a_plain_pass_is_refused(place: Any) -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    wanted, kind = model(images), type(model)
    handle = place(model, lambda *_: vispeft.attach(model, vispeft.VPT(num_tokens=2)))
    with pytest.raises(ConfigError, match="in the middle of its own forward pass"):
        model(images)
    handle.remove()
    assert type(model) is kind
    assert torch.equal(model(images), wanted)


def test_threads_that_attach_first_at_once_share_one_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each made a bank of its own, and the second knew nothing of the adapter of the first."""
    cell = Cell("lora", "vit")
    model, both, banks = cell.model(), threading.Barrier(2), {}
    of = AdapterBank.of
    monkeypatch.setattr(AdapterBank, "of", lambda _: (time.sleep(0.05), of(model))[1])

    def attach(name: str) -> None:
        both.wait(60)
        banks[name] = vispeft.attach(model, METHODS["lora"], name=name, verify=False)

    threads = [threading.Thread(target=attach, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert banks["one"] is banks["two"]
    assert sorted(banks["one"].names) == ["one", "two"]


@pytest.mark.parametrize("place", ["vispeft.adapters.bank.make_plan", "vispeft.adapters.bank.family_of"])
def test_an_attach_that_is_refused_leaves_one_in_another_thread_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closed the bank that the other one was about to fill, and the whole base trained."""
    cell = Cell("lora", "vit")
    model, inside, refused, banks = cell.model(), threading.Event(), threading.Event(), []
    module, name = place.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def slow(*given: Any) -> Any:
        if threading.current_thread() is thread:
            inside.set()
            refused.wait(0.5)
        return real(*given)

    thread = threading.Thread(target=lambda: banks.append(vispeft.attach(model, METHODS["lora"], verify=False)))
    monkeypatch.setattr(place, slow)
    thread.start()
    inside.wait(60)
    with pytest.raises(ConfigError):
        vispeft.attach(model, "ssf", name="other")  # type: ignore[arg-type]
    refused.set()
    thread.join(60)
    assert AdapterBank.of(model) is banks[0]
    assert banks[0].names == ["default"]
    assert not next(iter(model.parameters())).requires_grad
    banks[0].detach("default")
    assert AdapterBank.of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def load_base(bank: AdapterBank, model: Any, noted: Callable[..., None], patch: pytest.MonkeyPatch) -> None:
    state = dict(bank.base_tensors()) | {f"head.{key}": t for key, t in model.head.state_dict().items()}
    patch.setattr(model.head, "load_state_dict", noted)
    bank.load_base(state)


def verify(bank: AdapterBank, model: Any, noted: Callable[..., None], patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vispeft.adapters.training.find_dead", noted)
    bank.verify()


def resize(bank: AdapterBank, model: Any, noted: Callable[..., None], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.patch_embed, "set_input_size", noted)
    model.set_input_size(img_size=48)


@pytest.mark.parametrize("change", [load_base, verify, resize])
def test_no_pass_runs_beside_other_changes_of_tensors(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, changing = Cell("lora", "vit"), []
    model = cell.model()
    bank = cell.attach(model)
    change(bank, model, lambda *_, **__: changing.append(bank._routing.gate._changing), monkeypatch)
    assert changing == [threading.get_ident()]


def test_blocks_of_one_thread_may_overlap_and_are_left_where_they_were_entered() -> None:
    """Generators that take turns leave their blocks in another order; one then predicted by another's adapter."""
    cell = Cell("lora", "vit")
    model, seen = cell.model(), []
    for name in ("one", "two", "three"):
        bank = vispeft.attach(model, METHODS["lora"], name=name, verify=False)
    first, second, third = bank.using("one"), bank.using("two"), bank.disabled()
    for step in (first.__enter__, second.__enter__, third.__enter__):
        step()
    for block in (first, third, second):
        block.__exit__(None, None, None)
        seen.append(bank.active)
    assert seen == [[], ["two"], ["three"]]
    block, refused = bank.using("one"), []
    block.__enter__()

    def leave() -> None:
        with pytest.raises(ConfigError, match="left in another thread"):
            block.__exit__(None, None, None)
        refused.append(bank.active)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join(60)
    block.__exit__(None, None, None)
    assert refused == [["three"]]
    assert bank.active == ["three"]
    bank.detach("one")


def test_a_fork_in_the_middle_of_a_pass_leaves_the_gate_open() -> None:

    cell = Cell("lora", "vit")
    model = cell.model()
    bank = cell.attach(model)

    def work(reached: threading.Event, go_on: threading.Event) -> None:
        with bank._routing.gate.beside(), bank._routing.gate.graphs:
            reached.set()
            assert go_on.wait(60)

    def fork() -> None:
        child = os.fork()
        if not child:
            bank.set_active([])
            bank.detach("default")
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    beside(work, fork)


def test_maps_of_all_tasks_are_of_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of another thread between the passes of two tasks counted for the second, and so did a change."""
    cell = Cell("lora", "vit")
    model, images, tasks = cell.model().eval(), cell.images(), ["seg", "depth"]
    for name in ("two", "one"):
        bank = vispeft.attach(model, METHODS["lora"], name=name, tasks=tasks, verify=False)
        move(bank, name)
    real, gate = task_maps._intermediates, bank._routing.gate
    with torch.no_grad():
        wanted = vispeft.forward_tasks(model, images)
        chooses = threading.Thread(target=lambda: bank.set_active("two"))
        changes = threading.Thread(target=lambda: bank.detach("one"))

        def beside(*given: Any) -> Any:
            found = real(*given)
            if not chooses.ident:
                chooses.start()
                chooses.join(60)
                changes.start()
                until = time.monotonic() + 60
                while changes.is_alive() and not gate._waiting and time.monotonic() < until:
                    time.sleep(0.001)
            return found

        monkeypatch.setattr(task_maps, "_intermediates", beside)
        found = vispeft.forward_tasks(model, images)
    changes.join(60)
    assert bank.names == ["two"]
    for task in tasks:
        assert all(map(torch.equal, found[task], wanted[task]))
