"""Share of an evaluation pass of Polyhistor that goes into its generated weights: the first batch and later ones.

    python benchmarks/polyhistor_cache.py                   # Swin-T, 224 pixels, one image, four tasks
    python benchmarks/polyhistor_cache.py --size 448

Writes results/polyhistor_cache.json. Seconds are of the process (CPU time), counted around `HyperAdapter.weights`: in
the first batch it generates, later it finds what it made. Every batch runs all tasks, one pass each.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import timm  # isort: skip
import torch
from common import write

from vispeft.methods import HyperAdapter

TASKS = ("semseg", "human_parts", "sal", "normals")
FORMS: dict[str, dict[str, Any]] = {
    "Polyhistor": {},
    "Polyhistor-Lite": {"lite": True},
    "HyperFormer": {"rank_divisor": None, "reduction": 4},
}


class Watch:
    """Adds up the seconds spent in `HyperAdapter.weights`."""

    def __init__(self) -> None:
        self.seconds, self.weights = 0.0, HyperAdapter.weights

    def __enter__(self) -> Watch:
        watch = self

        def timed(unit: HyperAdapter, task: str) -> Any:
            start = time.process_time()
            made = watch.weights(unit, task)
            watch.seconds += time.process_time() - start
            return made

        HyperAdapter.weights = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        HyperAdapter.weights = self.weights  # type: ignore[method-assign]


def batches(model: Any, bank: Any, images: torch.Tensor, count: int) -> list[dict[str, float]]:
    """Run batches, and return the seconds of each and the share of it in the generated weights."""
    found = []
    for _ in range(count):
        with Watch() as watch, torch.no_grad():
            start = time.process_time()
            for task in TASKS:
                with bank.using("default", task=task):
                    model.forward_intermediates(images, intermediates_only=True)
            seconds = time.process_time() - start
        found.append({"seconds": seconds, "share": watch.seconds / seconds})
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--batches", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(args.images, 3, args.size, args.size)
    rows = {}
    for name, fields in FORMS.items():
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=args.size, window_size=7)
        model.eval()
        with torch.no_grad():
            model.forward_intermediates(images)  # warms the machine up
        bank = vispeft.attach(model, vispeft.Polyhistor(tasks=TASKS, **fields), verify=False)
        rows[name] = batches(model, bank, images, args.batches)
        print(name, *(f"{row['seconds']:.2f} s, {100 * row['share']:.2f} %" for row in rows[name]), sep="\n  ")
    second = max(row[1]["share"] for row in rows.values())
    path = write("polyhistor_cache", {"arguments": vars(args), "batches": rows, "largest_share_of_second": second})
    print(f"largest share of a second batch: {100 * second:.2f} %; {path}")


if __name__ == "__main__":
    main()
