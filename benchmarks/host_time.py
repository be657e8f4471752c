"""The time that Python and the dispatcher take of a training step: every method on a network too narrow for arithmetic.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --busy           # on a machine that does other work
    python benchmarks/host_time.py --profile lora   # the functions one method spends its time in; writes nothing
    python benchmarks/host_time.py --table          # writes the table in docs/benchmarks.md

A ViT of 24 blocks, 32 wide, with 5 tokens and one image, on one thread. A step is forward, loss, backward and the
optimiser's `zero_grad(set_to_none=True)`. Writes results/host_time.json: medians of alternating runs in one process,
with bfloat16 autocast and in float32. The floor is a frozen model without any adapter, whose gradient goes back to the
first layer.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import torch  # isort: skip
from common import RESULTS, alternate, write, write_section
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import nn

NAME = "host_time"
DEPTH, WIDTH, SIZE, PATCH, RANK = 24, 32, 16, 8, 8
TARGETS = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$"
ROLES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
FLOOR, PEFT = "floor", "peft"
TITLES = {
    FLOOR: "frozen, gradient back to the first layer, nothing added",
    "full": "full fine-tuning",
    PEFT: "LoRA of Hugging Face peft, all linear layers",
    "lora": "LoRA, all linear layers",
}
"""Rows with a title of their own; the others are methods with their defaults."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": RANK, "alpha": RANK, "roles": ROLES},
    "ssf": {},
    "vqt": {},
    "adaptformer": {},
    "vpt": {},
    "lst": {},
    "linear_probe": {},
}
"""The measured methods, and the fields in which they differ from their defaults."""
MODES = {"autocast": True, "float32": False}
BARS: dict[str, dict[tuple[str, str], float]] = {
    "autocast": {
        ("lora", PEFT): 0.70,
        ("lora", FLOOR): 1.7,
        ("ssf", FLOOR): 1.5,
        ("vqt", FLOOR): 1.0,
        ("adaptformer", FLOOR): 1.3,
    },
    "float32": {("lora", PEFT): 0.80},
}
"""Largest share of a step of another row, by mode."""


def base() -> nn.Module:
    """Make the network, the same one at every call."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=10
    ).train()


def network(name: str) -> nn.Module:
    """Make the network of a row."""
    model = base()
    if name == FLOOR:
        model.requires_grad_(False).patch_embed.proj.bias.requires_grad_(True)
    elif name == PEFT:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, modules_to_save=["head"])
        return get_peft_model(model, config).train()
    elif name in METHODS:
        vispeft.attach(model, vispeft.method(name, **METHODS[name]))
    return model.train()


@dataclass
class Step:
    """One training step of a row: forward, loss, backward, and `zero_grad` of an optimiser."""

    model: nn.Module
    autocast: bool

    def __post_init__(self) -> None:
        """Make the optimiser of all that trains, the image and its label."""
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad])
        self.images, self.labels = torch.randn(1, 3, SIZE, SIZE), torch.tensor([1])

    def __call__(self) -> None:
        """Run it."""
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss = nn.functional.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)


def measured(rounds: int, clock: Callable[[], float], chosen: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure all rows in all modes.

    Args:
        rounds: Counted steps of each row.
        clock: Tells the seconds.
        chosen: The rows.

    Returns:
        Median, minimum and maximum seconds by row and mode.
    """
    models = {name: network(name) for name in chosen}
    return {
        mode: alternate({name: Step(model, autocast) for name, model in models.items()}, rounds, 3, clock)
        for mode, autocast in MODES.items()
    }


def ratio(seconds: dict[str, dict[str, float]], name: str, other: str) -> float:
    """Divide the median step of one row by that of another."""
    return seconds[name]["median"] / seconds[other]["median"]


def cell(mode: str, seconds: dict[str, dict[str, float]], name: str, other: str) -> str:
    """Write a ratio, with its bar where there is one."""
    found, bar = ratio(seconds, name, other), BARS[mode].get((name, other))
    if bar is None:
        return f"{found:.2f}"
    return f"{found:.2f} (bar {bar:.2f}: {'met' if found <= bar else 'not met'})"


HEADINGS = ("", "step, ms", "of the floor", "of peft")


def rows(mode: str, seconds: dict[str, dict[str, float]]) -> Iterator[tuple[str, ...]]:
    """Make the rows of a table."""
    for name, times in seconds.items():
        others = (cell(mode, seconds, name, other) if other in seconds else "" for other in (FLOOR, PEFT))
        yield TITLES.get(name, f"`{name}`"), f"{1e3 * times['median']:.1f}", *others


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    record = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    clock = "CPU time of the process" if record["arguments"]["busy"] else "time on the wall"
    yield f"ViT of {DEPTH} blocks, {WIDTH} wide, 5 tokens, one image, one thread ({clock})"
    for mode, seconds in record["seconds"].items():
        yield ""
        yield f"**{mode}**"
        yield ""
        yield "| " + " | ".join(HEADINGS) + " |"
        yield "|---|--:|--:|--:|"
        yield from ("| " + " | ".join(row) + " |" for row in rows(mode, seconds))
    yield ""


def profile(name: str, autocast: bool, count: int) -> None:
    """Print the functions in which the steps of one row spend their time."""
    run = Step(network(name), autocast)
    for _ in range(5):
        run()
    with cProfile.Profile() as found:
        for _ in range(count):
            run()
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [FLOOR, "full", PEFT, *METHODS]
    parser.add_argument("--rows", nargs="+", choices=known, default=known, help="all of them by default")
    parser.add_argument("--rounds", type=int, default=60, help="counted steps of each row")
    parser.add_argument("--busy", action="store_true", help="count the seconds this process computes")
    parser.add_argument("--profile", choices=known, help="profile one row and stop")
    parser.add_argument("--float32", action="store_true", help="profile without autocast")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        write_section(NAME, table_lines())
        return
    if args.profile:
        profile(args.profile, not args.float32, args.rounds)
        return
    clock = time.process_time if args.busy else time.perf_counter
    found = measured(args.rounds, clock, args.rows)
    for mode, seconds in found.items():
        table = Table(title=f"{mode}: one training step")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows(mode, seconds):
            table.add_row(*row)
        Console().print(table)
    if args.rows == known:
        path = write(NAME, {"arguments": vars(args), "seconds": found})
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
