"""Peak memory of predicting and evaluating large pictures by sliding windows.

    python benchmarks/sliding_window.py                      # some minutes for each row of the table
    python benchmarks/sliding_window.py --heights 3000
    python benchmarks/sliding_window.py --table              # writes the table into docs/segmentation.md

Pictures are 5,000 pixels wide and have 150 classes. ``predict`` is what `vispeft predict` does with one image file, up
to its mask and overlay; ``evaluate`` is what `vispeft evaluate` does with one image and its mask in the test split.
Each row is measured in a process of its own, as the largest resident memory the operating system has seen of it:
libraries, model, image and masks are all in it. That depends on what the allocator keeps, so the largest of several
rounds counts. Writes results/sliding_window.json.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import numpy as np  # isort: skip
import torch
from common import RESULTS, write, write_section
from PIL import Image

from vispeft.cli.evaluation import evaluate, evaluation_trainer
from vispeft.cli.predict import predict
from vispeft.data import MaskFolderData
from vispeft.tasks import Inference, Segmentation

NAME = "sliding_window"
CASES = (("predict", 1000), ("predict", 3000), ("evaluate", 3000))
"""What is measured, and the height of the picture in pixels."""
WIDTH, CLASSES, WINDOW, STRIDE = 5000, 150, 512, 512
"""Windows side by side: overlapping ones take longer, and no more memory, since one row of them is held either way."""
BAR = 2 * 2**30
"""Bytes below which every row stays."""


def peak() -> int:
    """Give the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_task() -> Segmentation:
    """Make the task that predicts, with random weights in adapter and decoder."""
    torch.manual_seed(0)
    task = Segmentation(
        backbone="zoo:swin_tiny",
        method=vispeft.SSF(),
        num_classes=CLASSES,
        decoder="segformer",
        inference=Inference(mode="slide", window=WINDOW, stride=STRIDE),
    )
    notes = {"output": {**task.output(), "evaluation": "whole"}, "preprocessing": task.preprocessing.to_dict()}
    task.bank.annotate(class_names=[f"class {index}" for index in range(CLASSES)], **notes)
    return task.eval()


def draw(folder: Path, split: str, height: int, width: int) -> Path:
    """Write a picture of random squares and its mask, and return the picture's file."""
    random = np.random.default_rng(height)
    squares = random.integers(0, CLASSES, (-(-height // 50), -(-width // 50)), dtype=np.uint8)
    mask = squares.repeat(50, 0).repeat(50, 1)[:height, :width]
    for kind, pixels in (("images", np.stack([mask, mask // 2, 255 - mask], -1)), ("masks", mask)):
        (folder / kind / split).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / kind / split / "a.png", compress_level=1)
    return folder / "images" / split / "a.png"


def measure(what: str, height: int, threads: int) -> dict[str, Any]:
    """Predict or evaluate one picture in this process.

    Args:
        what: ``predict`` or ``evaluate``.
        height: Its height in pixels.
        threads: Threads to compute with.

    Returns:
        The peak before the picture is read and at the end, in bytes, the processor seconds between them, and how many
        windows the model saw and how many there are: those that reach into two slabs are seen twice.
    """
    torch.set_num_threads(threads)
    task, trainer = make_task(), evaluation_trainer(accelerator="cpu", devices=1)
    seen: list[int] = []
    task.register_forward_hook(lambda *_: seen.append(1))
    there = math.prod(-(-(side - WINDOW) // STRIDE) + 1 for side in (height, WIDTH))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        picture = draw(folder, "test", height, WIDTH)
        for split in ("train", "val"):
            draw(folder, split, WINDOW, WINDOW + len(split))
        before, began = peak(), time.process_time()
        if what == "predict":
            (found,) = predict(task, task.predictor(), trainer, [picture])
            assert found.pictures["masks"].size == (WIDTH, height)
        else:
            names = task.class_names()
            data = MaskFolderData(root=place, class_names=names, evaluation="whole", check="fast", batch_size=1)
            assert evaluate(trainer, task, data, "test")["aacc"] is not None
        seconds = time.process_time() - began
        windows = {"windows_seen": len(seen), "windows": there}
        return {"before_bytes": before, "peak_bytes": peak(), "processor_seconds": seconds, **windows}


def in_a_process(what: str, height: int, threads: int) -> dict[str, Any]:
    """Measure in a fresh process, whose peak nothing earlier has raised.

    Args:
        what: ``predict`` or ``evaluate``.
        height: Height of the picture in pixels.
        threads: Threads to compute with.
    """
    command = [sys.executable, __file__, "--alone", what, str(height), "--threads", str(threads)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def largest(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the rounds of a row together: the round of the largest peak, and the peaks of all."""
    worst = max(rounds, key=lambda found: found["peak_bytes"])
    return {**worst, "peaks": [found["peak_bytes"] for found in rounds]}


def gib(number: int) -> str:
    """Write bytes as GiB."""
    return f"{number / 2**30:.2f}"


def verdict(figures: list[dict[str, Any]]) -> str:
    """Say whether the bar is met by the row of the largest peak."""
    worst = max(figures, key=lambda found: found["peak_bytes"])
    told = "below the bar of" if worst["peak_bytes"] < BAR else "BAR MISSED: not below"
    return (
        f"{worst['what']}, {worst['height']} x {WIDTH} pixels, {CLASSES} classes: {gib(worst['peak_bytes'])} GiB, "
        f"{told} {gib(BAR)} GiB"
    )


def table_lines() -> Iterator[str]:
    """Make the section of docs/segmentation.md from the results."""
    found = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    rounds = max(len(row["peaks"]) for row in found["figures"])
    yield (
        f"| {CLASSES} classes, largest of {rounds} | before there is a picture, GiB | peak, GiB (bar {gib(BAR)}) | "
        "windows, and those seen twice |"
    )
    yield "|---|--:|--:|--:|"
    for row in found["figures"]:
        picture = f"{row['what']}, {row['height']:,} x {WIDTH:,} pixels"
        again = f"{row['windows']}, {row['windows_seen'] - row['windows']}"
        yield f"| {picture} | {gib(row['before_bytes'])} | {gib(row['peak_bytes'])} | {again} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heights", nargs="+", type=int, help="only the rows of these heights, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each row; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--together", action="store_true", help="measure all rows at the same time")
    parser.add_argument("--alone", nargs=2, metavar=("WHAT", "HEIGHT"), help="measure in this process; write nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines(), page="segmentation")
        return
    if args.alone:
        print(json.dumps(measure(args.alone[0], int(args.alone[1]), args.threads)))
        return
    torch.set_num_threads(args.threads)
    settings = {"width": WIDTH, "classes": CLASSES, "window": WINDOW, "stride": STRIDE, "bar_bytes": BAR}
    cases = [(what, height) for what, height in CASES if args.heights is None or height in args.heights]

    def row(case: tuple[str, int]) -> dict[str, Any]:
        found = largest([in_a_process(*case, args.threads) for _ in range(args.rounds)])
        print(f"{case[0]} {case[1]} x {WIDTH}: {gib(found['peak_bytes'])} GiB", flush=True)
        return {"what": case[0], "height": case[1], **found}

    with ThreadPoolExecutor(len(cases) if args.together else 1) as pool:  # each row has processes of its own
        figures = list(pool.map(row, cases))
    print(f"written to {write(NAME, {**settings, 'figures': figures}).name}")
    print(verdict(figures))


if __name__ == "__main__":
    main()
