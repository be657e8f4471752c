"""Peak memory of predicting masks of large images by sliding windows.

    python benchmarks/sliding_window.py                      # heights 1024, 2048 and 4096; some minutes each
    python benchmarks/sliding_window.py --heights 4096
    python benchmarks/sliding_window.py --table              # writes the table into docs/segmentation.md

Images are 4096 pixels wide and have 150 classes. Each height is measured in a process of its own, as the largest
resident memory the operating system has seen of it: libraries, model, image and masks are all in it. That depends on
what the allocator keeps, so the largest of several rounds counts. Writes results/sliding_window.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import torch  # isort: skip
from common import RESULTS, write, write_section

from vispeft.tasks import Inference, Segmentation

NAME = "sliding_window"
HEIGHTS = (1024, 2048, 4096)
WIDTH, CLASSES, WINDOW, STRIDE = 4096, 150, 512, 341
BAR = 3 * 2**30
"""Bytes below which the highest image stays."""


def peak() -> int:
    """Give the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(height: int, threads: int) -> dict[str, Any]:
    """Predict one image in this process.

    Args:
        height: Its height in pixels.
        threads: Threads to compute with.

    Returns:
        The peak before there is an image and at the end, in bytes, and the processor seconds of the prediction.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    task = Segmentation(
        backbone="zoo:swin_tiny",
        method=vispeft.SSF(),
        num_classes=CLASSES,
        decoder="segformer",
        inference=Inference(mode="slide", window=WINDOW, stride=STRIDE),
    ).eval()
    before, began = peak(), time.process_time()
    masks = task.predict(torch.randn(1, 3, height, WIDTH))
    assert masks.shape == (1, height, WIDTH)
    return {"before_bytes": before, "peak_bytes": peak(), "processor_seconds": time.process_time() - began}


def in_a_process(height: int, threads: int) -> dict[str, Any]:
    """Measure in a fresh process, whose peak nothing earlier has raised.

    Args:
        height: Height of the image in pixels.
        threads: Threads to compute with.
    """
    command = [sys.executable, __file__, "--alone", str(height), "--threads", str(threads)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def largest(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the rounds of a height together: the round of the largest peak, and the peaks of all."""
    worst = max(rounds, key=lambda found: found["peak_bytes"])
    return {**worst, "peaks": [found["peak_bytes"] for found in rounds]}


def gib(number: int) -> str:
    """Write bytes as GiB."""
    return f"{number / 2**30:.2f}"


def verdict(figures: dict[str, dict[str, Any]]) -> str:
    """Say whether the bar is met by the highest image that was measured."""
    height = max(figures, key=int)
    found = figures[height]["peak_bytes"]
    told = "below the bar of" if found < BAR else "BAR MISSED: not below"
    return f"{height} x {WIDTH} pixels, {CLASSES} classes: {gib(found)} GiB, {told} {gib(BAR)} GiB"


def table_lines() -> Iterator[str]:
    """Make the section of docs/segmentation.md from the results."""
    figures = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))["figures"]
    yield f"| image, {CLASSES} classes | before there is an image, GiB | peak, GiB |"
    yield "|---|--:|--:|"
    for height, found in figures.items():
        bar = f" (bar {gib(BAR)})" if height == max(figures, key=int) else ""
        yield f"| {int(height):,} x {WIDTH:,} | {gib(found['before_bytes'])} | {gib(found['peak_bytes'])}{bar} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heights", nargs="+", type=int, default=HEIGHTS, help="in pixels; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each height; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--alone", type=int, metavar="HEIGHT", help="measure one height in this process; write nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines(), page="segmentation")
        return
    if args.alone:
        print(json.dumps(measure(args.alone, args.threads)))
        return
    torch.set_num_threads(args.threads)
    figures = {}
    for height in sorted(args.heights):
        figures[str(height)] = largest([in_a_process(height, args.threads) for _ in range(args.rounds)])
        print(f"{height} x {WIDTH}: {gib(figures[str(height)]['peak_bytes'])} GiB", flush=True)
    settings = {"width": WIDTH, "classes": CLASSES, "window": WINDOW, "stride": STRIDE, "bar_bytes": BAR}
    print(f"written to {write(NAME, {**settings, 'figures': figures}).name}")
    print(verdict(figures))


if __name__ == "__main__":
    main()
