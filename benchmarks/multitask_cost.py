"""Cost of four dense tasks on one backbone with MTLoRA: multiply-accumulates, and seconds beside single-task models.

    python benchmarks/multitask_cost.py              # Swin-T, 448 pixels, four PASCAL tasks; 2 minutes of one core
    python benchmarks/multitask_cost.py --steps      # training steps at 224 pixels; a minute of one core
    python benchmarks/multitask_cost.py --steps --compile     # with compiled blocks too; several minutes
    python benchmarks/multitask_cost.py --table      # writes the table into docs/multitask.md

Writes results/multitask_cost.json, and with ``--steps`` results/multitask_steps.json: MTLoRA's forward and backward
pass for the maps of all tasks, without decoders, beside a pass of LoRA on all linear layers for each task. Otherwise
every model reads the same maps, those behind patch merging, and has an HRNet decoder per task. The weights are random:
neither figure depends on them. Multiply-accumulates are those of one image in matrix products, convolutions and
attention, counted by torch's `FlopCounterMode`, which learns two operations here that it does not know. Seconds are of
the process (CPU time) with one thread, the models in turn: the best of several rounds, of steps the median.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import RESULTS, alternate, saved_bytes, write, write_section
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vispeft.adapters.compiling import Compile
from vispeft.adapters.task_maps import map_shapes
from vispeft.core.origin import Memory
from vispeft.heads import decoder as make_decoder
from vispeft.hosts import low_rank

TASKS = {"semseg": 21, "human_parts": 7, "sal": 1, "normals": 3}
"""The tasks of PASCAL-Context, and the scores per pixel of each."""
MOST_MACS, MOST_SECONDS = 1.6, 0.45
"""Largest share that four tasks may take: of the plain backbone's multiply-accumulates, decoders included; and of the
seconds of four single-task models."""
MOST_STEP, MOST_COMPILED = 0.60, 1.0
"""Largest shares that MTLoRA's training step may take: of four steps of LoRA; and compiled, of itself."""
COMPILED, COMPILED_PLAIN = " compiled", " compiled, plain"
MODES: dict[str, tuple[Compile, Memory]] = {
    "": ("off", "lean"),
    COMPILED: ("blocks", "lean"),
    COMPILED_PLAIN: ("blocks", "plain"),
}
"""What is compiled and kept, by the end of a step's name."""
NAMES = {
    "backbone": "plain backbone",
    "unmerged": "MTLoRA, terms as products of their own",
    "running": "MTLoRA",
    "merged": "MTLoRA, shared terms merged",
    "single": "four single-task models",
}


def counted(run: Callable[[], Any]) -> float:
    """Count the multiply-accumulates of a function."""
    formulas = {
        # The linear layer of oneDNN, which adapted layers call: x (rows, in), weight (out, in).
        torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, out_shape=None: 2 * x[0] * x[1] * weight[0],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
            sdpa_flop_count(q, k, v)
        ),
    }
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops() / 2


def plain_maps(model: Any, images: Tensor) -> list[Tensor]:
    """Run a Swin by timm's own modules; the maps are those behind patch merging, as MTLoRA's decoders read them."""
    x, entries = model.patch_embed(images), []
    for stage in model.layers:
        x = stage.downsample(x)
        entries.append(x)
        x = stage.blocks(x)
    return [level.permute(0, 3, 1, 2).contiguous() for level in (*entries[1:], x)]


def swin(size: int) -> nn.Module:
    """Make the backbone."""
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=size, window_size=7).eval()


