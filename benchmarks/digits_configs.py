"""Run every digits config once, and write into its header what it reaches and in what time.

    python benchmarks/digits_configs.py

Writes results/digits_configs.json; the second line of each config is made from it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from common import write

from vispeft.cli.train import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "classification"


def header(entry: dict[str, float]) -> str:
    """Say what a config reaches, in one comment line."""
    return (
        f"# reaches {entry['test_accuracy']:.1%} on the test images in {entry['seconds']:.0f} s on two cores "
        "(benchmarks/results/digits_configs.json)"
    )


def main() -> None:
    """Run, write, and put the figures into the headers."""
    results = {}
    for config in sorted(CONFIGS.glob("digits_*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            metrics = json.loads((train(config, [], out=Path(folder) / "run") / "metrics.json").read_text())
        results[config.stem] = {
            "validation_accuracy": metrics["validation"]["accuracy"],
            "test_accuracy": metrics["test"]["accuracy"],
            "trainable": metrics["parameters"]["trainable"],
            "seconds": metrics["seconds"]["total"],
        }
        lines = [line for line in config.read_text().splitlines() if not line.startswith("# reaches")]
        config.write_text("\n".join([lines[0], header(results[config.stem]), *lines[1:]]) + "\n")
    write("digits_configs", {"configs": results})


if __name__ == "__main__":
    main()
