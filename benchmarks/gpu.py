"""Steps and memory on a GPU: each method beside full fine-tuning, Hugging Face peft and the floor, compiled or not.

    python benchmarks/gpu.py                          # needs a GPU; at most 6 minutes; writes results/gpu.json
    python benchmarks/gpu.py --device cpu --model vit_tiny_patch16_224 --batch 2 --rounds 1     # tries the script
    python benchmarks/gpu.py --table                  # writes the table into docs/benchmarks.md

Every registered method enters by itself; a backbone that it refuses is a row that says so. The floor is a frozen model
whose gradient goes back to its first layer, with nothing added. Computed under bfloat16 autocast with float32
parameters. Every row has the device to itself, is printed when it is there, and is kept in the file with those before
it; rows come in the order of what they decide, and none is begun when the minutes are over. Times are medians of steps
between device events; the host's time ends when a step returns. A step is also run while the device reports each
synchronisation. Figures of a CPU are shown and not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import RESULTS, write, write_section
from gpu_bars import bar_lines, judged
from torch import Tensor, nn
from torch.nn import functional as F

from vispeft.core.method import Method, registered_methods
from vispeft.errors import VispeftError, brief

CLASSES, WIDTH = 100, 128
TASKS = ["seg", "parts", "sal", "normals"]
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODELS = ("vit_large_patch16_224", "swin_base_patch4_window7_224")
FIELDS: dict[str, dict[str, Any]] = {"lora": {"rank": 8, "alpha": 8, "roles": LINEARS}}
"""Fields other than the defaults, so that LoRA adapts the same four layers in both libraries."""
NEEDS_MORE = ("peft",)
"""Registered methods that are another library's, which has a row of its own."""
REFERENCES = ("floor", "full", "peft lora")
FIRST = (*REFERENCES, "lora", "ssf", "vqt", "lst")
"""The variants that the bars compare, which come first."""
FOUR = "lora, four tasks"
"""One pass of LoRA for each of four tasks, beside MTLoRA's one pass for all."""


class Adapted(NamedTuple):
    """A model with its loss, and what compiles it."""

    loss: Callable[[Tensor], Tensor]
    """Computes the loss of images."""
    trained: list[nn.Parameter]
    compile: Callable[[str], str | None]
    """Compiles the blocks with a backend; returns why it cannot."""


# ------------------------------------------------------------------------------------------ what is measured


def class_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make the loss of the classification task."""

    def loss(images: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device) % CLASSES
        return F.cross_entropy(model(images).float(), labels)

    return loss


def map_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make a loss of the maps of all tasks."""

    def loss(images: Tensor) -> Tensor:
        maps = vispeft.forward_tasks(model, images)
        return torch.stack([level.float().square().mean() for levels in maps.values() for level in levels]).sum()

    return loss


