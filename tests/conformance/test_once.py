"""Properties of every method on one ViT and one Swin: export, compilation, pickling, two processes.

Compiling takes seconds a cell, and so it is done on as few blocks as the method needs: see `small`. Second forms are
exported and compiled with ``make test-slow``, where two processes and inductor run as well.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections import Counter

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vispeft
from tests.conformance.cells import BATCH_STATISTICS, MAIN, METHODS, Cell, is_second_form, move, params

ONCE = [
    cell
    for cell in MAIN
    if cell.method != "lora"  # lora_all covers it
    and not METHODS[cell.method].one_pass  # scores do not reach the units of tasks, and tests of their own do
    and (cell.backbone == "vit" or (cell.backbone == "swin" and not is_second_form(cell)))
]
"""Each method in all forms on a ViT, and in its first form on a Swin."""

PLAIN_FIRST = (("ssf", "vit"), ("lora_all", "swin"))
"""Cells whose model is compiled and run before the adapter comes; how a compiler notices that is the same for all."""


@pytest.fixture(params=params(ONCE))
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


QUICK = {
    "vit": ("lora_all", "ssf", "vpt", "vqt", "adaptformer", "fact", "convpass", "bitfit"),
    "swin": ("lora_all", "ssf", "vpt", "mtlora"),
}
"""Methods that are exported and compiled with the quick tests, one for each way of acting; the others are slow."""


def _left(cell: Cell) -> bool:
    return cell.method not in QUICK.get(cell.backbone, ())


second_forms_slow = pytest.mark.parametrize("cell", params(ONCE, slow=_left))


def small(cell: Cell) -> nn.Module:
    """Make the backbone, of a Swin the first stage alone: each block takes a second."""
    return cell.model(depths=(1 if cell.short else 2,), num_heads=(2,)) if cell.backbone == "swin" else cell.model()


@second_forms_slow
@torch.no_grad()
def test_export_with_a_dynamic_batch(cell: Cell) -> None:
    model = small(cell)
    cell.attach(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (cell.images(3),), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        images = cell.images(size)
        assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@second_forms_slow
def test_compiled_whole_and_attached_afterwards(cell: Cell) -> None:
    torch._dynamo.reset()
    model, images = small(cell), cell.images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if cell.key in PLAIN_FIRST:
        with torch.no_grad():
            assert torch.allclose(compiled(images), model(images), atol=1e-5)
    bank = vispeft.attach(compiled, METHODS[cell.method])
    move(bank, "default")
    results = []
    for run in (model, compiled):
        run.zero_grad()
        output = run(images)
        output.square().sum().backward()
        results.append((output.detach(), [p.grad.clone() for _, p in bank.trainable_parameters()]))
    (wanted, gradients), (found, compiled_gradients) = results
    assert torch.allclose(found, wanted, atol=1e-5)
    pairs = zip(gradients, compiled_gradients, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    if cell.key in PLAIN_FIRST:
        with bank.disabled(), torch.no_grad():
            assert torch.allclose(compiled(images), model(images), atol=1e-5)


@pytest.mark.parametrize("cell", params(ONCE, slow=lambda cell: cell.key not in PLAIN_FIRST))
def test_compiled_by_block(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, images = small(cell), cell.images()
    bank = cell.attach(model)
    results, graphs = [], Counter[str]()

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs["made"] += 1
        return graph.forward

    for backend in (None, count):
        if backend is not None:
            bank.compile(backend=backend)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        results.append((output.detach(), [p.grad.clone() for _, p in bank.trainable_parameters()]))
    (wanted, gradients), (found, compiled_gradients) = results
    assert graphs["made"] > 0
    assert torch.allclose(found, wanted, atol=1e-5)
    pairs = zip(gradients, compiled_gradients, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    made = graphs["made"]
    model(images)
    assert graphs["made"] == made
    assert not [record for record in caplog.records if record.name.startswith("vispeft")]  # no block runs as it is


@pytest.mark.slow
@pytest.mark.parametrize("cell", params([cell for cell in ONCE if cell.backbone == "vit" or not _left(cell)]))
def test_compiled_graphs_that_keep_least_give_the_same_gradients(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that repeats whole layers in the backward pass, without the kernels of inductor."""
    torch._dynamo.reset()
    model, images = small(cell), cell.images()
    bank = cell.attach(model)
    results = []
    for memory in ("plain", "leaner"):
        bank.memory = memory
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for _, p in bank.trainable_parameters())])
        bank.compile(backend="aot_eager_decomp_partition")
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))
    assert not [record for record in caplog.records if "runs as it is" in record.getMessage()]


@torch.no_grad()
def test_pickle_and_torch_save(cell: Cell) -> None:
    model, images = cell.model(), cell.images()
    cell.attach(model)
    wanted = model(images)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(images), wanted)
    bank = vispeft.AdapterBank.of(again)
    assert bank is not None
    bank.detach("default")
    fresh = cell.model()
    cell.attach(fresh, moved=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), wanted)


def _train(cell: Cell, images: torch.Tensor, distributed: bool) -> list[tuple[str, torch.Tensor]]:
    model = cell.model()
    bank = cell.attach(model)
    run = DistributedDataParallel(model) if distributed else model
    optimiser = torch.optim.SGD([p for _, p in bank.trainable_parameters()], 1e-3)
    run.train()
    for _ in range(2):
        optimiser.zero_grad()
        run(images).square().mean().backward()
        optimiser.step()
    return [(name, p.detach().clone()) for name, p in bank.trainable_parameters()]


def _half_of_the_batch(rank: int, port: int, results: dict[tuple[int, str], list[tuple[str, torch.Tensor]]]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for cell in ONCE:
        results[rank, str(cell)] = _train(cell, cell.images(4)[2 * rank : 2 * rank + 2], distributed=True)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_half_of_the_batch, (port, results), nprocs=2)
        for cell in (cell for cell in ONCE if cell.method not in BATCH_STATISTICS):  # of half a batch in each process
            alone = _train(cell, cell.images(4), distributed=False)
            for (name, first), (_, second), (_, wanted) in zip(
                results[0, str(cell)], results[1, str(cell)], alone, strict=True
            ):
                assert torch.equal(first, second), f"{cell}: {name}"
                assert torch.allclose(first, wanted, atol=1e-5), f"{cell}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ssf", "lora_all", "full"])
def test_inductor(method: str) -> None:
    torch._dynamo.reset()
    cell = Cell(method, "vit")
    model, images = cell.model(), cell.images()
    cell.attach(model)
    compiled = torch.compile(model)
    assert torch.allclose(compiled(images), model(images), atol=1e-4)
    compiled(images).square().sum().backward()
    assert isinstance(model, nn.Module)
