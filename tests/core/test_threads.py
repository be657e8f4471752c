"""Predictions in two threads beside changes in a third one: every output is of exactly one state, or refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vispeft
from tests.conformance.cells import METHODS, Cell, move
from vispeft.adapters.bank import AdapterBank
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


def test_a_first_adapter_waits_for_passes_of_the_plain_model() -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    wanted, found = model(images), {}
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(60)

    handle = model.blocks[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: found.update(out=model(images)))
    thread.start()
    assert reached.wait(60)
    threading.Timer(0.05, go_on.set).start()
    bank = vispeft.attach(model, vispeft.VPT(num_tokens=2))
    assert not thread.is_alive() or go_on.is_set()
    thread.join(60)
    handle.remove()
    assert torch.equal(found["out"], wanted)
    assert bank.active == ["default"]


def test_a_fork_in_the_middle_of_a_pass_leaves_the_gate_open() -> None:

    cell = Cell("lora", "vit")
    model = cell.model()
    bank = cell.attach(model)

    def work(reached: threading.Event, go_on: threading.Event) -> None:
        with bank._routing.gate.beside():
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
