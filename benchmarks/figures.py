"""Make the figures of the README and of the documentation, in ``docs/images``.

    python benchmarks/figures.py                             # methods by accuracy and bytes, from committed records
    python benchmarks/figures.py --overlay RUN               # tiles of a segmentation run, their labels and predictions
    python benchmarks/figures.py --neighbours RUN --rows 3 4 # queries of a run of metric learning, their neighbours

The records are those of ``benchmarks/fewshot.py`` and ``benchmarks/earth.py``. RUN is any finished run; those of the
figures that are committed were made by

    vispeft train segmentation/earth_lora --data.overlapping false --trainer.max_epochs 4
    vispeft train metric_learning/emoji_lora --trainer.max_epochs 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, F401, I001 - first: it makes torchvision importable where its library does not fit

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import EngFormatter, NullFormatter  # noqa: E402
from PIL import Image  # noqa: E402

from vispeft.tasks.metric_pictures import QUERIES  # noqa: E402
from vispeft.viz.style import COLOURS, SETTINGS, as_svg  # noqa: E402

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PANELS = {
    "fewshot/dinov2_vit_s14": ("test accuracy, %", "Fashion-MNIST, 100 images a class, DINOv2-S", "accuracy"),
    "earth": ("test mean IoU, %", "climate of satellite tiles, DINOv2-S", "miou"),
}
"""Folder of records, with the vertical axis, the title, and the name of the figure where there are several."""
FROZEN = ("linear_probe", "frozen")
"""Methods that leave the backbone as it is, and store a classifier or a decoder alone."""
SHOWN = {"bi_adaptformer": "adaptformer, 1 bit", "full": "full fine-tuning"}
LEGEND = 52
"""Height of the legend below a picture of neighbours in pixels: 0.35 inches (`vispeft.viz.neighbours`)."""
QUALITY = 88
"""Quality of JPEG."""


def main() -> None:
    """Make the figures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", metavar="RUN", type=Path)
    parser.add_argument("--neighbours", metavar="RUN", type=Path)
    parser.add_argument("--rows", metavar="N", type=int, nargs="+", default=[1, 2], help="queries, counted from 1")
    given = parser.parse_args()
    if given.overlay is None and given.neighbours is None:
        write(IMAGES / "methods_trade_off.svg", as_svg(trade_off()))
    if given.overlay is not None:
        photograph(given.overlay / "plots" / "overlays_test.png", IMAGES / "earth_overlay.jpg")
    if given.neighbours is not None:
        found = sorted((given.neighbours / "plots").glob("neighbours_epoch_*.png"))[-1]  # of the validation classes
        photograph(found, IMAGES / "emoji_neighbours.jpg", given.rows)


def write(path: Path, content: bytes) -> None:
    """Write a figure and say so."""
    path.write_bytes(content)
    print(f"{path.relative_to(ROOT)}: {len(content):,} bytes")


def records(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each method that saw the test images, one a seed, by method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / folder).glob("*.json")):
        record = json.loads(path.read_text())
        if "test" in record:
            found.setdefault(record["method"], []).append(record)
    return found


def trade_off() -> Figure:
    """Draw figures of the test images against stored bytes: mean and range of the seeds, the frozen model as a line."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        for axes, (folder, (label, title, name)) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
            for method, seeds in records(folder).items():
                tests = (record["test"] for record in seeds)
                values = [100 * (test[name] if isinstance(test, dict) else test) for test in tests]
                _draw(axes, method, values, statistics.fmean(record["stored_bytes"] for record in seeds))
            axes.set(xscale="log", xlabel="bytes of the adapter", ylabel=label)
            axes.set_title(title, fontsize=10)
            axes.margins(x=0.2, y=0.12)
            axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _draw(axes: Axes, method: str, values: list[float], size: float) -> None:
    mean = statistics.fmean(values)
    if method in FROZEN:
        axes.axhline(mean, color=COLOURS["note"], linestyle="--", linewidth=1)
        told = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate("frozen backbone", (0.02, mean), **told)
        return
    colour = COLOURS["validation"] if method == "full" else COLOURS["train"]
    axes.plot([size, size], [min(values), max(values)], color=colour, linewidth=1.2, alpha=0.6)
    axes.plot(size, mean, "s" if method == "full" else "o", color=colour, ms=7)
    last = method == "full"
    told = {"xytext": (-8 if last else 8, -3), "textcoords": "offset points", "fontsize": 8}
    axes.annotate(SHOWN.get(method, method), (size, mean), ha="right" if last else "left", **told)


def photograph(source: Path, target: Path, rows: Sequence[int] = ()) -> None:
    """Keep a picture of a run as JPEG, at most 1,200 pixels wide: all of it, or some of its rows above its legend."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if rows:
        height = (picture.height - LEGEND) // QUERIES
        bands = [*((row - 1) * height for row in rows), picture.height - LEGEND]
        tops = [number * height for number in range(len(bands))]
        chosen = Image.new("RGB", (picture.width, tops[-1] + LEGEND), "white")
        for top, band in zip(tops, bands, strict=True):
            end = band + (LEGEND if band == bands[-1] else height)
            chosen.paste(picture.crop((0, band, picture.width, end)), (0, top))
        picture = chosen
    picture.thumbnail((1200, 2400))
    picture.save(target, "JPEG", quality=QUALITY, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
