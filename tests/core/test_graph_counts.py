"""How many graphs blocks compile to: one for all equal blocks, and none in later epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from tests.core.test_compiling import Counter, step


@pytest.fixture
def counter() -> Counter:
    torch._dynamo.reset()
    return Counter()


def vit(depth: int) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=depth, num_heads=2, num_classes=4)


def swin(blocks: int) -> SwinTransformer:
    """Make one stage, since each has graphs of its own."""
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(blocks,), num_heads=(2,), window_size=4, num_classes=4
    )


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def epoch(model: nn.Module, batches: list[Tensor]) -> None:
    model.train()
    for batch in batches:
        step(model, batch)
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)


@pytest.mark.parametrize(
    "method",
    [vispeft.LoRA(rank=2, drop_path=0.2), pytest.param(vispeft.Full(drop_path=0.2), marks=pytest.mark.slow)],
    ids=["lora", "full"],
)
def test_one_graph_serves_24_blocks_with_drop_path(counter: Counter, method: vispeft.Method) -> None:
    model = vit(24)
    bank = vispeft.attach(model, method, verify=False)
    bank.compile(backend=counter)
    model.train()
    step(model, images())
    assert counter.graphs == 1


@pytest.mark.parametrize("form", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_graphs_of_training_evaluation_and_a_second_batch_size(counter: Counter, form: str) -> None:
    """A stage of a Swin has one for blocks with shifted windows, and one for the others."""
    model: Any = vit(3) if form == "vit" else swin(4)
    kinds = 1 if form == "vit" else 2
    bank = vispeft.attach(model, vispeft.LoRA(rank=2, drop_path=0.1), name="one", verify=False)
    vispeft.attach(model, vispeft.LoRA(rank=2, drop_path=0.1), name="two", verify=False)
    bank.set_active("one")
    bank.compile(backend=counter)
    epoch(model, [images(), images()])
    assert counter.graphs == 2 * kinds
    for _ in range(2):
        epoch(model, [images(), images()])
        bank.set_active("two")
        epoch(model, [images()])
        bank.set_active("one")
    assert counter.graphs == 2 * kinds
    for _ in range(2):
        epoch(model, [images(), images(3), images()])
    assert counter.graphs == 4 * kinds


@pytest.mark.slow
def test_a_block_in_which_tasks_branch_has_one_more(counter: Counter) -> None:
    model = swin(4)
    bank = vispeft.attach(model, vispeft.MTLoRA(rank=2, task_rank=2), tasks=["a", "b", "c", "d"], verify=False)
    bank.compile(backend=counter)
    for _ in range(2):
        model.train()
        maps = vispeft.forward_tasks(model, images())
        torch.stack([level.square().mean() for own in maps.values() for level in own]).sum().backward()
        model.zero_grad()
    assert counter.graphs == 3  # with and without a shift, and where tasks branch


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vispeft")]


def test_more_sizes_than_graphs_run_as_they_are(counter: Counter, caplog: pytest.LogCaptureFixture) -> None:
    model = vit(2)
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    wanted = {batch: step(model, images(batch)) for batch in range(1, 6)}
    bank.compile(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(2):
            for batch, out in wanted.items():
                assert torch.allclose(step(model, images(batch)), out, atol=1e-6)
    assert counter.graphs == 3
    assert said(caplog) == [
        "A Block was compiled for 3 sizes and adapters already; with further ones it runs as it is."
    ]


class Printing(nn.GELU):
    """An activation of one's own that no graph can hold."""

    def forward(self, input: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(input)


def broken(graph: torch.fx.GraphModule, _: Any) -> Any:
    raise RuntimeError("Python.h: No such file or directory")


@pytest.mark.parametrize("fault", ["method", "platform"])
def test_what_turns_out_not_to_compile_runs_and_says_why_in_one_line(
    counter: Counter, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    model = vit(3)
    if fault == "method":
        for block in model.blocks:
            block.mlp.act = Printing()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), verify=False)
    wanted = step(model, images())
    gradients = [p.grad.clone() for _, p in bank.trainable_parameters()]
    bank.compile(backend=counter if fault == "method" else broken)
    for _ in range(2):
        assert torch.equal(step(model, images()), wanted)
    assert all(torch.equal(p.grad, g) for g, (_, p) in zip(gradients, bank.trainable_parameters(), strict=True))
    (line,) = said(caplog)
    assert line.startswith("A Block cannot be compiled and runs as it is: ")
    assert "\n" not in line
    assert "Python.h" in line or fault == "method"
