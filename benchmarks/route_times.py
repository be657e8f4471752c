"""Milliseconds of choosing adapters on a model that carries one, and one that carries a hundred.

    python benchmarks/route_times.py

Writes results/route_times.json. `using` is measured on a ViT-B/16; `set_active` and attaching on a ViT-S/16 with LoRA,
each the median of several rounds. Every choice is made for the first time (its route is made), and again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import write
from rich.console import Console
from rich.table import Table


def milliseconds(action: Callable[[], Any]) -> float:
    """Time one action."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def using(bank: Any, name: str) -> None:
    """Enter and leave a block."""
    with bank.using(name):
        pass


def choices(bank: Any, names: list[str], rounds: int) -> dict[str, float]:
    """Time `set_active` and `using` for a choice that is new, and for one that was made before."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        name = names[number % len(names)]
        for kind, action in (("set_active", bank.set_active), ("using", lambda n: using(bank, n))):
            bank._routes.clear()
            found.setdefault(f"{kind}, new", []).append(milliseconds(lambda a=action, n=name: a(n)))
            found.setdefault(f"{kind}, again", []).append(milliseconds(lambda a=action, n=name: a(n)))
    return {kind: statistics.median(times) for kind, times in found.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--adapters", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(2)
    large = timm.create_model("vit_base_patch16_224", num_classes=10)
    rows = {"ViT-B/16, 1 adapter": choices(vispeft.attach(large, vispeft.LoRA(rank=8)), ["default"], args.rounds)}
    small = timm.create_model("vit_small_patch16_224", num_classes=10)
    attaching = []
    for number in range(args.adapters):
        attaching.append(milliseconds(lambda n=number: vispeft.attach(small, vispeft.LoRA(rank=8), name=f"a{n}")))
        if number == 0:
            bank = vispeft.AdapterBank.of(small)
            assert bank is not None
            rows["ViT-S/16, 1 adapter"] = choices(bank, ["a0"], args.rounds)
    rows[f"ViT-S/16, {args.adapters} adapters"] = choices(bank, [f"a{n}" for n in range(args.adapters)], args.rounds)
    # The very first attach also warms the machine up: a bare model's first one is measured again, on a fresh model.
    first = []
    for _ in range(5):
        fresh = timm.create_model("vit_small_patch16_224", num_classes=10)
        first.append(milliseconds(lambda m=fresh: vispeft.attach(m, vispeft.LoRA(rank=8))))
    last = statistics.median(attaching[-5:])
    figures = {"first": statistics.median(first), f"number {args.adapters}": last}
    figures["ratio"] = last / figures["first"]
    path = write("route_times", {"arguments": vars(args), "milliseconds": rows, "attach_milliseconds": figures})
    table = Table("", *next(iter(rows.values())), title="milliseconds, median")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    print(", ".join(f"attach {name}: {value:.2f}" for name, value in figures.items()))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
