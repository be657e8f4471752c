"""Time and memory of `vispeft predict` on large JPEGs beside a plain loop of timm with the same loader settings.

    python benchmarks/predict_speed.py                       # 800 images, memory also of 8,000; some minutes
    python benchmarks/predict_speed.py --images 60 --many 0  # a trial
    python benchmarks/predict_speed.py --table               # also puts the table into docs/benchmarks.md

JPEGs of 1,600 x 1,200 pixels, `zoo:vit_tiny`, two workers, batches of 64. ``timm`` makes the same backbone without an
adapter, prepares images by timm's own transform for evaluation, reads them by timm's loader, and writes a CSV file of
classes and probabilities. ``predict`` is the whole command with a finished run: it loads and checks the run, reads,
predicts, and writes its table. Both take turns in one process, from files in the cache of the system. Peak memory is
that of a process of its own and of its largest worker, and needs Linux. Writes results/predict_speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vispeft  # isort: skip  (first: it makes torchvision importable where its library does not fit)

import numpy as np
import timm
import timm.data
import torch
from common import RESULTS, write, write_section
from PIL import Image
from retrieval import resident

from vispeft.cli import predict, train
from vispeft.data import Preprocessing, read_image

NAME = "predict_speed"
BACKBONE = "zoo:vit_tiny"
WIDTH, HEIGHT = 1600, 1200
DIFFERENT = 20
"""Images that differ; the others are links to them, which take as long to decode."""
WAYS = ("full", "reduced")
BARS = {"full": 1.1, "reduced": 0.6}
"""Largest time relative to timm's loop."""
BATCH, WORKERS = 64, 2
MEMORY_BAR = 1.05
"""Largest peak of ten times the images relative to that of all images; the paths alone take some hundred bytes each."""
SIZES = (32, 224)
"""Sizes at which pixels of both ways to decode are compared."""
CONFIG = """
model:
  class_path: vispeft.tasks.Classification
  init_args: {{backbone: "{backbone}", method: {{class_path: vispeft.SSF}}}}
data: {{class_path: vispeft.data.ImageFolderData, init_args: {{root: {root}, decode: {way}, batch_size: 8}}}}
trainer: {{max_epochs: 1, limit_train_batches: 1, limit_val_batches: 1, limit_test_batches: 1, accelerator: cpu}}
"""


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Draw a picture with the spectrum of a photograph: noise whose strength falls with its frequency."""
    random = np.random.default_rng(number)
    total = np.zeros((height, width, 3), np.float32)
    for step in (1, 4, 16, 64, 256):
        rows, columns = -(-height // step), -(-width // step)
        small = Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        total += (np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) * step**0.5
    return Image.fromarray((128 + total * (50 / total.std())).clip(0, 255).astype(np.uint8))


def make_images(folder: Path, count: int) -> Path:
    """Write JPEGs, most of which are links to others."""
    folder.mkdir()
    for number in range(count):
        path, first = folder / f"{number:05d}.jpg", folder / f"{number % DIFFERENT:05d}.jpg"
        if number < DIFFERENT:
            picture(number).save(path, quality=90)
        else:
            os.link(first, path)
    return folder


def make_run(folder: Path, way: str) -> Path:
    """Train an adapter for one step, on small JPEGs of two classes."""
    root = folder / "small"
    if not root.exists():
        for number in range(40):
            (root / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
            picture(100 + number, 80, 60).save(root / f"class {number % 2}" / f"{number}.jpg")
    config = folder / f"{way}.yaml"
    config.write_text(CONFIG.format(backbone=BACKBONE, root=root, way=way))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(config), "--out", str(folder / way)])
    return folder / way


def ours(run: Path, images: Path, out: Path) -> int:
    """Predict by the command, and return the number of rows."""
    arguments = [run, images, "--out", out, "--batch_size", BATCH, "--workers", WORKERS]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # status 1 for broken images
        predict.main(list(map(str, arguments)))
    with (out / "predictions.csv").open(newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def timms(images: Path, out: Path) -> int:
    """Predict by a plain loop, and return the number of rows."""
    model = vispeft.create_model(BACKBONE, num_classes=2).eval()
    settings = timm.data.resolve_model_data_config(model)
    found = timm.data.ImageDataset(str(images))
    loader = timm.data.create_loader(  # gives the dataset timm's transform for evaluation
        found,
        settings["input_size"],
        BATCH,
        num_workers=WORKERS,
        use_prefetcher=False,
        persistent_workers=False,
        **{key: settings[key] for key in ("interpolation", "mean", "std", "crop_pct")},
    )
    rows = []
    with torch.inference_mode():
        for batch, _ in loader:
            best = model(batch).softmax(1).max(1)
            rows += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    out.mkdir()
    with (out / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(zip(found.filenames(), *zip(*rows, strict=True), strict=True))
    return len(rows)


def timed(job: Any, out: Path, *arguments: Path) -> dict[str, float]:
    """Run a job, and return its seconds: of the clock, and of processors, its workers' included."""
    began, before = time.perf_counter(), os.times()
    rows = job(*arguments, out)
    after = os.times()
    shutil.rmtree(out)
    used = sum(getattr(after, name) - getattr(before, name) for name in ("user", "system"))
    used += sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
    return {"seconds": time.perf_counter() - began, "processor_seconds": used, "rows": rows}


