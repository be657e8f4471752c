"""Estimate which networks and methods train on which cards, in one process and in several.

    python benchmarks/fits.py              # start again to go on
    python benchmarks/fits.py --table      # only puts the tables into docs/scale.md

Each network is trained for two steps with one and two images of 224 pixels, in bf16-mixed, and what a step keeps for
its backward pass is counted, as `vispeft inspect CONFIG --memory` does. Nothing is measured on a GPU. For fsdp2 the
bytes of the frozen weights are divided by the number of processes, and two blocks as a whole are added. Writes
results/fits.json after each network and method.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write, write_section

from vispeft.cli.memory import MemoryEstimate, estimate_memory

NAME = "fits"
NETWORKS = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "Swin-B": "swin_base_patch4_window7_224",
}
METHODS = ("lora", "ssf", "vpt", "vqt")
CARDS = (8, 16, 24, 40, 80)
"""Memory of common GPUs, GiB."""
PLACES = {"1 GPU": 1, "4 GPUs": 4, "8 GPUs": 8, "2 nodes of 8": 16, "8 nodes of 8": 64}
"""Processes by what they run on."""
CARD = 24
"""The card of the second table, GiB."""
CONFIG = """
model:
  class_path: vispeft.tasks.Classification
  init_args: {backbone: %s, backbone_args: {pretrained: false}, method: %s}
data: {class_path: vispeft.data.DigitsData, init_args: {batch_size: 2}}
trainer: {precision: bf16-mixed, accelerator: cpu, max_epochs: 1}
"""


def estimate(model: str, method: str) -> dict[str, Any]:
    """Estimate a step of one network and method."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fits.yaml"
        path.write_text(CONFIG % (model, method))
        return asdict(estimate_memory(str(path)))


def block_bytes(model: str) -> int:
    """Bytes of the largest block of a network, in bfloat16."""
    import timm  # behind vispeft, which makes torchvision importable

    with torch.device("meta"):
        network = timm.create_model(model)
    blocks = [module for module in network.modules() if type(module).__name__.endswith("Block")]
    return max(2 * sum(p.numel() for p in block.parameters()) for block in blocks)


def sharded(found: MemoryEstimate, block: int, processes: int) -> MemoryEstimate:
    """The step of one of several processes that share the frozen weights in bfloat16."""
    if processes == 1:
        return found
    frozen = (found.parameters - found.gradients) // 2
    parameters = found.gradients + frozen // processes + 2 * block
    return MemoryEstimate(**{**asdict(found), "parameters": parameters})


def tables() -> list[str]:
    """Lines of both tables for the documentation."""
    record = json.loads((RESULTS / f"{NAME}.json").read_text())
    cards = " | ".join(f"{gib} GiB" for gib in CARDS)
    lines = [
        "Images that fit into a step of one process, by the memory of its card:",
        "",
        f"| network | method | weights and optimiser, MiB | an image, MiB | {cards} |",
        "|---|---|--:|--:|" + "--:|" * len(CARDS),
    ]
    for network, methods in record["steps"].items():
        for method, values in methods.items():
            found = MemoryEstimate(**values)
            fits = " | ".join(f"{found.largest_batch(gib):,}" for gib in CARDS)
            each = (found.per_image + found.temporary) / 2**20
            lines.append(f"| {network} | `{method}` | {found.fixed / 2**20:,.0f} | {each:.1f} | {fits} |")
    lines += ["", f"Images of a step of all processes with `lora` and cards of {CARD} GiB, and what weights and"]
    lines += ["optimiser take of each card, in MiB (`fsdp2` is an estimate that no GPU has confirmed):", ""]
    lines += ["| network | on | images | MiB with `ddp` | MiB with `fsdp2` |", "|---|---|--:|--:|--:|"]
    for network, methods in record["steps"].items():
        found, block = MemoryEstimate(**methods["lora"]), record["blocks"][network]
        for place, processes in PLACES.items():
            images = processes * found.largest_batch(CARD)
            shared = sharded(found, block, processes).fixed / 2**20
            told = f"{shared:,.0f}" if processes > 1 else ""
            lines.append(f"| {network} | {place} | {images:,} | {found.fixed / 2**20:,.0f} | {told} |")
    return lines


def main() -> None:
    """Estimate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    if not given.table:
        kept = json.loads(path.read_text()) if path.is_file() else {}
        record = {"steps": kept.get("steps", {}), "blocks": kept.get("blocks", {})}
        for network, model in NETWORKS.items():
            record["blocks"][network] = block_bytes(model)
            found = record["steps"].setdefault(network, {})
            for method in METHODS:
                if method not in found:
                    found[method] = estimate(model, method)
                    write(NAME, record)
                    print(network, method, MemoryEstimate(**found[method]).fits(), flush=True)
    write_section(NAME, tables(), page="scale")


if __name__ == "__main__":
    main()
