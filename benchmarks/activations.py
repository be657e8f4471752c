"""What every method keeps for the backward pass, and what one training step takes, against full fine-tuning.

    python benchmarks/activations.py                  # all methods on the narrow network; a few minutes
    python benchmarks/activations.py --network vit_s  # the same on a ViT-S/16
    python benchmarks/activations.py --methods ssf lst        # these alone are in the file then
    python benchmarks/activations.py --rounds 0 --methods fact   # renews what is kept; other rows and all times stay
    python benchmarks/activations.py --busy --threads 1       # on a machine that does other work
    python benchmarks/activations.py --table          # writes the table in docs/benchmarks.md

Writes results/activations_<network>.json. Activations are the bytes of distinct storages kept for the backward pass,
without parameters and input; full fine-tuning is plain timm with fused attention, float32, all of it trained, on the
same input. Times are medians of alternating steps in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import torch  # isort: skip
from common import RESULTS, alternate, saved_bytes, write, write_section
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vispeft.errors import VispeftError

NAME = "activations"
FULL = "full fine-tuning"
DEPTH, SIZE = 12, 224


@dataclass(frozen=True)
class Network:
    """A ViT with patches of 16 pixels, what it is given, and what is promised for it."""

    width: int
    """Its width; heads are 64 wide."""
    batch: int
    """Number of images."""
    bars: dict[str, tuple[float | None, float | None]]
    """Largest share of full fine-tuning in what is kept and in the time of a step, where one is stated."""


NETWORKS = {
    "narrow": Network(192, 4, {"vqt": (0.10, 0.45), "ssf": (0.80, None), "lst": (0.30, None)}),
    "vit_s": Network(384, 8, {"lst": (None, 0.50)}),
}
FIELDS: dict[str, dict[str, Any]] = {"vqt": {"num_queries": 1}}
"""Fields that differ from a method's defaults."""


def plain(network: Network) -> nn.Module:
    """Make the model, the same one at every call."""
    torch.manual_seed(0)
    heads = network.width // 64
    return VisionTransformer(img_size=SIZE, embed_dim=network.width, depth=DEPTH, num_heads=heads, num_classes=100)


def adapted(network: Network, name: str) -> tuple[nn.Module, vispeft.AdapterBank]:
    """Put a method on the model, with its own defaults.

    Args:
        network: The model's size.
        name: The method.

    Returns:
        The model and its bank.
    """
    model = plain(network)
    return model, vispeft.attach(model, vispeft.method(name, **FIELDS.get(name, {})))


def step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Run forward, backward and one update."""
    nn.functional.cross_entropy(model(images), labels).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def measure(
    network: Network, names: list[str], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Measure methods side by side.

    Args:
        network: The model's size.
        names: The methods.
        rounds: Counted steps of each.
        clock: Tells the seconds.

    Returns:
        Figures by method, full fine-tuning among them, and the reasons why others are left out.
    """
    images, labels = torch.randn(network.batch, 3, SIZE, SIZE), torch.randint(0, 100, (network.batch,))
    models, left_out = {FULL: plain(network)}, {}
    figures: dict[str, dict[str, Any]] = {FULL: {"trained": sum(p.numel() for p in models[FULL].parameters())}}
    for name in names:
        try:
            models[name], bank = adapted(network, name)
        except (VispeftError, TypeError) as error:
            left_out[name] = str(error)
            continue
        plan = bank.plan()
        figures[name] = {"trained": bank.report().trainable, "fields": plan.method.to_dict()["fields"]}
    steps = {}
    for name, model in models.items():
        model.train()
        figures[name]["saved_bytes"] = saved_bytes(model, images)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        steps[name] = lambda m=model, o=optimiser: step(m, o, images, labels)
    for name, seconds in (alternate(steps, rounds, clock=clock) if rounds else {}).items():
        figures[name]["seconds"] = seconds
    return figures, left_out


