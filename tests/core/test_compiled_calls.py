"""Calls of compiled blocks that have to run as they are: other threads, hooks, transforms, and calls that fail."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vispeft
from tests.core.test_compiling import IMAGES, Counter, base
from vispeft.adapters.bank import AdapterBank


@pytest.fixture
def counter() -> Counter:
    torch._dynamo.reset()
    return Counter()


def of_two() -> tuple[Any, AdapterBank, dict[str, Tensor]]:
    """Make a model with two adapters, and the output of each."""
    model = base(2).eval()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="one", verify=False)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="two", verify=False)
    outputs = {}
    for name in ("one", "two"):
        for tensor in bank.named_tensors(name).values():
            nn.init.normal_(tensor, std=0.1)
        with bank.using(name), torch.no_grad():
            outputs[name] = model(IMAGES)
    return model, bank, outputs


def test_a_choice_of_another_thread_waits_for_a_graph_that_is_about_to_run(counter: Counter) -> None:
    model, bank, outputs = of_two()
    bank.compile(backend=counter)
    graph = model.blocks[1]._compiled_call_impl.graph
    run, left = graph.run, threading.Event()

    def choose() -> None:
        with bank.using("two"):
            left.wait(10)

    other = threading.Thread(target=choose)

    def beside(*args: Any) -> Any:
        if other.ident is None:
            other.start()
            other.join(0.1)
        return run(*args)

    graph.run = beside
    with bank.using("one"), torch.no_grad():
        found = model(IMAGES)
    left.set()
    other.join()
    assert torch.allclose(found, outputs["one"], atol=1e-6)


def test_a_thread_keeps_its_choice_while_another_one_compiles() -> None:
    model, bank, _ = of_two()
    entered, compiles, asked, active = threading.Event(), threading.Event(), threading.Event(), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiles.set()
        asked.wait(10)
        return graph.forward

    def choose() -> None:
        with bank.using("two"):
            entered.set()
            compiles.wait(10)
            active.extend(bank.active)
            asked.set()

    torch._dynamo.reset()
    bank.compile(backend=backend)
    other = threading.Thread(target=choose)
    other.start()
    entered.wait(10)
    with bank.using("one"), torch.no_grad():
        model(IMAGES)
    other.join()
    assert active == ["two"]


def seen_by(model: Any, register: Any) -> int:
    """Count the calls of a hook in one step."""
    seen: list[None] = []
    handle = register(lambda *_: seen.append(None))
    model(IMAGES).sum().backward()
    handle.remove()
    return len(seen)


def test_hooks_that_come_after_the_graphs_are_called(counter: Counter) -> None:
    model = base(2)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    model.train()
    every = nn.modules.module.register_module_forward_hook
    wanted = seen_by(model, every)
    bank.compile(backend=counter)
    model(IMAGES)
    made, second = counter.graphs, model.blocks[1]
    assert seen_by(model, every) == wanted
    assert seen_by(model, second.register_full_backward_hook) == 1
    assert seen_by(model, second.register_full_backward_pre_hook) == 1
    assert seen_by(model, second.register_forward_pre_hook) == 1
    assert counter.graphs == made
    assert seen_by(model, second.attn.register_forward_hook) == 1
    assert counter.graphs == made + 1


@pytest.mark.slow
def test_a_block_with_backward_hooks_inside_runs_as_it_is_alone(
    counter: Counter, caplog: pytest.LogCaptureFixture
) -> None:
    model = base(3)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    model.train()
    bank.compile(backend=counter)
    for hooked in (1, 2):
        assert seen_by(model, model.blocks[hooked].attn.register_full_backward_hook) == 1
    assert [block._compiled_call_impl.failed for block in model.blocks] == [False, True, True]
    assert not model.blocks[0]._compiled_call_impl.graph.failed
    assert counter.graphs == 1
    assert caplog.text.count("cannot be compiled and runs as it is") == 1


def test_a_call_that_is_wrong_in_itself_ends_no_compilation(counter: Counter, caplog: pytest.LogCaptureFixture) -> None:
    model, bank, outputs = of_two()
    bank.compile(backend=counter)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="must match"):
            model(IMAGES, attn_mask=torch.zeros(3, 3))
        assert torch.allclose(model(IMAGES), outputs["two"], atol=1e-6)
    assert counter.graphs == 1
    assert "as it is" not in caplog.text


def test_transforms_of_functions_take_compiled_blocks_as_they_are(counter: Counter) -> None:
    model, bank, _ = of_two()
    for block in model.blocks:
        block.attn.fused_attn = False  # PyTorch cannot transform it
    tensors = {name: tensor.detach() for name, tensor in bank.trainable_parameters()}

    def loss(own: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, own, (image[None],))
        return found.square().sum()

    of_each_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    wanted = of_each_image(tensors, IMAGES)
    bank.compile(backend=counter)
    torch.testing.assert_close(of_each_image(tensors, IMAGES), wanted)
    assert counter.graphs == 0
