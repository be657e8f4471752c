"""Run the digits, Earth, scenes and emoji configs once, and write into their headers what they reach and in what time.

    python benchmarks/config_figures.py [NAME ...]

Without names all of them run; with names, such as earth_lora, the figures of the others are kept. The Earth configs
need the wheels that their headers name; those of mmsegmentation, the extra mmseg. Writes
results/config_figures.json after each; the second line of each config is made from it. Pictures that the docs show are
taken from the last epoch of the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from PIL import Image

from vispeft.cli.train import train

NAME = "config_figures"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PATTERNS = (
    *("classification/digits_*.yaml", "segmentation/earth_*.yaml", "mmseg/earth_*.py"),
    *("multitask/scenes_*.yaml", "multitask/earth_*.yaml"),
    "metric_learning/emoji_*.yaml",
)
"""The configs that are run; their names differ, whatever folder they are in."""
TOLD = {
    "accuracy": "{:.1%}",
    "mean_average_precision": "a mean average precision of {:.3f}",
    "r2": "an R² of {:.3f}",
    "miou": "a mean IoU of {:.3f}",
    "recall@1": "a recall@1 of {:.3f}",
}
"""The metric that counts, the first there is, and how the header tells it."""
OF_TASKS = {"miou": "mean IoU", "odsf": "F1", "mean": "degrees", "rmse": "rmse"}
"""How it tells the main figures of several tasks."""

IMAGES, QUALITY, WIDTH = CONFIGS.parent / "docs" / "images", 88, 1100
PICTURES = {
    "scenes_mtlora": ("strips_epoch_*.png",),
    "earth_mtlora": ("strips_epoch_*.png",),
    "emoji_vptsp": ("neighbours_epoch_*.png", "embeddings_*.png"),
}
"""Pictures of validation images that the docs show, by config."""


def header(entry: dict[str, float]) -> str:
    """Say what a config reaches, in one comment line."""
    split = "test" if any(key.startswith("test_") for key in entry) else "validation"
    if several := {key: value for key, value in entry.items() if "/" in key and key.startswith(split)}:
        told = ", ".join(
            f"{task} {value:.3f} ({OF_TASKS[name]})"
            for key, value in several.items()
            for task, name in [key.removeprefix(f"{split}_").split("/")]
        )
    else:
        metric = next(name for name in TOLD if f"{split}_{name}" in entry)
        told = TOLD[metric].format(entry[f"{split}_{metric}"])
    return (
        f"# reaches {told} on the {split} images"
        + (f" in {entry['seconds']:.0f} s on two cores" if "seconds" in entry else "")
        + f" (benchmarks/results/{NAME}.json)"
    )


def with_lightning(config: Path, out: Path) -> dict[str, float]:
    """Train as a YAML config says, and give its figures."""
    metrics = json.loads((train(config, [], out=out) / "metrics.json").read_text())
    if "main_figures" in metrics:
        chosen = [f"{task}/{name}" for task, name in metrics["main_figures"].items()]
    else:
        chosen = [next(name for name in TOLD if name in metrics["test"])]
    return {
        **{f"{split}_{name}": metrics[split][name] for split in ("validation", "test") for name in chosen},
        "trainable": metrics["parameters"]["trainable"],
        "threads": metrics["threads"],
        "seconds": metrics["seconds"]["total"],
    }


def with_mmengine(config: Path, out: Path) -> dict[str, float]:
    """Train as a config of mmsegmentation says, and give its figures; its Runner tests nothing."""
    # In a process of its own: mmengine keeps one visualizer of a name, and it goes on writing where it began.
    subprocess.run([sys.executable, CONFIGS.parent / "tools" / "train.py", config, "--out", out], check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    return {
        "validation_miou": metrics["validation"]["mIoU"] / 100,
        "trainable": metrics["parameters"]["backbone"]["trainable"],
        "threads": torch.get_num_threads(),
        "seconds": metrics["seconds"]["total"],
    }


def keep_picture(picture: Path, config: str) -> None:
    """Keep a picture of a run for the docs, as a JPEG that is not too wide."""
    IMAGES.mkdir(exist_ok=True)
    kind = picture.stem.split("_")[0]
    with Image.open(picture) as opened:
        opened.thumbnail((WIDTH, 10 * WIDTH))
        opened.convert("RGB").save(IMAGES / f"{config}_{kind}.jpg", quality=QUALITY)


def quiet() -> bool:
    """Tell whether the machine does little else."""
    return os.getloadavg()[0] < (os.cpu_count() or 1) + 1


def main() -> None:
    """Run, write, and put the figures into the headers."""
    results: dict[str, Any] = {}
    if sys.argv[1:]:
        results = json.loads((RESULTS / f"{NAME}.json").read_text())["configs"]
    for config in sorted(path for pattern in PATTERNS for path in CONFIGS.glob(pattern)):
        if sys.argv[1:] and config.stem not in sys.argv[1:]:
            continue
        idle = quiet()
        with tempfile.TemporaryDirectory() as folder:
            run = with_mmengine if config.suffix == ".py" else with_lightning
            entry = run(config, Path(folder) / "run")
            for pattern in PICTURES.get(config.stem, ()):
                keep_picture(max((Path(folder) / "run" / "plots").glob(pattern)), config.stem)
        if not (idle and quiet() and entry["threads"] == 2):
            del entry["seconds"]  # the time says more about other work
        results[config.stem] = entry
        lines = [line for line in config.read_text().splitlines() if not line.startswith("# reaches")]
        config.write_text("\n".join([lines[0], header(entry), *lines[1:]]) + "\n")
        write(NAME, {"configs": dict(sorted(results.items()))})


if __name__ == "__main__":
    main()