def proxy_loss(model: Any, method: Method, device: str) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Make the loss of a method that brings a criterion, and list the parameters that belong to it."""
    head = nn.Linear(model.num_features, WIDTH, device=device)
    own = nn.Linear(model.num_features, WIDTH, device=device)
    made: Any = method.criterion(model, own, CLASSES, WIDTH)
    criterion = made.to(device)

    def loss(images: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device) // 2 % CLASSES
        embeddings = head(model.forward_head(model.forward_features(images), pre_logits=True).float())
        found: Tensor = criterion(embeddings, labels, images)
        return found

    return loss, [*head.parameters(), *criterion.parameters()]


def compile_each(blocks: list[nn.Module], backend: str) -> None:
    """Compile blocks in place, as `AdapterBank.compile` does where no adapter is."""
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)


def blocks_of(model: Any) -> list[nn.Module]:
    """List the blocks of a ViT or a Swin."""
    stages = [model] if hasattr(model, "blocks") else model.layers
    return [block for stage in stages for block in stage.blocks]


def reference(name: str, model: Any) -> Adapted:
    """Prepare what the methods are compared with."""
    blocks, run = blocks_of(model), model
    if name == "floor":
        model.requires_grad_(False)
        model.patch_embed.proj.bias.requires_grad_(True)  # of ViT and Swin alike
    elif name == "peft lora":
        from peft import LoraConfig, get_peft_model

        pattern = f".*({'|'.join(role.replace('.', '[.]') for role in LINEARS)})$"
        options: Any = {
            "target_modules": pattern,
            "modules_to_save": ["head.fc" if hasattr(model, "layers") else "head"],
        }
        run = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, **options))
    trained = [p for p in run.parameters() if p.requires_grad]
    return Adapted(class_loss(run), trained, lambda backend: compile_each(blocks, backend))


def adapted(name: str, model: Any, device: str) -> Adapted:
    """Adapt with a method of this project, by its name in the registry."""
    four = name == FOUR
    method = vispeft.method("lora" if four else name, **FIELDS.get("lora" if four else name, {}))
    bank = vispeft.attach(model, method, tasks=TASKS if four or method.one_pass else None, verify=False)
    trained = [p for _, p in bank.trainable_parameters()]
    loss = map_loss(model) if four or method.one_pass else class_loss(model)
    if type(method).criterion is not Method.criterion:
        loss, more = proxy_loss(model, method, device)
        trained += more
    return Adapted(loss, trained, lambda backend: bank.compile("blocks", backend=backend))


def variants() -> list[str]:
    """List what is compared: those of the bars first, then every other registered method."""
    names = sorted(cls.name for cls in registered_methods() if cls.name not in NEEDS_MORE)
    return [*FIRST, *(name for name in names if name not in FIRST), FOUR]


def make_model(name: str, size: int | None, device: str) -> nn.Module:
    """Make a backbone with random weights on the device."""
    sized = {"img_size": size} if size else {}
    with torch.device(device):
        return timm.create_model(name, num_classes=CLASSES, **sized)


class Case:
    """One variant, ready to take steps."""

    def __init__(self, name: str, model: str, compiled: bool, args: argparse.Namespace) -> None:
        """Build the model and its optimiser on the device.

        Args:
            name: One of `variants`.
            model: Name of the backbone.
            compiled: Whether its blocks are compiled.
            args: Names batch, size, device and backend.

        Raises:
            VispeftError: If the method refuses the backbone, or it cannot be compiled.
        """
        torch.manual_seed(0)
        if compiled:
            torch.compiler.reset()
        base: Any = make_model(model, args.size, args.device).train()
        side = args.size or base.pretrained_cfg["input_size"][-1]
        self.images = torch.randn(args.batch, 3, side, side, device=args.device)
        self.device = args.device
        made = reference(name, base) if name in REFERENCES else adapted(name, base, args.device)
        base.to(args.device).train()
        self.loss, self.trained = made.loss, sum(p.numel() for p in made.trained)
        reason = made.compile(args.backend) if compiled else None
        if reason is not None:
            raise VispeftError(reason)
        self.optimizer = torch.optim.AdamW(made.trained, 1e-4, fused=args.device == "cuda")

    def step(self) -> None:
        """Run forward, backward and an update; the device may still be computing."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(self.images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def times(self, rounds: int) -> tuple[list[float], list[float]]:
        """Take steps.

        Returns:
            Seconds of each, by the device's events where it has them; and seconds until each returned.
        """
        gpu, host, marks = self.device == "cuda", [], []
        for _ in range(rounds):
            marks.append(_mark(gpu))
            start = time.perf_counter()
            self.step()
            host.append(time.perf_counter() - start)
            marks.append(_mark(gpu))
        self.wait()
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        return [a.elapsed_time(b) / 1000 if gpu else b - a for a, b in pairs], host

    def waits(self) -> int | None:
        """Count how often the host waits for the device in a step; None on a CPU."""
        if self.device != "cuda":
            return None
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)


