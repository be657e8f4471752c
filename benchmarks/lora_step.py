"""One training step of LoRA on all four linear layers: vispeft, Hugging Face peft, and full fine-tuning, side by side.

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --table          # writes the table in docs/benchmarks.md

Writes results/lora_step.json: medians of alternating runs in one process, and their ratios. The floor is a frozen model
without any adapter, whose gradient goes back to the first layer. Both kinds of LoRA are measured with dropout 0.1 too.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import RESULTS, alternate, saved_bytes, write, write_section
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

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


def with_ours(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    """Add LoRA with vispeft."""
    vispeft.attach(model, vispeft.LoRA(rank=rank, alpha=rank, dropout=dropout, roles=ROLES))
    return model


ROWS = {
    "peft": "LoRA of Hugging Face peft",
    "vispeft": "LoRA of vispeft",
    "peft dropout 0.1": "LoRA of Hugging Face peft, dropout 0.1",
    "vispeft dropout 0.1": "LoRA of vispeft, dropout 0.1",
    "full": "full fine-tuning",
    "floor": "frozen, gradient back to the first layer, nothing added",
}
BARS = {"peft": 0.72, "full": 0.85}
"""Largest share of each that a step of vispeft's LoRA without dropout should take."""


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    record = json.loads((RESULTS / "lora_step.json").read_text(encoding="utf-8"))
    how, seconds = record["arguments"], record["seconds"]
    ours = seconds["vispeft"]["median"]
    yield f"{how['model']}, {how['batch']} images, rank {how['rank']}, CPU, {how['threads']} threads, float32"
    yield ""
    yield "| | median s | kept, MiB | vispeft without dropout takes |"
    yield "|---|--:|--:|--:|"
    for name, title in ROWS.items():
        ratio = f"{ours / seconds[name]['median']:.2f} of it" if name != "vispeft" else ""
        if name in BARS:
            met = "met" if ours / seconds[name]["median"] <= BARS[name] else "not met"
            ratio += f" (bar {BARS[name]:.2f}: {met})"
        yield f"| {title} | {seconds[name]['median']:.3f} | {record['saved_bytes'][name] / 2**20:.0f} | {ratio} |"
    both = seconds["vispeft dropout 0.1"]["median"] / seconds["peft dropout 0.1"]["median"]
    yield ""
    yield f"With dropout 0.1 on both sides a step of vispeft takes {both:.2f} of peft's."
    yield ""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section("lora_step", table_lines())
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(0, 100, (args.batch,), device=args.device)
    base = timm.create_model(args.model, num_classes=100)
    # Forward and backward through a frozen model with nothing added: no adapter on these layers can take less.
    floor = copy.deepcopy(base).requires_grad_(False)
    floor.patch_embed.proj.bias.requires_grad_(True)
    models = {"full": copy.deepcopy(base), "floor": floor}
    for dropout, ending in ((0.0, ""), (0.1, " dropout 0.1")):
        models[f"peft{ending}"] = with_peft(copy.deepcopy(base), args.rank, dropout)
        models[f"vispeft{ending}"] = with_ours(copy.deepcopy(base), args.rank, dropout)
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
        "lora_step" if args.device == "cpu" else f"lora_step_{args.device}",
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
