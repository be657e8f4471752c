"""Seconds of one batch whose images take different adapters, of switching adapters, and of a server that shares a pass.

    python benchmarks/row_routing.py [--clock cpu]
    python benchmarks/row_routing.py --table     # write the table of docs/serving.md from the file

Writes results/row_routing.json, with the largest difference between each image's scores and those of its adapter
alone. Three measurements, each of alternating runs in one process: 8 images through 4 LoRA adapters beside 8 images
through one of them, on ViT-S/16 and Swin-T; `set_active` on ViT-B/16; four linear probes and four VQT adapters with one
query, which a server answers for all of 8 images, beside one plain forward pass. `--clock cpu` counts the seconds of
this process alone, for machines that others use; it takes one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import torch  # isort: skip
from common import RESULTS, alternate, write, write_section
from torch import Tensor, nn

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")


@torch.no_grad()
def moved(bank: Any, name: str, seed: int) -> None:
    """Move an adapter away from its start, at which all of one kind are equal."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in bank.named_tensors(name).values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))


def with_adapters(model: nn.Module, methods: dict[str, vispeft.Method]) -> Any:
    """Attach adapters."""
    for seed, (name, method) in enumerate(methods.items()):
        bank = vispeft.attach(model, method, name=name, verify=False)
        moved(bank, name, seed)
    model.eval()
    return bank


def difference(bank: Any, images: Tensor, rows: list[str]) -> dict[str, float]:
    """Compare a batch of rows with one image at a time, and say how large its scores are."""
    with bank.using(rows=rows):
        found = bank.model(images)
    wanted = []
    for image, name in zip(images.split(1), rows, strict=True):
        with bank.using(name):
            wanted.append(bank.model(image))
    alone = torch.cat(wanted)
    return {"largest_difference": float((found - alone).abs().max()), "largest_score": float(alone.abs().max())}


def rows_of(name: str, roles: tuple[str, ...] | None, options: Any) -> dict[str, Any]:
    """Measure 8 images through 4 adapters beside 8 images through one."""
    torch.manual_seed(0)
    model = vispeft.create_model(name, pretrained=False, num_classes=10)
    bank = with_adapters(model, {f"lora_{n}": vispeft.LoRA(rank=8, roles=roles) for n in range(4)})
    images, rows = torch.randn(8, 3, 224, 224), [f"lora_{n % 4}" for n in range(8)]

    def one() -> None:
        with bank.using(rows[0]):
            model(images)

    def four() -> None:
        with bank.using(rows=rows):
            model(images)

    seconds = alternate({"one adapter": one, "four adapters": four}, options.rounds, 1, options.timer)
    ratio = seconds["four adapters"]["median"] / seconds["one adapter"]["median"]
    return {"seconds": seconds, "ratio": ratio, **difference(bank, images, rows)}


def switching(options: Any) -> dict[str, Any]:
    """Measure `set_active` on ViT-B/16, for choices that are new and that were made before."""
    model = vispeft.create_model("vit_base_patch16_224", pretrained=False, num_classes=10)
    bank = with_adapters(model, {f"lora_{n}": vispeft.LoRA(rank=8, roles=LINEARS) for n in range(4)})
    times: dict[str, list[float]] = {"new": [], "again": []}
    for _ in range(5):
        bank._forget_routes()
        for kind in times:
            for name in bank.names:
                start = options.timer()
                bank.set_active(name)
                times[kind].append(1e3 * (options.timer() - start))
    return {kind: {"median_ms": sorted(own)[len(own) // 2], "max_ms": max(own)} for kind, own in times.items()}


def shared_pass(options: Any) -> dict[str, Any]:
    """Measure a server of four probes and four VQT adapters, all of which answer 8 images, beside one forward pass."""
    torch.manual_seed(0)
    model = vispeft.create_model("vit_base_patch16_224", pretrained=False, num_classes=10).eval()
    plain = vispeft.create_model("vit_base_patch16_224", pretrained=False, num_classes=10).eval()
    methods: dict[str, vispeft.Method] = {f"probe_{n}": vispeft.LinearProbe() for n in range(4)}
    methods |= {f"vqt_{n}": vispeft.VQT(num_queries=1) for n in range(4)}
    bank = with_adapters(model, methods)
    server = vispeft.serve(model)
    images = torch.randn(8, 3, 224, 224)
    answers, worst = server.each(images), 0.0
    for name, found in answers.items():
        with bank.using(name):
            worst = max(worst, float((found - model(images)).abs().max()))
    steps = {"one forward": lambda: plain(images), "eight adapters": lambda: server.each(images)}
    seconds = alternate(steps, options.rounds, 1, options.timer)
    ratio = seconds["eight adapters"]["median"] / seconds["one forward"]["median"]
    return {"seconds": seconds, "ratio": ratio, "largest_difference": worst}


def table_lines() -> list[str]:
    """Make the table of docs/serving.md."""
    found = json.loads((RESULTS / "row_routing.json").read_text())
    lines = ["| | ratio | largest difference of a score |", "|---|---|---|"]
    for name, row in found["rows"].items():
        lines.append(
            f"| 8 images through 4 LoRA adapters (rank 8), beside one: {name} | {row['ratio']:.2f} | "
            f"{row['largest_difference']:.0e} |"
        )
    shared = found["shared_pass_vit_b"]
    lines.append(
        f"| 4 probes and 4 VQT adapters for each of 8 images, beside one forward pass: ViT-B/16 | "
        f"{shared['ratio']:.2f} | {shared['largest_difference']:.0e} |"
    )
    new = found["switching_vit_b"]["new"]
    clock = "seconds of the process, one thread" if found["clock"] == "cpu" else "seconds by the clock"
    switched = f"`set_active` on ViT-B/16 takes {new['median_ms']:.1f} ms for a choice that is new"
    return [*lines, "", f"Ratios of medians ({clock}), float32. {switched}."]


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        write_section("row_routing", table_lines(), "serving")
        return
    options.timer = time.process_time if options.clock == "cpu" else time.perf_counter
    torch.set_num_threads(1 if options.clock == "cpu" else 2)
    found: dict[str, Any] = {"clock": options.clock, "rounds": options.rounds, "rows": {}}
    for name in MODELS:
        for label, roles in (("default layers", None), ("all linear layers", LINEARS)):
            found["rows"][f"{name}, {label}"] = rows_of(name, roles, options)
    found["switching_vit_b"] = switching(options)
    found["shared_pass_vit_b"] = shared_pass(options)
    for name, row in found["rows"].items():
        print(f"{name}: {row['ratio']:.3f} of one adapter, difference {row['largest_difference']:.1e}")
    print(f"set_active on ViT-B/16: {found['switching_vit_b']}")
    print(f"eight adapters served together: {found['shared_pass_vit_b']['ratio']:.3f} of one forward")
    print(f"written to {write('row_routing', found).name}")


if __name__ == "__main__":
    main()
