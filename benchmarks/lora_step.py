"""One training step of LoRA on all four linear layers: vispeft, Hugging Face peft, and full fine-tuning, side by side.

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --model swin_tiny_patch4_window7_224 --batch 4
    python benchmarks/lora_step.py --table          # writes the tables in docs/benchmarks.md

Writes results/lora_step.json, and for another model lora_step_MODEL.json: medians of alternating runs in one process,
and their ratios. The floor is a frozen model without any adapter, whose gradient goes back to the first layer. Both
kinds of LoRA are measured with dropout 0.1 too, and vispeft's with each choice of memory.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import RESULTS, alternate, saved_bytes, write, write_section
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from vispeft.core.origin import Memory

TARGETS = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$"
ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Run forward, backward and one AdamW update."""
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)


def with_peft(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    """Add LoRA with Hugging Face peft."""
    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=TARGETS, modules_to_save=["head"]),
    )


def with_ours(model: nn.Module, rank: int, dropout: float, memory: Memory = "lean") -> nn.Module:
    """Add LoRA with vispeft."""
    vispeft.attach(model, vispeft.LoRA(rank=rank, alpha=rank, dropout=dropout, roles=ROLES)).memory = memory
    return model


ROWS = {
    "peft": "LoRA of Hugging Face peft",
    "vispeft": "LoRA of vispeft (`memory: lean`)",
    "vispeft leaner": "LoRA of vispeft, `memory: leaner`",
    "vispeft plain": "LoRA of vispeft, `memory: plain`",
    "peft dropout 0.1": "LoRA of Hugging Face peft, dropout 0.1",
    "vispeft dropout 0.1": "LoRA of vispeft, dropout 0.1",
    "full": "full fine-tuning",
    "floor": "frozen, gradient back to the first layer, nothing added",
}
NAME = "lora_step"
VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"
BARS: dict[str, dict[tuple[str, str], tuple[float | None, float | None]]] = {
    VIT: {
        ("vispeft", "full"): (0.65, 0.90),
        ("vispeft", "floor"): (None, 1.12),
        ("vispeft leaner", "full"): (0.42, 1.00),
        ("vispeft dropout 0.1", "vispeft"): (1.02, 1.12),
    },
    SWIN: {("vispeft", "full"): (0.75, 0.95)},
}
"""Largest share of another row, in what is kept and in the time of a step, by model."""


def path_of(model: str, device: str = "cpu") -> Path:
    """Give the file of a model's results."""
    return RESULTS / f"{NAME}{'' if model == VIT else f'_{model}'}{'' if device == 'cpu' else f'_{device}'}.json"


def shares(record: dict[str, Any], name: str, other: str) -> tuple[float, float]:
    """Compute a row's share of another one, in what is kept and in time."""
    kept, seconds = record["saved_bytes"], record["seconds"]
    return kept[name] / kept[other], seconds[name]["median"] / seconds[other]["median"]


def verdict(found: float, bar: float | None) -> str:
    """Write a share, with its bar where there is one."""
    return f"{found:.2f}" if bar is None else f"{found:.2f} (bar {bar:.2f}: {'met' if found <= bar else 'not met'})"


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    for model in (VIT, SWIN):
        if not path_of(model).is_file():
            yield f"{model}: not run yet (`python benchmarks/lora_step.py --model {model}`)"
            continue
        record = json.loads(path_of(model).read_text(encoding="utf-8"))
        how, seconds = record["arguments"], record["seconds"]
        yield f"{model}, {how['batch']} images, rank {how['rank']}, CPU, {how['threads']} threads, float32"
        yield ""
        yield "| | median s | of peft's | kept, MiB | of full |"
        yield "|---|--:|--:|--:|--:|"
        for name, title in ROWS.items():
            of_peft, of_full = shares(record, name, "peft")[1], shares(record, name, "full")[0]
            kept = record["saved_bytes"][name] / 2**20
            yield f"| {title} | {seconds[name]['median']:.3f} | {of_peft:.2f} | {kept:.0f} | {of_full:.2f} |"
        yield ""
        yield "| | compared with | kept | time of a step |"
        yield "|---|---|--:|--:|"
        for (name, other), bars in BARS[model].items():
            cells = [verdict(found, bar) for found, bar in zip(shares(record, name, other), bars, strict=True)]
            yield f"| {ROWS[name]} | {ROWS[other]} | {cells[0]} | {cells[1]} |"
        yield ""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=VIT)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines())
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(0, 100, (args.batch,), device=args.device)
    base = timm.create_model(args.model, num_classes=100)
    # Forward and backward through a frozen model with nothing added: no adapter on these layers can take less.
    floor = copy.deepcopy(base).requires_grad_(False)
    floor.patch_embed.proj.bias.requires_grad_(True)  # of ViT and Swin alike
    models = {"full": copy.deepcopy(base), "floor": floor}
    for dropout, ending in ((0.0, ""), (0.1, " dropout 0.1")):
        models[f"peft{ending}"] = with_peft(copy.deepcopy(base), args.rank, dropout)
        models[f"vispeft{ending}"] = with_ours(copy.deepcopy(base), args.rank, dropout)
    for memory in ("leaner", "plain"):
        models[f"vispeft {memory}"] = with_ours(copy.deepcopy(base), args.rank, 0.0, memory)
    for model in models.values():
        model.to(args.device).train()
        model.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    trained = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    saved = {name: saved_bytes(model, images) for name, model in models.items()}
    seconds = alternate({n: lambda m=m: step(m, images, labels) for n, m in models.items()}, args.rounds)
    ours_median = seconds["vispeft"]["median"]
    ratios = {f"to_{name}": ours_median / seconds[name]["median"] for name in ("peft", "full", "floor")}
    for name, other in (("floor", "peft"), ("full", "peft"), ("vispeft dropout 0.1", "peft dropout 0.1")):
        ratios[f"{name} to {other}".replace(" ", "_")] = seconds[name]["median"] / seconds[other]["median"]
    path = write(
        path_of(args.model, args.device).stem,
        {"arguments": vars(args), "trained": trained, "saved_bytes": saved, "seconds": seconds, "ratios": ratios},
    )
    table = Table(title=f"LoRA r={args.rank}, {args.model}, batch {args.batch}: one training step")
    for heading in ("", "median s", "min s", "max s", "activations MiB", "trained"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in seconds.items():
        cells = [f"{times[key]:.3f}" for key in ("median", "min", "max")]
        table.add_row(name, *cells, f"{saved[name] / 2**20:.1f}", f"{trained[name]:,}")
    Console().print(table)
    print("vispeft " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + f"; written to {path.name}")


if __name__ == "__main__":
    main()
