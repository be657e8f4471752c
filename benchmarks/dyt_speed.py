"""Throughput of a ViT with DyT, whose tokens skip MLPs, beside the frozen model and LoRA, on one CPU thread.

    python benchmarks/dyt_speed.py                                          # ViT-S/16; a minute of a core
    python benchmarks/dyt_speed.py --model vit_tiny_patch16_224 --rounds 2  # a trial, which writes nothing
    python benchmarks/dyt_speed.py --table                                  # also the table in docs/benchmarks.md

Random weights and noise images, which take as long as others. So that the paper's share of the patch tokens passes each
MLP (0.5, see `vispeft.DyT.target`), the bias of each dispatcher is set to the middle of its scores of these images; the
share that passed is counted. The models take turns. Seconds are medians over rounds of the process's CPU time, and
throughput is the median of its ratio to the frozen model within a round. Operations of matrix products are counted by
PyTorch. Writes results/dyt_speed.json, which the page of the method tells as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import vispeft  # isort: skip  (first: it makes torchvision importable where its library does not fit)

import timm
import torch
from common import RESULTS, write, write_section
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vispeft.methods.dyt import DyTUnit

NAME = "dyt_speed"
SHARES = (0.7, 0.5, 0.3)
"""Shares of the patch tokens that pass; 0.5 is the paper's."""
PAPER = 0.5
OPEN = 100.0
"""Bias of dispatchers that let all tokens pass."""
BOTTLENECK, RANK = 16, 8
"""Hidden channels of DyT's adapters, as its public code has for VTAB-1k, and rank of LoRA."""


def dispatchers(bank: vispeft.AdapterBank) -> list[DyTUnit]:
    """List the units of the adapter ``dyt``, in the order of the blocks."""
    return [unit for unit in bank.units("dyt").values() if isinstance(unit, DyTUnit)]


@torch.no_grad()
def settle(bank: vispeft.AdapterBank, images: Tensor, share: float) -> list[Tensor]:
    """Find the biases with which a share of the patch tokens passes each MLP, in one forward pass.

    Args:
        bank: A bank with an adapter ``dyt``.
        images: (B, 3, H, W).
        share: Share of the patch tokens.

    Returns:
        The bias of each block.
    """

    def settled(unit: DyTUnit, x: Tensor, prefix: int) -> Tensor:
        unit.gate_bias.fill_(-float((x[:, prefix:] @ unit.gate[0]).flatten().quantile(1 - share)))
        return DyTUnit.passes(unit, x, prefix)  # what the blocks behind see depends on it

    units = dispatchers(bank)
    for unit in units:
        unit.passes = partial(settled, unit)  # type: ignore[method-assign]
    with bank.using("dyt"):
        bank.model(images)
    for unit in units:
        del unit.passes
    return [unit.gate_bias.clone() for unit in units]


@torch.no_grad()
def choose(bank: vispeft.AdapterBank, biases: list[Tensor]) -> None:
    """Put biases of dispatchers into place; none for what has no dispatchers."""
    for unit, bias in zip(dispatchers(bank), biases, strict=bool(biases)):
        unit.gate_bias.copy_(bias)


def operations(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def passed(bank: vispeft.AdapterBank, images: Tensor) -> float:
    """Count the share of the patch tokens that pass, over images and blocks."""
    model: Any = bank.model
    with bank.using("dyt"):
        shares = [kept.float().mean() for kept in model.run(images).passed.values()]
    return float(torch.stack(shares).mean())


def runs(model_name: str, images: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """Make the models, and count what DyT does.

    Args:
        model_name: A ViT of timm.
        images: What they run on.

    Returns:
        What is timed, by name, and the counts of those with DyT.
    """
    plain, model = (timm.create_model(model_name, num_classes=10).eval() for _ in range(2))
    bank = vispeft.attach(model, vispeft.LoRA(rank=RANK), name="lora", verify=False)
    vispeft.attach(model, vispeft.DyT(bottleneck=BOTTLENECK), name="dyt", verify=False)
    biases = {f"dyt, {share:.1f} pass": settle(bank, images, share) for share in SHARES}
    biases["dyt, all pass"] = [torch.full((1,), OPEN) for _ in dispatchers(bank)]

    def adapted(name: str, chosen: list[Tensor]) -> None:
        choose(bank, chosen)
        with bank.using(name):
            model(images)

    timed: dict[str, Callable[[], Any]] = {"frozen": partial(plain, images), "lora": partial(adapted, "lora", [])}
    counts, whole = {"frozen": {"operations_of_frozen": 1.0}}, operations(timed["frozen"])
    for name, chosen in biases.items():
        timed[name] = partial(adapted, "dyt", chosen)
        counts[name] = {"operations_of_frozen": operations(timed[name]) / whole, "passed": passed(bank, images)}
    return timed, counts


@torch.inference_mode()
def measure(model_name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time forward passes of all models in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    timed, counts = runs(model_name, images)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, run in timed.items():
            start = time.process_time()
            run()
            if number:  # the first round chooses kernels
                seconds[name].append(time.process_time() - start)
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["frozen"], times, strict=True)]
        rows[name] = {
            "seconds": statistics.median(times),
            "images_per_second": batch / statistics.median(times),
            "throughput": statistics.median(ratios),
            "throughput_by_round": [round(ratio, 3) for ratio in ratios],
            **counts.get(name, {}),
        }
    return {"model": model_name, "batch": batch, "rounds": rounds, "threads": 1, "bottleneck": BOTTLENECK, "rows": rows}


def table(found: dict[str, Any]) -> list[str]:
    """Arrange the figures."""
    rows = []
    for name, row in found["rows"].items():
        counts = [f"{row[key]:.2f}" if key in row else "" for key in ("passed", "operations_of_frozen")]
        cells = [name, *counts, f"{row['images_per_second']:.2f}", f"{row['throughput']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return [
        f"`{found['model']}`, {found['bottleneck']} hidden channels, batches of {found['batch']}, one CPU thread, CPU "
        "time of the process:",
        "",
        "| model | tokens that pass | operations, of frozen | images per second | throughput, of frozen |",
        "|---|--:|--:|--:|--:|",
        *rows,
    ]


def main() -> None:
    """Measure, write, and make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--from_file", action="store_true", help="make the table from the stored figures")
    args = parser.parse_args()
    if args.from_file:
        found = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    else:
        found = measure(args.model, args.batch, args.rounds)
        if args.model == parser.get_default("model"):
            write(NAME, found)
    print("\n".join(table(found)))
    if args.table:
        write_section(NAME, table(found))


if __name__ == "__main__":
    main()
