"""Throughput of a ViT with LoRA that merges tokens, beside the same model without, on one CPU thread.

    python benchmarks/token_merging.py            # ViT-B/16; some minutes
    python benchmarks/token_merging.py --table    # also puts the table into docs/benchmarks.md

Random weights, which take as long as trained ones; batches of 8 noise images in evaluation. The settings take turns.
Seconds are medians over rounds of the process's CPU time, and throughput is the median of its ratio to plain within a
round. Writes results/token_merging.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import vispeft  # isort: skip  (first: it makes torchvision importable where its library does not fit)

import torch
from common import RESULTS, write, write_section

NAME = "token_merging"
RS = (0, 8, 13, 16)
"""Tokens that each block merges away; 0 is the model without token merging."""
BAR = {8: 1.20}
"""Least throughput relative to the model without, by r."""


def measure(model_name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time forward passes with all settings in turn."""
    torch.set_num_threads(1)
    model = vispeft.create_model(model_name, pretrained=False, num_classes=10).eval()
    bank = vispeft.attach(model, vispeft.LoRA(rank=8), verify=False)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {r: [] for r in RS}
    tokens: dict[int, int] = {}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for r in RS:
                bank.merge_tokens(r)
                start = time.process_time()
                result = model.run(images) if r not in tokens else model(images)
                seconds[r].append(time.process_time() - start)
                if r not in tokens:
                    tokens[r] = result.tokens.shape[1]
    counted = {r: times[1:] for r, times in seconds.items()}  # the first round chooses kernels
    medians = {r: statistics.median(times) for r, times in counted.items()}
    ratios = {r: [a / b for a, b in zip(counted[0], times, strict=True)] for r, times in counted.items()}
    rows = {
        str(r): {
            "seconds": medians[r],
            "images_per_second": batch / medians[r],
            "throughput": statistics.median(ratios[r]),
            "throughput_by_round": [round(ratio, 3) for ratio in ratios[r]],
            "tokens_at_the_end": tokens[r],
        }
        for r in RS
    }
    return {"model": model_name, "batch": batch, "rounds": rounds, "threads": 1, "by_r": rows}


def main() -> None:
    """Measure, write, and check the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--from_file", action="store_true", help="make the table from the stored figures")
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    if args.from_file:
        found = json.loads(path.read_text())
    else:
        found = measure(args.model, args.batch, args.rounds)
        write(NAME, found)
    for r, row in found["by_r"].items():
        print(f"r = {r:>2}: {row['images_per_second']:.2f} images/s, {row['throughput']:.2f} of plain")
    if args.table:
        write_section(NAME, table(found))
    missed = [r for r, least in BAR.items() if found["by_r"][str(r)]["throughput"] < least]
    if missed and found["model"] == parser.get_default("model"):
        raise SystemExit(f"Throughput with r = {missed[0]} is below {BAR[missed[0]]} of the model without.")


def table(found: dict[str, Any]) -> list[str]:
    """Arrange the figures."""
    rows = (
        f"| {r} | {row['tokens_at_the_end']} | {row['images_per_second']:.2f} | {row['throughput']:.2f} |"
        for r, row in found["by_r"].items()
    )
    return [
        f"`{found['model']}` with LoRA, batches of {found['batch']}, one CPU thread, CPU time of the process:",
        "",
        "| r | tokens at the end | images per second | throughput, of r = 0 |",
        "|--:|--:|--:|--:|",
        *rows,
    ]


if __name__ == "__main__":
    main()
