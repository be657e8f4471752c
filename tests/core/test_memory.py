"""How much a step keeps for its backward pass: less by default, least on request, with the gradients of plain."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import vispeft
from vispeft.core.origin import MEMORY
from vispeft.errors import UnknownNameError
from vispeft.hosts import low_rank

ALL = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def base() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2, num_classes=10)


def adapted(memory: str, method: vispeft.Method | None = None) -> tuple[nn.Module, vispeft.AdapterBank]:
    model = base()
    bank = vispeft.attach(model, method or vispeft.LoRA(rank=2, roles=ALL))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in bank.trainable_parameters():
            parameter.normal_(std=0.1)
    bank.memory = memory
    return model.train(), bank


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def kept(model: nn.Module, images: Tensor, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Run a forward pass; also count the bytes of the storages that it keeps, without parameters and images."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    for tensor in (images, *model.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return out, sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_lora_keeps_less_and_gives_the_same_gradients_bit_for_bit(images: Tensor, autocast: bool) -> None:
    full = base()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, of_full = kept(full, images, lambda: full(images))
    shares, gradients = {}, {}
    for memory in MEMORY:
        model, bank = adapted(memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, found = kept(model, images, lambda model=model: model(images))
        out.float().square().sum().backward()
        shares[memory] = found / of_full
        gradients[memory] = [p.grad for _, p in bank.trainable_parameters()]
    for memory in ("lean", "leaner"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["plain"], gradients[memory], strict=True))
    if not autocast:  # the floors in units of the width are 16, 10 and 6 per token and block
        assert shares["plain"] > 0.95
        assert shares["lean"] < 0.67
        assert shares["leaner"] < 0.43
    assert shares["plain"] > shares["lean"] > shares["leaner"]


def test_first_layers_of_frozen_mlps_are_computed_again_too(images: Tensor) -> None:
    shares = {}
    for memory in ("lean", "leaner"):
        model, _ = adapted(memory, vispeft.VPT(num_tokens=1))
        shares[memory] = kept(model, images, lambda model=model: model(images))[1]
    assert shares["leaner"] < 0.75 * shares["lean"]


def test_a_first_layer_is_computed_again_once_for_both_of_its_readers(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = adapted("leaner")
    computed, plain = [], low_rank._with_term

    def counted(rows: Tensor, weight: Tensor, *args: Any) -> Any:
        computed.append(weight.shape)
        return plain(rows, weight, *args)

    monkeypatch.setattr(low_rank, "_with_term", counted)
    loss = model(images).square().sum()
    assert len(computed) == 4 * len(model.blocks)
    computed.clear()
    loss.backward()
    assert computed == [model.blocks[0].mlp.fc1.weight.shape] * len(model.blocks)


def test_a_second_derivative_and_checkpointing(images: Tensor) -> None:
    found = []
    for memory in MEMORY:
        model, bank = adapted(memory)
        model.double()
        for block in model.blocks:
            block.attn.fused_attn = False  # the fused one has no second derivative
        parameters = [p for _, p in bank.trainable_parameters()]
        slopes = torch.autograd.grad(model(images.double()).square().sum(), parameters, create_graph=True)
        torch.stack([slope.square().sum() for slope in slopes]).sum().backward()
        second = [p.grad.clone() for p in parameters]
        model.zero_grad()
        model.set_grad_checkpointing(True)
        model(images.double()).square().sum().backward()
        found.append([*second, *(p.grad for p in parameters)])
    pairs = [pair for other in found[1:] for pair in zip(found[0], other, strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10 * float(a.abs().max())) for a, b in pairs)


def test_a_seed_decides_what_is_dropped_also_under_checkpointing(images: Tensor) -> None:
    model, bank = adapted("lean", vispeft.LoRA(rank=2, roles=ALL, dropout=0.3))
    found = []
    for seed, checkpoints in ((0, False), (0, True), (1, False)):
        model.set_grad_checkpointing(checkpoints)
        torch.manual_seed(seed)
        model(images).square().sum().backward()
        found.append([p.grad.clone() for _, p in bank.trainable_parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_one_graph_may_go_backward_twice(images: Tensor) -> None:
    model, bank = adapted("leaner")
    loss = model(images).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for _, p in bank.trainable_parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, (_, p) in zip(first, bank.trainable_parameters(), strict=True))


def test_the_choice_can_change_and_leaves_no_trace(images: Tensor) -> None:
    model, bank = adapted("leaner")
    assert bank.memory == "leaner"
    assert copy.deepcopy(model)(images).equal(model(images))
    keys = list(model.state_dict())
    bank.memory = "plain"
    assert type(model.blocks[0].mlp.act) is nn.GELU
    assert list(model.state_dict()) == keys
    bank.memory = "lean"
    bank.merge()
    assert type(model.blocks[0].mlp.act) is nn.GELU
    bank.unmerge()
    bank.detach("default")
    fresh = base()
    assert [type(a) for a in model.modules()] == [type(b) for b in fresh.modules()]


@pytest.mark.parametrize("mode", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_a_compiled_model_keeps_as_little_and_the_choice_can_change(
    images: Tensor, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    full = base()
    _, of_full = kept(full, images, lambda: full(images))
    model, bank = adapted("plain")
    model(images).square().sum().backward()
    wanted = [parameter.grad for _, parameter in bank.trainable_parameters()]
    torch._dynamo.reset()
    bank.compile(mode, backend="aot_eager_decomp_partition")  # inductor without its kernels
    shares = {}
    for memory in MEMORY:
        bank.memory = memory
        model.zero_grad()
        out, found = kept(model, images, lambda: model(images))
        out.square().sum().backward()
        shares[memory] = found / of_full
        pairs = zip(wanted, bank.trainable_parameters(), strict=True)
        assert all((a - p.grad).abs().max() < 1e-5 * a.abs().max() for a, (_, p) in pairs)
    assert shares["plain"] > 0.95
    assert shares["lean"] < 0.67
    assert shares["leaner"] < 0.43
    bank.memory = "lean"
    assert kept(model, images, lambda: model(images))[1] / of_full == shares["lean"]
    assert "runs as it is" not in caplog.text


@pytest.mark.parametrize("mode", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.parametrize("generator", ["pytorch", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [
        vispeft.Adapter(bottleneck=4, dropout=0.5, drop_path=0.3),
        pytest.param(vispeft.LoRA(rank=2, roles=ALL, dropout=0.5, drop_path=0.3), marks=pytest.mark.slow),
    ],
    ids=["adapter", "lora"],
)
def test_compiled_models_draw_random_numbers_once(
    images: Tensor, mode: Any, method: vispeft.Method, generator: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is computed again, and with checkpoints, what was dropped stays dropped.

    The generator decides which operations stand for dropout in the graph: PyTorch's on a CPU, inductor's on a GPU.
    """
    model, bank = adapted("plain", method)
    torch._dynamo.reset()
    bank.compile(mode, backend="aot_eager_decomp_partition")
    results = []
    for memory, checkpoints in (("plain", False), ("leaner", False), ("lean", True)):
        bank.memory = memory
        model.set_grad_checkpointing(checkpoints)
        model.zero_grad()
        torch.manual_seed(3)
        with torch._inductor.config.patch(fallback_random=generator == "pytorch"):
            out = model(images)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for _, p in bank.trainable_parameters())])
    for result in results[1:]:
        assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(results[0], result, strict=True))
    torch.manual_seed(4)
    assert not torch.allclose(model(images), results[0][0])
    assert "runs as it is" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("fallback", [False, True])
