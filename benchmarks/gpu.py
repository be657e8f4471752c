"""Steps and memory on a GPU: every task, each method beside full fine-tuning and Hugging Face peft, compiled or not.

    python benchmarks/gpu.py                                     # needs a GPU; writes results/gpu.json
    python benchmarks/gpu.py --model vit_large_patch16_224 --batch 128
    python benchmarks/gpu.py --device cpu --model vit_tiny_patch16_224 --batch 2 --rounds 1     # tries the script
    python benchmarks/gpu.py --table                             # writes the table into docs/benchmarks.md

Everything is computed under bfloat16 autocast with float32 parameters. Peak memory is measured with one model on the
device at a time; step times are medians of alternating runs, each waited for. Figures of a CPU are shown and not
kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import RESULTS, alternate, write, write_section
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 100
PEFT_TARGETS = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$"


# ------------------------------------------------------------------------------------------ what is measured


def classification_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Compute a loss as the classification task does.

    Args:
        model: An adapted model with a classifier.
        images: (B, 3, H, W).
    """
    labels = torch.arange(len(images), device=images.device) % CLASSES
    return F.cross_entropy(model(images).float(), labels)


TASKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"classification": classification_loss}
"""Per task, the loss of one step; a new task adds one line."""


def full(model: nn.Module) -> nn.Module:
    """Train every parameter of plain timm."""
    return model


def peft_lora(model: nn.Module) -> nn.Module:
    """Adapt with Hugging Face peft."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=PEFT_TARGETS, modules_to_save=["head"])
    return get_peft_model(model, config)


def ours(name: str, **fields: Any) -> Callable[[nn.Module], nn.Module]:
    """Make the function that adapts with a method of this project."""

    def adapt(model: nn.Module) -> nn.Module:
        vispeft.attach(model, vispeft.method(name, **fields))
        return model

    return adapt


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": full,
    "peft lora": peft_lora,
    "lora": ours("lora", rank=8, alpha=8, roles=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "ssf": ours("ssf"),
    "vpt": ours("vpt", deep=True),
    "linear_probe": ours("linear_probe"),
}
"""What is compared, in the order of the table; LoRA adapts the same four layers in both libraries."""


class Case:
    """One variant, ready to take steps."""

    def __init__(self, name: str, task: str, compiled: bool, args: argparse.Namespace) -> None:
        """Build the model and its optimiser on the device.

        Args:
            name: A key of `VARIANTS`.
            task: A key of `TASKS`.
            compiled: Whether the model goes through torch.compile.
            args: Names model, batch, size and device.
        """
        torch.manual_seed(0)
        sized = {"img_size": args.size} if args.size else {}
        model = VARIANTS[name](timm.create_model(args.model, num_classes=CLASSES, **sized)).to(args.device).train()
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        self.model = torch.compile(model) if compiled else model
        self.loss, self.device = TASKS[task], args.device
        side = args.size or model.pretrained_cfg["input_size"][-1]
        self.images = torch.randn(args.batch, 3, side, side, device=args.device)

    def step(self) -> None:
        """Run forward, backward and an update, and wait for the device."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(self.model, self.images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()


def peak_memory(name: str, task: str, compiled: bool, args: argparse.Namespace) -> int | None:
    """Measure the most memory a step takes, with nothing else on the device.

    Args:
        name: A key of `VARIANTS`.
        task: A key of `TASKS`.
        compiled: Whether the model goes through torch.compile.
        args: Names model, batch, size and device.

    Returns:
        Bytes; None on a CPU.
    """
    if args.device != "cuda":
        return None
    torch.compiler.reset()
    torch.cuda.empty_cache()
    case = Case(name, task, compiled, args)
    case.step()  # compiles, and makes the optimiser's state
    torch.cuda.reset_peak_memory_stats()
    case.step()
    return torch.cuda.max_memory_allocated()


def measure(task: str, compiled: bool, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure all variants.

    Args:
        task: A key of `TASKS`.
        compiled: Whether models go through torch.compile.
        args: The command line.

    Returns:
        Figures by variant.
    """
    peaks = {name: peak_memory(name, task, compiled, args) for name in args.variants}
    torch.compiler.reset()
    cases = {name: Case(name, task, compiled, args) for name in args.variants}
    seconds = alternate({name: case.step for name, case in cases.items()}, args.rounds)
    return {
        name: {"trained": case.trained, "peak_bytes": peaks[name], "seconds": seconds[name]}
        for name, case in cases.items()
    }


# -------------------------------------------------------------------------------------------------- the table


def table_lines() -> Iterator[str]:
    """Make the section of the page out of what is on disk.

    Yields:
        Lines of Markdown.
    """
    path = RESULTS / "gpu.json"
    if not path.is_file():
        yield "No figures exist yet: `python benchmarks/gpu.py` has not been run on a machine with a GPU."
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    chosen = record["arguments"]
    where = f"{record['machine']['gpu']}, torch {record['versions']['torch']}"
    yield f"{where}, `{chosen['model']}`, {chosen['batch']} images in a batch."
    for title, figures in record["figures"].items():
        yield from ("", f"**{title}**", "", *figure_lines(figures))


def figure_lines(figures: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Make a table of the figures of all variants.

    Args:
        figures: By variant.

    Yields:
        Lines of Markdown.
    """
    yield "| variant | trained | peak MiB | step ms | step of full |"
    yield "|---|--:|--:|--:|--:|"
    whole = figures.get("full", {}).get("seconds", {}).get("median")
    for name, found in figures.items():
        median, peak = found["seconds"]["median"], found["peak_bytes"]
        share = f"{median / whole:.2f}" if whole else ""
        shown = f"{peak / 2**20:,.0f}" if peak else "-"
        yield f"| {name} | {found['trained']:,} | {shown} | {1000 * median:.1f} | {share} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--size", type=int, help="height and width of images; default: the model's own")
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds; default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only write the table into docs/benchmarks.md")
    args = parser.parse_args()
    if args.table:
        write_section("gpu", table_lines())
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No GPU was found, so there is nothing to measure. --device cpu tries the script without one.")
    figures = {}
    for task in args.tasks:
        for mode in args.compile:
            title = f"{task}, {'compiled' if mode == 'on' else 'not compiled'}"
            figures[title] = measure(task, mode == "on", args)
            print("\n".join([title, *figure_lines(figures[title])]), flush=True)
    if args.device == "cuda":
        print(f"Written to {write('gpu', {'arguments': vars(args), 'figures': figures})}")


if __name__ == "__main__":
    main()
