"""Seconds of attaching, reporting, saving and loading an adapter, and the bytes of its files.

    python benchmarks/core_times.py

Writes results/core_times.json: the median and the worst of several rounds in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import write
from rich.console import Console
from rich.table import Table


def clock(seconds: dict[str, list[float]], name: str, action: Callable[[], Any]) -> Any:
    """Time one action."""
    start = time.perf_counter()
    result = action()
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    methods = {"ssf": vispeft.SSF(), "lora": vispeft.LoRA(rank=8)}
    base = timm.create_model(args.model, num_classes=100)
    other = timm.create_model(args.model, num_classes=7)
    other.load_state_dict({k: v for k, v in base.state_dict().items() if "head" not in k}, strict=False)
    results: dict[str, Any] = {}
    for name, method in methods.items():
        seconds: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                bank = clock(seconds, "attach", lambda m=method: vispeft.attach(base, m, verify=False))
                clock(seconds, "verify", bank.verify)
                report = clock(seconds, "report", bank.report)
                clock(seconds, "save", lambda b=bank, f=folder: b.save(f))
                loaded = clock(seconds, "load", lambda f=folder: vispeft.load(other, f))
                tensors, size = len(bank.state_dict()) - 2, (Path(folder) / "adapter.safetensors").stat().st_size
                loaded.detach("default")
                bank.detach("default")
        results[name] = {
            "trainable": report.trainable,
            "file_bytes": size,
            "tensor_bytes": report.stored_bytes,
            "allowed_bytes": report.stored_bytes + 2048 + 160 * tensors,
            "seconds": {k: {"median": statistics.median(v), "max": max(v)} for k, v in seconds.items()},
        }
    path = write("core_times", {"arguments": vars(args), "methods": results})
    table = Table(title=f"{args.model}: seconds, median of {args.rounds} (worst)")
    for heading in ("", "attach", "verify", "report", "save", "load", "file bytes", "allowed"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, entry in results.items():
        cells = [
            f"{entry['seconds'][step]['median']:.2f} ({entry['seconds'][step]['max']:.2f})"
            for step in ("attach", "verify", "report", "save", "load")
        ]
        table.add_row(name, *cells, f"{entry['file_bytes']:,}", f"{entry['allowed_bytes']:,}")
    Console().print(table)
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
