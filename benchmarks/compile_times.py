"""Compiling block by block with inductor: the first step with a cold and with a warm cache, graphs, and later steps.

    python benchmarks/compile_times.py                               # ViT-B and Swin-T; about 15 minutes on two cores
    python benchmarks/compile_times.py --networks vit_tiny_patch16_224 --rounds 1   # a trial; writes nothing
    python benchmarks/compile_times.py --table                       # writes the table in docs/benchmarks.md

LoRA on all linear layers, batch 2, float32. Each network is compiled in two fresh processes that share a cache, which
is empty for the first one. A step is forward, loss and backward. The first one compiles; later ones take turns with
the same model as it is, and with the floor, compiled and not: the frozen network without an adapter. Graphs are those
that PyTorch counts: after training, after evaluation, after another batch size, and after switching to an adapter of
equal structure and back, which must add none. Writes results/compile_times.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import vispeft  # isort: skip  (first: it makes torchvision importable where its library does not fit)

import timm
import torch
from common import RESULTS, alternate, write, write_section
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._dynamo.utils import counters

NAME = "compile_times"
NETWORKS = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224")
COLD_BARS = {"vit_base_patch16_224": 60, "swin_tiny_patch4_window7_224": 240}
"""Most seconds of the first step with an empty cache, by network."""
WARM_BAR, STEP_BAR = 30, 1.0
"""Most seconds with a filled cache; largest time of a compiled step relative to the same step as it is."""
ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BATCH = 2
PAIRS = (("compiled", "eager"), ("compiled floor", "floor"))
"""Steps that are compared; the floor is the frozen network without an adapter."""


def network(name: str) -> tuple[nn.Module, Any]:
    """Make a network with two adapters of equal structure; return it with its bank."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    method = vispeft.LoRA(rank=8, alpha=8, roles=ROLES)
    vispeft.attach(model, method)
    return model, vispeft.attach(model, method, name="other")


def floor(name: str) -> nn.Module:
    """Make a frozen network without an adapter, whose gradient goes back to the first layer."""
    model = timm.create_model(name, num_classes=10).train().requires_grad_(False)
    model.patch_embed.proj.bias.requires_grad_(True)
    return model


def step(model: nn.Module, images: Tensor) -> float:
    """Take a training step without an update; return its loss."""
    loss = model(images).square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return float(loss.detach())


def graphs() -> int:
    """Count the graphs made up to now."""
    return int(counters["stats"]["unique_graphs"])


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Compile a network in this process and measure it.

    Args:
        name: The network.
        rounds: Counted later steps.

    Returns:
        Seconds and numbers of graphs.
    """
    images = torch.randn(BATCH, 3, 224, 224)
    (eager, plain), (model, bank) = network(name), network(name)
    for one in (plain, bank):
        one.set_active("default")
    bank.compile("blocks")
    began = time.perf_counter()
    loss = step(model, images)
    found: dict[str, Any] = {"first_step": time.perf_counter() - began, "graphs": {"training": graphs()}}
    found["difference"] = abs(loss - step(eager, images))
    step(model, images)
    found["graphs"]["second_step"] = graphs()
    for adapter in ("other", "default"):
        bank.set_active(adapter)
        step(model, images)
    found["graphs"]["switched"] = graphs()
    with torch.inference_mode():
        model.eval()(images)
    found["graphs"]["evaluation"] = graphs()
    step(model.train(), images[:1])
    found["graphs"]["other_batch"] = graphs()
    models = {"compiled": model, "eager": eager, "compiled floor": floor(name), "floor": floor(name)}
    for block in models["compiled floor"].modules():
        if isinstance(block, Block | SwinTransformerBlock):
            block.compile(fullgraph=True, dynamic=False)
    found["steps"] = alternate({key: partial(step, one, images) for key, one in models.items()}, rounds, warmup=1)
    return found


def in_fresh_processes(name: str, rounds: int) -> dict[str, Any]:
    """Measure a network with an empty cache, then with a filled one.

    Args:
        name: The network.
        rounds: Counted later steps.

    Returns:
        Figures of both processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--one", name, "--rounds", str(rounds)]
        found = {}
        for state in ("cold", "warm"):
            out = subprocess.run(command, env=place, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[state] = json.loads(out.splitlines()[-1])
            print(f"{name}, {state}: first step {found[state]['first_step']:.1f} s", flush=True)
    return found


def judged(value: float, bar: float, digits: int) -> str:
    """Write a figure with its bar."""
    return f"{value:.{digits}f} (bar {bar:.{digits}f}: {'met' if value <= bar else 'not met'})"


def table_lines(networks: dict[str, Any]) -> Iterator[str]:
    """Make the section of docs/benchmarks.md."""
    yield "| network | first step, empty cache, s | filled cache, s | later steps, of not compiled | the floor's |"
    yield "|---|--:|--:|--:|--:|"
    for name, found in networks.items():
        steps = found["warm"]["steps"]
        share, of_floor = (steps[a]["median"] / steps[b]["median"] for a, b in PAIRS)
        cold = judged(found["cold"]["first_step"], COLD_BARS.get(name, 0), 0)
        warm = judged(found["warm"]["first_step"], WARM_BAR, 0)
        yield f"| {name} | {cold} | {warm} | {judged(share, STEP_BAR, 2)} | {of_floor:.2f} |"
    yield ""
    yield "| network | graphs of training | after more steps | after a switch | with evaluation | another batch |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, found in networks.items():
        numbers = found["cold"]["graphs"]
        keys = ("training", "second_step", "switched", "evaluation", "other_batch")
        yield f"| {name} | " + " | ".join(str(numbers[key]) for key in keys) + " |"
    largest = max(found["cold"]["difference"] for found in networks.values())
    yield ""
    yield f"Losses of the compiled and the plain model differ by at most {largest:.1e}."


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="names of timm")
    parser.add_argument("--rounds", type=int, default=15, help="counted later steps")
    parser.add_argument("--one", help="measure one network in this process and print its figures")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines(json.loads(Path(RESULTS / f"{NAME}.json").read_text())["networks"]))
        return
    if args.one:
        print(json.dumps(measured(args.one, args.rounds)))
        return
    networks = {name: in_fresh_processes(name, args.rounds) for name in args.networks}
    print("\n".join(table_lines(networks)))
    if tuple(args.networks) == NETWORKS:
        print(f"written to {write(NAME, {'networks': networks}).name}")


if __name__ == "__main__":
    main()