def test_kernels_of_inductor_drop_the_same_entries_whatever_is_kept(images: Tensor, fallback: bool) -> None:
    model, bank = adapted("plain", vispeft.Adapter(bottleneck=4, dropout=0.5, drop_path=0.3))
    torch._dynamo.reset()
    bank.compile(options={"fallback_random": fallback})
    results = []
    for memory in MEMORY:
        bank.memory = memory
        model.zero_grad()
        torch.manual_seed(3)
        out = model(images)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for _, p in bank.trainable_parameters())])
    for result in results[1:]:
        assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(results[0], result, strict=True))


def test_unknown_options_of_the_compiler_are_refused_at_once() -> None:
    _, bank = adapted("lean")
    with pytest.raises(RuntimeError, match="no_such_option"):
        bank.compile(options={"no_such_option": True})
    assert not bank.is_compiled


@pytest.mark.slow
def test_options_reach_the_compiler_and_equal_models_share_graphs(images: Tensor) -> None:
    torch._dynamo.reset()
    asked: list[int] = []

    def every(guards: Any) -> list[bool]:
        asked.append(len(guards))
        return [True] * len(guards)

    options = {"max-autotune": False, "guard_filter_fn": every}
    for _ in range(2):
        model, bank = adapted("lean")
        bank.compile("model", options=options)
        model(images).sum().backward()
        assert len(asked) == 1
    assert "guard_filter_fn" in options


