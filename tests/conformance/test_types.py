"""Every method in float16 with scaled gradients, with images and weights in channels-last order, and compiled under
autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vispeft
from tests.conformance.cells import MAIN, METHODS, Cell, is_second_form, params

CELLS = [cell for cell in MAIN if cell.backbone in ("vit", "swin") and not METHODS[cell.method].one_pass]
"""Each method on a ViT and a Swin; MTLoRA's scores depend on no unit of a task."""
on_each = pytest.mark.parametrize("cell", params(CELLS, slow=is_second_form))


def close(found: list[Tensor], wanted: list[Tensor], share: float) -> bool:
    """Whether tensors agree to a share of the largest entry of each."""
    return all(
        float((a.detach().float() - b.float()).abs().max()) <= share * float(b.abs().max()) + 1e-6
        for a, b in zip(found, wanted, strict=True)
    )


@on_each
def test_float16_with_scaled_gradients(cell: Cell) -> None:
    """A base in float16 keeps adapter and classifier in float32, so that a scaler finds gradients it can unscale."""
    model, images = cell.model(), cell.images()
    first = cell.attach(model)
    wanted = model.train()(images).detach()
    half = cell.model().half()
    bank = cell.attach(half)
    bank.load_state_dict(first.state_dict())
    half.train()
    trained = [p for _, p in bank.trainable_parameters()]
    assert {p.dtype for p in trained} == {torch.float32}
    out = half(images.half())
    assert close([out], [wanted], 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimiser = torch.optim.AdamW(trained, 1e-4)
    scaler.scale(out.float().square().mean()).backward()
    scaler.unscale_(optimiser)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    before = [p.detach().clone() for p in trained]
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**8  # no step was skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert all(p.isfinite().all() for p in trained)


@on_each
def test_channels_last(cell: Cell, tmp_path: Path) -> None:
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    bank.save(tmp_path / "first")

    def step(batch: Tensor) -> list[Tensor]:
        model.zero_grad()
        out = model(batch)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for _, p in bank.trainable_parameters())]

    wanted = step(images)
    model.to(memory_format=torch.channels_last)
    found = step(images.contiguous(memory_format=torch.channels_last))
    assert close(found, wanted, 1e-4)
    bank.save(tmp_path / "again")
    for file in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    other = cell.model().to(memory_format=torch.channels_last)
    vispeft.load(other, tmp_path / "first")
    with torch.no_grad():
        assert close([other.eval()(images)], wanted[:1], 1e-4)


@pytest.mark.parametrize(
    "cell", params(CELLS, slow=lambda cell: cell.key not in (("lora_all", "vit"), ("ssf", "swin")))
)
def test_compiled_by_block_under_autocast(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    graphs, results = 0, []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for compiled in (False, True):
        if compiled:
            bank.compile(backend=count)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
        out.float().square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for _, p in bank.trainable_parameters())])
    assert graphs > 0
    assert all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    assert close(results[1], results[0], 0.1)
    made = graphs
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert graphs == made
    assert not [record for record in caplog.records if record.name.startswith("vispeft")]  # no block runs as it is
