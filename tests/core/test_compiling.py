"""Compiling block by block: one graph for all equal blocks, and later changes act."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from vispeft.adapters import compiling
from vispeft.errors import ConfigError, MergeError, UnknownNameError


class Counter:
    """A compiler that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter() -> Counter:
    torch._dynamo.reset()
    return Counter()


def base(depth: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=depth, num_heads=2, num_classes=4, drop_path_rate=0.2
    )


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    model.zero_grad()
    out: Tensor = model(images)
    out.square().sum().backward()
    return out.detach()


def test_one_graph_serves_all_blocks_and_equal_adapters(counter: Counter) -> None:
    model = base()
    keys = [type(module) for module in model.modules()]
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="one", verify=False)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="two", verify=False)
    for name in ("one", "two"):
        for tensor in bank.named_tensors(name).values():
            nn.init.normal_(tensor, std=0.1)
    model.train()
    wanted = {}
    for name in ("one", "two"):
        bank.set_active(name)
        wanted[name] = step(model)
    names = list(model.state_dict())
    assert bank.compile(backend=counter) is None
    assert list(model.state_dict()) == names
    for name in ("one", "two", "one"):  # other tensors of equal structure need no other graph
        bank.set_active(name)
        assert torch.allclose(step(model), wanted[name], atol=1e-6)
        with bank.using("two"):
            assert torch.allclose(step(model), wanted["two"], atol=1e-6)
    assert counter.graphs == 1
    model.eval()
    with torch.no_grad():
        model(IMAGES)
    assert counter.graphs == 2
    copied = copy.deepcopy(model)
    assert torch.allclose(copied(IMAGES), model(IMAGES), atol=1e-6)
    assert all(block._compiled_call_impl is None for block in copied.blocks)
    assert bank.is_compiled
    assert not vispeft.AdapterBank.of(copied).is_compiled
    bank.detach("one")
    bank.detach("two")
    assert [type(module) for module in model.modules()] == keys
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_changes_after_compiling_act(counter: Counter) -> None:
    model = base(2)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    for _, parameter in bank.trainable_parameters():
        nn.init.normal_(parameter, std=0.1)
    bank.compile(backend=counter)
    before = step(model)
    vispeft.attach(model, vispeft.SSF(), name="other", verify=False)
    other = step(model)
    bank.set_active("default")
    assert torch.allclose(step(model), before, atol=1e-6)
    bank.merge()
    model.eval()  # timm's own drop path would act
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), before, atol=1e-5)
    bank.unmerge()
    model.train()
    model.set_grad_checkpointing(True)
    assert torch.allclose(step(model), before, atol=1e-6)
    model.set_grad_checkpointing(False)
    bank.memory = "plain"
    bank.set_active("other")
    assert torch.allclose(step(model), other, atol=1e-6)
    bank.compile("off")
    made = counter.graphs
    assert torch.allclose(step(model), other, atol=1e-6)
    assert counter.graphs == made


def test_a_merged_model_is_plain_and_copies_are_not_compiled(counter: Counter) -> None:
    model, plain = base(2), base(2)
    classes = [type(module) for module in plain.modules()]
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    bank.compile(backend=counter)
    bank.merge()
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(MergeError, match="compile it"):
        bank.compile(backend=counter)
    bank.unmerge()
    before = step(model)
    made = counter.graphs
    assert made > 0
    with pytest.raises(ConfigError, match="fullgraph"):
        bank.compile(fullgraph=False)
    bank.compile("model", backend=counter)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.allclose(copied(IMAGES), before, atol=1e-6)
            for parameter in copied.parameters():
                parameter.zero_()
            assert not copied(IMAGES).any()
    bank.compile("off")
    bank.detach("default")
    assert [type(module) for module in model.modules()] == classes


def test_a_thread_with_adapters_of_its_own_and_hooks_run_as_they_are(counter: Counter) -> None:
    model = base(2)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="one", verify=False)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="two", verify=False)
    for name in ("one", "two"):
        for tensor in bank.named_tensors(name).values():
            nn.init.normal_(tensor, std=0.1)
    wanted = {}
    for name in ("one", "two"):
        with bank.using(name), torch.no_grad():
            wanted[name] = model(IMAGES)
    bank.compile(backend=counter)
    entered, turn, found = threading.Barrier(2), threading.Lock(), {}

    def run(name: str) -> None:
        with bank.using(name), torch.no_grad():
            entered.wait()
            with turn:
                found[name] = model(IMAGES)
            entered.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    step(model)
    assert len(seen) == 1


def test_drop_path_of_an_adapter_is_no_constant_of_the_graph(counter: Counter) -> None:
    model = base()
    bank = vispeft.attach(model, vispeft.SSF(drop_path=0.2), verify=False)
    bank.compile(backend=counter)
    model.train()
    step(model)
    assert counter.graphs == 1


@pytest.mark.parametrize("part", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_a_recomputation_leaves_running_statistics_alone(part: Any, counter: Counter) -> None:
    """A graph of the whole model goes through autograd's compiler, which runs what changes statistics once."""
    method, backend = vispeft.ConformerAdapter(reduction=8, kernel=3), counter if part == "blocks" else "aot_eager"
    found = {}
    for compiled in (False, True):
        for checkpointed in (False, True):
            model = base(2)
            bank = vispeft.attach(model, method, verify=False)
            if compiled:
                bank.compile(part, backend=backend)
            model.set_grad_checkpointing(checkpointed)
            model.train()
            for _ in range(2):
                step(model)
            buffers = bank.state_dict()
            gradients = [p.grad for _, p in bank.trainable_parameters() if p.grad is not None]
            found[compiled, checkpointed] = [
                *(t for name, t in buffers.items() if name.endswith(("mean", "variance"))),
                *gradients,
            ]
    assert counter.graphs > 0 or part == "model"
    wanted = found.pop((False, False))
    assert sum(float(tensor.abs().sum()) > 0 for tensor in wanted[:4]) == 4
    for tensors in found.values():
        torch.testing.assert_close(tensors, wanted, atol=1e-6, rtol=1e-4)


def test_what_cannot_be_compiled_runs_and_says_why(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base(1)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    with pytest.raises(UnknownNameError, match="blocks"):
        bank.compile("block")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    reason = bank.compile()
    assert reason is not None
    assert "C++ compiler" in reason
    step(model)
    said = bank.compile(device=torch.device("mps"))
    assert said is not None
    assert "Apple's GPUs" in said
    assert all(block._compiled_call_impl is None for block in model.blocks)