def _mark(gpu: bool) -> Any:
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(name: str, model: str, compiled: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row, with nothing else on the device.

    Args:
        name: One of `variants`.
        model: Name of the backbone.
        compiled: Whether its blocks are compiled.
        args: The command line.

    Returns:
        Its figures, or under ``says`` why there are none.
    """
    gpu, began = args.device == "cuda", time.perf_counter()
    try:
        case = Case(name, model, compiled, args)
        started = time.perf_counter()
        case.step()  # compiles, and makes the optimiser's state
        case.wait()
        first = time.perf_counter() - started
        case.step()
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds, host = case.times(args.rounds)
        peak, waits = torch.cuda.max_memory_allocated() if gpu else None, case.waits()
    except VispeftError as error:
        return {"says": brief(error, 160)}
    except Exception as error:  # the other rows are measured nevertheless
        traceback.print_exc()
        return {"says": f"failed: {brief(error, 160)}", "failed": True}
    found = {"trained": case.trained, "seconds": statistics.median(seconds), "host_seconds": statistics.median(host)}
    return {**found, "first_seconds": first, "peak_bytes": peak, "waits": waits, "took": time.perf_counter() - began}


def order(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Order the rows: what bars compare on all models, eager and compiled, then the others likewise.

    Yields:
        Model, mode and variant.
    """
    for first in (True, False):
        for model in args.model:
            for mode in args.compile:
                for name in args.variants:
                    if (name in FIRST) == first:
                        yield model, mode, name


def product_rate(device: str) -> float | None:
    """Measure the operations per second of a large bfloat16 product; None on a CPU."""
    if device != "cuda":
        return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    marks = []
    for _ in range(12):
        marks.append(_mark(True))
        a @ a
    marks.append(_mark(True))
    torch.cuda.synchronize()
    return 2 * 8192**3 / min(x.elapsed_time(y) / 1000 for x, y in pairwise(marks))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows within the minutes.

    Args:
        args: The command line.

    Returns:
        The record, as it is written.
    """
    began, figures = time.perf_counter(), {model: {mode: {} for mode in args.compile} for model in args.model}
    record: dict[str, Any] = {"arguments": vars(args), "rate": product_rate(args.device), "figures": figures}
    for model, mode, name in order(args):
        if time.perf_counter() - began > 60 * args.minutes:
            figures[model][mode][name] = {"says": "not measured: the minutes were over"}
            continue
        found = figures[model][mode][name] = measure(name, model, mode == "on", args)
        print(f"{model}, {'compiled' if mode == 'on' else 'eager'}: {row_text(name, found)}", flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
            write("gpu", record)
    record["bars"] = judged(record)
    return record


# -------------------------------------------------------------------------------------------------- the table


def row_text(name: str, found: dict[str, Any]) -> str:
    """Write one row for the terminal."""
    if "says" in found:
        return f"{name}: {found['says']}"
    peak = f", peak {found['peak_bytes'] / 2**20:,.0f} MiB" if found["peak_bytes"] else ""
    waits = "" if found["waits"] is None else f", waits {found['waits']}"
    times = f"step {1000 * found['seconds']:.1f} ms, host {1000 * found['host_seconds']:.1f} ms"
    return f"{name}: {times}{peak}, first step {found['first_seconds']:.1f} s{waits}"


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
    where = f"{record['machine']['gpu']}, torch {record['versions']['torch']}"
    yield f"{where}, {record['arguments']['batch']} images in a batch."
    for model, modes in record["figures"].items():
        for mode, figures in modes.items():
            yield from ("", f"**`{model}`, {'blocks compiled' if mode == 'on' else 'eager'}**", "")
            yield from figure_lines(figures)
    yield from ("", *bar_lines(record.get("bars", [])))


def figure_lines(figures: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Make a table of the figures of all variants.

    Args:
        figures: By variant.

    Yields:
        Lines of Markdown.
    """
    yield "| variant | trained | step ms | of full | host ms | peak MiB | of full | first step s | waits |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    whole = figures.get("full", {})
    for name, found in figures.items():
        if "says" in found:
            yield f"| {name} | {found['says'].replace('|', '/')} |" + " |" * 7
            continue
        shares = [
            f"{found[key] / whole[key]:.2f}" if found.get(key) and whole.get(key) else "-"
            for key in ("seconds", "peak_bytes")
        ]
        peak = f"{found['peak_bytes'] / 2**20:,.0f}" if found["peak_bytes"] else "-"
        times = [f"{1000 * found[key]:.1f}" for key in ("seconds", "host_seconds")]
        cells = [
            f"{found['trained']:,}",
            times[0],
            shares[0],
            times[1],
            peak,
            shares[1],
            f"{found['first_seconds']:.1f}",
        ]
        yield f"| {name} | {' | '.join(cells)} | {'-' if found['waits'] is None else found['waits']} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--size", type=int, help="height and width of images; default: the model's own")
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of a row; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=5.5, help="no row is begun later; default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=variants(), default=variants())
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--backend", default="inductor", help="compiler; default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only write the table into docs/benchmarks.md")
    args = parser.parse_args()
    if args.table:
        write_section("gpu", table_lines())
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No GPU was found, so there is nothing to measure. --device cpu tries the script without one.")
    record = run(args)
    print("\n".join(bar_lines(record["bars"])))
    if args.device == "cuda":
        print(f"Written to {write('gpu', record)}")


if __name__ == "__main__":
    main()