def models(size: int, rank: int) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]]:
    """Make what is measured, by name: functions of the images without and with decoders."""
    plain, adapted, merged = swin(size), swin(size), swin(size)
    for model in (adapted, merged):
        torch.manual_seed(0)
        bank = vispeft.attach(model, vispeft.MTLoRA(rank=rank), tasks=list(TASKS), verify=False)
        with torch.no_grad():  # both factors other than zero, as after training
            for tensor in bank.named_tensors().values():
                tensor.add_(0.01 * torch.randn_like(tensor))
    bank.merge(partial=True)
    decoders = nn.ModuleDict({t: make_decoder("hrnet", map_shapes(adapted)[0], k) for t, k in TASKS.items()}).eval()

    def decoded(maps: dict[str, list[Tensor]]) -> list[Tensor]:
        return [decoders[task](levels) for task, levels in maps.items()]

    def alone(images: Tensor) -> list[Tensor]:
        return [decoders[task](plain_maps(plain, images)) for task in TASKS]

    def both(maps_of: Callable[[Tensor], dict[str, list[Tensor]]]) -> Any:
        return maps_of, lambda images: decoded(maps_of(images))

    ours = both(lambda images: vispeft.forward_tasks(adapted, images))
    return {
        "backbone": both(lambda images: dict.fromkeys(TASKS, plain_maps(plain, images))),
        "unmerged": ours,
        "running": ours,
        "merged": both(lambda images: vispeft.forward_tasks(merged, images)),
        "single": (lambda images: [plain_maps(plain, images) for _ in TASKS], alone),
    }


def written_out() -> AbstractContextManager[Any]:
    """Let adapted layers add their low-rank terms to each row, as the public code does, and not to their weights."""
    return mock.patch.object(low_rank, "leaves_a_graph", return_value=True)