def test_an_unknown_choice_is_refused() -> None:
    _, bank = adapted("lean")
    with pytest.raises(UnknownNameError, match="leaner"):
        bank.memory = "leanest"
    assert bank.memory == "lean"


def test_scale_and_shift_keep_less_too(images: Tensor) -> None:
    shares, gradients = {}, {}
    for memory in MEMORY:
        model, bank = adapted(memory, vispeft.SSF())
        with torch.no_grad():
            for _, parameter in bank.trainable_parameters():
                parameter.add_(1)
        out, shares[memory] = kept(model, images, lambda model=model: model(images))
        out.square().sum().backward()
        gradients[memory] = [p.grad for _, p in bank.trainable_parameters()]
    # Of 16, 11 and 18 in units of the width per token and block, and as much again for the patch embedding's weight.
    assert shares["lean"] < 0.66 * shares["plain"]
    pairs = zip(gradients["plain"], gradients["lean"], strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max()) for a, b in pairs)


def test_nothing_outlives_the_backward_pass(images: Tensor) -> None:
    for memory in MEMORY:
        model, _ = adapted(memory)
        alive: list[weakref.ref[Tensor]] = []
        for block in model.blocks:
            block.norm2.register_forward_pre_hook(lambda module, args, alive=alive: alive.append(weakref.ref(args[0])))
        loss = model(images).square().sum()
        loss.backward()
        gc.collect()
        assert len(alive) == len(model.blocks)
        assert not any(ref() is not None for ref in alive)
        assert torch.isfinite(loss)


@pytest.mark.parametrize("path", ["norm1", "mlp.act", "mlp.fc1"])
def test_an_output_changed_in_place_by_a_hook_is_kept_as_it_is(images: Tensor, path: str) -> None:
    gradients = {}
    for memory in MEMORY:
        model, bank = adapted(memory)
        model.blocks[1].get_submodule(path).register_forward_hook(lambda module, args, out: out.add_(1))
        model(images).square().sum().backward()
        gradients[memory] = [p.grad for _, p in bank.trainable_parameters()]
    for memory in ("lean", "leaner"):
        pairs = zip(gradients["plain"], gradients[memory], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6 * a.abs().max()) for a, b in pairs)


class Doubled(nn.LayerNorm):
    """A norm that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [{"norm_layer": Doubled}, {"act_layer": partial(nn.SiLU, inplace=True)}])
def test_what_cannot_be_computed_again_is_kept(images: Tensor, change: dict[str, Any]) -> None:
    gradients = {}
    for memory in MEMORY:
        torch.manual_seed(0)
        model = VisionTransformer(img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=10, **change)
        bank = vispeft.attach(model, vispeft.LoRA(rank=2, roles=ALL), verify=False)
        with torch.no_grad():
            for _, parameter in bank.trainable_parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        bank.memory = memory
        model(images).square().sum().backward()
        gradients[memory] = [p.grad for _, p in bank.trainable_parameters()]
    for memory in ("lean", "leaner"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["plain"], gradients[memory], strict=True))


def test_first_and_second_derivatives_of_one_graph(images: Tensor) -> None:
    """In float32 and with as many rows as make oneDNN's product worth its call, which has no derivative."""
    found = []
    for memory in MEMORY:
        model, bank = adapted(memory)
        for block in model.blocks:
            block.attn.fused_attn = False
        parameters = [p for _, p in bank.trainable_parameters()]
        loss = model(images.repeat(8, 1, 1, 1)).square().mean()
        last = model.blocks[-1].mlp.fc2.get_submodule("adapters")
        torch.autograd.grad(loss, list(last.parameters()), retain_graph=True)
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.stack([slope.square().sum() for slope in slopes]).sum().backward()
        found.append([p.grad for p in parameters])
    for other in found[1:]:
        pairs = zip(found[0], other, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())) for a, b in pairs)


def test_gated_mlps_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=2)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    bank.memory = "leaner"
    assert "1 activation" in caplog.text
    assert "blocks.0.mlp.act" in caplog.text
