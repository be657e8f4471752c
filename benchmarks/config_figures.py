"""Run the digits and Earth configs once, and write into their headers what they reach and in what time.

    python benchmarks/config_figures.py [NAME ...]

Without names all of them run; with names, such as earth_lora, the figures of the others are kept. The Earth configs
need the two wheels that their headers name. Writes results/config_figures.json; the second line of each config is made
from it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, write

from vispeft.cli.train import train

NAME = "config_figures"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PATTERNS = ("classification/digits_*.yaml", "segmentation/earth_*.yaml")
"""The configs that are run; their names differ, whatever folder they are in."""
TOLD = {
    "accuracy": "{:.1%}",
    "mean_average_precision": "a mean average precision of {:.3f}",
    "r2": "an R² of {:.3f}",
    "miou": "a mean IoU of {:.3f}",
}
"""The metric that counts, the first there is, and how the header tells it."""


def header(entry: dict[str, float]) -> str:
    """Say what a config reaches, in one comment line."""
    metric = next(name for name in TOLD if f"test_{name}" in entry)
    return (
        f"# reaches {TOLD[metric].format(entry[f'test_{metric}'])} on the test images"
        + (f" in {entry['seconds']:.0f} s on two cores" if "seconds" in entry else "")
        + f" (benchmarks/results/{NAME}.json)"
    )


def main() -> None:
    """Run, write, and put the figures into the headers."""
    results: dict[str, Any] = {}
    if sys.argv[1:]:
        results = json.loads((RESULTS / f"{NAME}.json").read_text())["configs"]
    for config in sorted(path for pattern in PATTERNS for path in CONFIGS.glob(pattern)):
        if sys.argv[1:] and config.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            metrics = json.loads((train(config, [], out=Path(folder) / "run") / "metrics.json").read_text())
        metric = next(name for name in TOLD if name in metrics["test"])
        results[config.stem] = {
            f"validation_{metric}": metrics["validation"][metric],
            f"test_{metric}": metrics["test"][metric],
            "trainable": metrics["parameters"]["trainable"],
            "threads": metrics["threads"],
        }
        if os.getloadavg()[0] < (os.cpu_count() or 1) + 1:  # otherwise the time says more about other work
            results[config.stem]["seconds"] = metrics["seconds"]["total"]
        lines = [line for line in config.read_text().splitlines() if not line.startswith("# reaches")]
        config.write_text("\n".join([lines[0], header(results[config.stem]), *lines[1:]]) + "\n")
    write(NAME, {"configs": dict(sorted(results.items()))})


if __name__ == "__main__":
    main()