def measure(place: Path, images: Path, runs: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Time all ways in turns, and return the rounds of each; the first one, which loads libraries, does not count."""
    few = make_images(place / "few", 2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("timm", *WAYS)}
    for number in range(rounds + 1):
        source = images if number else few
        for name in found:
            job, given = (timms, (source,)) if name == "timm" else (ours, (runs[name], source))
            row = timed(job, place / "out", *given)
            if number:
                found[name].append(row)
                print(f"{name}: {row['seconds']:.1f} s, {row['processor_seconds']:.1f} s of processors", flush=True)
    return found


def median(rows: list[dict[str, float]], key: str) -> float:
    """Return the median of one figure."""
    return float(np.median([row[key] for row in rows]))


def pixels(images: Path) -> dict[str, dict[str, float]]:
    """Compare resized pixels of both ways to decode, in levels of 8 bits."""
    found = {}
    for size in SIZES:
        made = [
            Preprocessing(size=(size, size), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic", decode=way)
            for way in WAYS
        ]
        differences = []
        for path in sorted(images.iterdir())[:DIFFERENT]:
            full, reduced = (one.resize()(read_image(path, least=one.least)).float() for one in made)
            differences.append((full - reduced).abs())
        together = torch.stack(differences)
        found[str(size)] = {"mean": float(together.mean()), "largest": float(together.max())}
    return found


def broken(place: Path, images: Path, run: Path) -> int:
    """Predict all images, two of which are broken, and return the number of rows."""
    spoilt = place / "spoilt"
    shutil.copytree(images, spoilt, copy_function=os.link)
    for name, content in (("00003.jpg", b"no image"), ("00007.jpg", (images / "00007.jpg").read_bytes()[:5000])):
        (spoilt / name).unlink()
        (spoilt / name).write_bytes(content)
    rows = ours(run, spoilt, place / "out")
    shutil.rmtree(place / "out")
    return rows


def memory(run: Path, images: Path) -> dict[str, int]:
    """Measure the peaks of this process and of its largest worker, in bytes."""
    with tempfile.TemporaryDirectory() as place:
        ours(run, images, Path(place) / "out")
    # A worker was forked by this process, whose peak it does not inherit, unlike a process that a command starts.
    return {"process": resident("VmHWM"), "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def in_a_process(run: Path, images: Path) -> dict[str, int]:
    """Measure memory in a process of its own, whose peak nothing earlier has raised."""
    command = [sys.executable, __file__, "--alone", str(run), str(images)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table_lines() -> Iterator[str]:
    """Make the section of docs/benchmarks.md from the results."""
    found = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    yield f"| {found['images']:,} JPEGs, {WORKERS} workers | seconds | of timm's | processor seconds | of timm's |"
    yield "|---|--:|--:|--:|--:|"
    base = found["rounds"]["timm"]
    for name, rows in found["rounds"].items():
        cells = []
        for key in ("seconds", "processor_seconds"):
            ratio = median(rows, key) / median(base, key)
            bar = f" (bar {BARS[name]:.2f})" if name in BARS and key == "seconds" else ""
            cells += [f"{median(rows, key):.1f}", f"{ratio:.2f}{bar}"]
        label = {"timm": "a loop of timm", "full": "`predict`", "reduced": "`predict`, `decode: reduced`"}[name]
        yield " | ".join([f"| {label}", *cells]) + " |"
    yield ""
    yield f"With 2 broken images {found['rows_with_two_broken']:,} rows are written."
    for count, peaks in found["peak_bytes"].items():
        own, other = (f"{peaks[key] / 2**20:,.0f} MiB" for key in ("process", "worker"))
        yield f"Peak memory with {int(count):,} images: {own}, of the largest worker {other}."
    few, *many = (peaks["process"] for peaks in found["peak_bytes"].values())
    for more in many:
        yield f"The second is {more / few:.2f} of the first (bar {MEMORY_BAR})."
    for size, levels in found["pixels"].items():
        yield (
            f"Pixels at {size} x {size} differ by {levels['mean']:.2f} of 255 levels on average between both ways to "
            f"decode, and by {levels['largest']:.0f} at most."
        )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800, help="default: %(default)s")
    parser.add_argument("--many", type=int, default=8000, help="images of the second measurement of memory; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--alone", nargs=2, metavar=("RUN", "IMAGES"), help="measure memory here; write nothing")
    parser.add_argument("--table", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args()
    if args.table:
        write_section(NAME, table_lines())
        return
    if args.alone:
        print(json.dumps(memory(*map(Path, args.alone))))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images = make_images(place / "images", args.images)
        runs = {way: make_run(place, way) for way in WAYS}
        found: dict[str, Any] = {"images": args.images, "rounds": measure(place, images, runs, args.rounds)}
        found["rows_with_two_broken"] = broken(place, images, runs["full"])
        found["pixels"] = pixels(images)
        found["peak_bytes"] = {str(args.images): in_a_process(runs["full"], images)}
        if args.many:
            found["peak_bytes"][str(args.many)] = in_a_process(runs["full"], make_images(place / "many", args.many))
        state = {"load": os.getloadavg()[0], "processors": os.cpu_count()}
        write(NAME, {**found, **state})
    print("\n".join(table_lines()))


if __name__ == "__main__":
    main()