def measure(args: argparse.Namespace) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(1, 3, args.size, args.size)
    runs = models(args.size, args.rank)
    macs: dict[str, dict[str, float]] = {}
    for name, (maps, whole) in runs.items():
        with written_out() if name == "unmerged" else nullcontext():
            macs[name] = {"maps": counted(partial(maps, images)), "whole": counted(partial(whole, images))}
        print(f"{NAMES[name]}: {macs[name]['maps'] / 1e9:.2f} G, {macs[name]['whole'] / 1e9:.2f} G with decoders")

    def inferred(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        def step() -> None:
            with torch.inference_mode():
                run(images)

        return step

    steps = {name: inferred(runs[name][1]) for name in ("running", "merged", "single")}
    seconds = alternate(steps, args.rounds, warmup=1, clock=time.process_time)
    shares = {
        "macs": {name: macs[name]["whole"] / macs["backbone"]["maps"] for name in ("unmerged", "running", "merged")},
        "seconds": {name: seconds[name]["min"] / seconds["single"]["min"] for name in ("running", "merged")},
    }
    bars = {"macs": MOST_MACS, "seconds": MOST_SECONDS}
    met = {kind: max(own.values()) <= bars[kind] for kind, own in shares.items()}
    found = {"seconds": seconds, "shares": shares, "bars": bars, "met": met}
    found["batched"] = {str(size): passes(size, args.rounds) for size in (64, 224)}
    path = write("multitask_cost", {"arguments": vars(args), "macs": macs, **found})
    print(json.dumps(found, indent=1), path, sep="\n")


def passes(size: int, rounds: int) -> dict[str, Any]:
    """Time the maps of Polyhistor for one image: one pass per task, and all tasks in one batch."""
    model, images = swin(size), torch.randn(1, 3, size, size)
    vispeft.attach(model, vispeft.Polyhistor(), tasks=list(TASKS), verify=False)

    def step(batched: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                vispeft.forward_tasks(model, images, batched=batched)

        return run

    return alternate({"passes": step(False), "batch": step(True)}, 3 * rounds, warmup=1, clock=time.process_time)


class _Maps(nn.Module):
    """The maps of all tasks as the output of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Compute them."""
        return vispeft.forward_tasks(self.model, images)


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Make a step: the maps of all tasks, one pass for each task where the method does not branch, and gradients."""

    def run() -> None:
        maps = vispeft.forward_tasks(model, images)
        torch.stack([level.square().mean() for own in maps.values() for level in own]).sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def measure_steps(args: argparse.Namespace) -> None:
    """Time training steps, and write them."""
    torch.set_num_threads(1)
    images = torch.randn(1, 3, args.size, args.size)
    roles = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    methods: dict[str, vispeft.Method] = {
        "lora": vispeft.LoRA(rank=args.rank, roles=roles),
        "mtlora": vispeft.MTLoRA(rank=args.rank, drop_path=0.0),
    }
    steps, kept = {}, {}
    for key, (mode, memory) in MODES.items() if args.compile else [("", MODES[""])]:
        for name, method in methods.items():
            torch.manual_seed(0)
            model = swin(args.size).train()
            bank = vispeft.attach(model, method, tasks=list(TASKS), verify=False)
            bank.memory = memory
            reason = bank.compile(mode)
            if reason is not None:
                raise SystemExit(f"The blocks cannot be compiled: {reason}.")
            steps[name + key] = training_step(model, images)
            steps[name + key]()
            kept[name + key] = saved_bytes(_Maps(model), images)
    seconds = alternate(steps, args.rounds, warmup=2, clock=time.process_time)
    shares = {"mtlora": seconds["mtlora"]["median"] / seconds["lora"]["median"]}
    met = {"mtlora": shares["mtlora"] <= MOST_STEP}
    if args.compile:
        for key in (COMPILED, COMPILED_PLAIN):
            shares[key] = seconds[f"mtlora{key}"]["median"] / seconds["mtlora"]["median"]
            met[key] = shares[key] <= MOST_COMPILED
            shares[f"kept{key}"] = kept[f"mtlora{key}"] / kept["mtlora"]
    found = {"arguments": vars(args), "seconds": seconds, "kept": kept, "shares": shares, "met": met}
    print(json.dumps(found, indent=1), write("multitask_steps", found), sep="\n")


def table() -> None:
    """Write the table into docs/multitask.md."""
    found = json.loads((RESULTS / "multitask_cost.json").read_text())
    lines = [
        "| four tasks | multiply-accumulates of the maps | with decoders | of the plain backbone | seconds | of four "
        "single-task models |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, says in NAMES.items():
        macs, seconds, share = found["macs"][name], found["seconds"].get(name), found["shares"]["seconds"].get(name)
        own = [f"{macs['maps'] / 1e9:.1f} G", f"{macs['whole'] / 1e9:.1f} G"]
        own.append(f"{macs['whole'] / found['macs']['backbone']['maps']:.2f}")
        own += ["" if seconds is None else f"{seconds['min']:.2f}", "" if share is None else f"{share:.2f}"]
        lines.append(f"| {says} | {' | '.join(own)} |")
    size, rank = found["arguments"]["size"], found["arguments"]["rank"]
    lines += ["", f"Swin-T, {size} pixels, rank {rank}, one image, {found['machine']['processor']}, one thread.", ""]
    lines.append("Polyhistor, all tasks in one batch (`forward_tasks(..., batched=True)`) over one pass per task: ")
    lines[-1] += ", ".join(
        f"{own['batch']['min'] / own['passes']['min']:.2f} of the seconds with one image of {side} pixels"
        for side, own in found["batched"].items()
    )
    lines[-1] += "."
    steps = RESULTS / "multitask_steps.json"
    if steps.is_file():
        record = json.loads(steps.read_text())
        side, shares = record["arguments"]["size"], record["shares"]
        lines += [
            "",
            f"A training step of MTLoRA for all maps takes {shares['mtlora']:.2f} of four steps of LoRA on all ",
        ]
        lines[-1] += f"linear layers, one for each task ({side} pixels, decoders left out)"
        lines[-1] += "."
        if COMPILED in shares:
            lines[-1] += (
                f" Compiled, it takes {shares[COMPILED]:.2f} of itself and keeps {shares[f'kept{COMPILED}']:.2f} of "
                f"the bytes for its backward pass; compiled with `memory: plain`, {shares[COMPILED_PLAIN]:.2f} and "
                f"{shares[f'kept{COMPILED_PLAIN}']:.2f}."
            )
    write_section("multitask cost", lines, "multitask")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="pixels; default: 448, with --steps 224")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", action="store_true", help="measure training steps")
    parser.add_argument("--compile", action="store_true", help="with --steps: measure compiled blocks too")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.size = args.size or (224 if args.steps else 448)
    if args.table:
        table()
    elif args.steps:
        measure_steps(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