def share(figures: dict[str, dict[str, Any]], name: str) -> tuple[float, float | None]:
    """Compute a method's share of full fine-tuning, in activations and in time."""
    own, full = figures[name], figures[FULL]
    time = own["seconds"]["median"] / full["seconds"]["median"] if "seconds" in own else None
    return own["saved_bytes"] / full["saved_bytes"], time


def missed(network: Network, figures: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say which bars are missed."""
    for name in network.bars.keys() & figures.keys():
        for what, found, bar in zip(
            ("activations", "time of a step"), share(figures, name), network.bars[name], strict=True
        ):
            if bar is not None and found is not None and found > bar:
                yield f"{name}: {what} {found:.3f} of full fine-tuning; the bar is {bar:.2f}"


def rows(network: Network, figures: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Make the rows of the table, least memory first."""
    for name in sorted(figures, key=lambda name: figures[name]["saved_bytes"]):
        kept, time = share(figures, name)
        bar = network.bars.get(name, (None, None))
        cells = [
            "not measured" if found is None else f"{found:.3f}" + ("" if limit is None else f" (bar {limit:.2f})")
            for found, limit in ((kept, bar[0]), (time, bar[1]))
        ]
        yield name, f"{figures[name]['trained']:,}", f"{figures[name]['saved_bytes'] / 2**20:.1f}", *cells


def renewed(earlier: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Put what is kept for the backward pass into an earlier record, whose other rows and times stay.

    Args:
        earlier: The record with times.
        record: One without.

    Returns:
        A record that says which command each renewed row comes from.
    """
    figures = {name: {**earlier["figures"].get(name, {}), **found} for name, found in record["figures"].items()}
    left_out = {name: reason for name, reason in earlier["left_out"].items() if name not in figures}
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        **earlier,
        "figures": {**earlier["figures"], **figures},
        "left_out": {**left_out, **record["left_out"]},
        "renewed": {**earlier.get("renewed", {}), **dict.fromkeys(figures, command)},
    }


HEADINGS = ("method", "trained", "kept, MiB", "of full fine-tuning", "time of a step, of full fine-tuning")


def path_of(network: str) -> Path:
    """Give the file of a network's results."""
    return RESULTS / f"{NAME}_{network}.json"


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    for name, network in NETWORKS.items():
        if not path_of(name).is_file():
            continue
        record = json.loads(path_of(name).read_text())
        how = record["arguments"]
        clock = "CPU seconds of the process" if how["busy"] else "seconds on the wall"
        yield f"**{title(network)}** ({clock}, {how['threads']} thread(s), {how['rounds']} steps of each)"
        yield ""
        yield "| " + " | ".join(HEADINGS) + " |"
        yield "|---|--:|--:|--:|--:|"
        yield from ("| " + " | ".join(row) + " |" for row in rows(network, record["figures"]))
        yield ""
        yield from (f"Left out: {method} ({reason})" for method, reason in record["left_out"].items())


def title(network: Network) -> str:
    """Say what is measured."""
    return f"ViT {network.width} wide, {DEPTH} deep, {SIZE} px, {network.batch} images"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="narrow")
    parser.add_argument("--methods", nargs="+", default=vispeft.list_methods(), help="all of them by default")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each method; 0 measures memory alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="count the seconds this process computes, of all threads")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines())
        return
    torch.set_num_threads(args.threads)
    network = NETWORKS[args.network]
    clock = time.process_time if args.busy else time.perf_counter
    figures, left_out = measure(network, args.methods, args.rounds, clock)
    record: dict[str, Any] = {
        "network": {"width": network.width, "depth": DEPTH, "image_size": SIZE, "batch": network.batch},
        "arguments": vars(args),
        "figures": figures,
        "left_out": left_out,
    }
    path = path_of(args.network)
    if not args.rounds and path.is_file():
        record = renewed(json.loads(path.read_text()), record)
    write(path.stem, record)
    table = Table(title=title(network))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows(network, record["figures"]):
        table.add_row(*row)
    Console().print(table)
    print(f"written to {path.name}")
    for line in missed(network, figures):
        print(f"BAR MISSED: {line}")


if __name__ == "__main__":
    main()
