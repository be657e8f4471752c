"""Show what keeping the outputs of a frozen backbone saves over a sweep of learning rates.

    python benchmarks/cache_features.py [EPOCHS]

Trains the linear probe of configs/classification/digits_linear_probe.yaml with several learning rates by
the function behind `vispeft train`, once on the images and once with cache_features, into an empty cache that all rates
share. A run is everything from the config to its run directory, the first kept one with the computation of the
outputs. Ratios are of processor seconds, which other work on the machine does not change. Writes
results/cache_features.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write

from vispeft.cli.common import quiet_libraries
from vispeft.cli.train import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "classification" / "digits_linear_probe.yaml"
RATES = (1e-2, 1e-1, 3e-1)


def one(rate: float, folder: Path, more: list[str]) -> dict[str, Any]:
    """Train with one learning rate; the config says for how many epochs, unless the command line does."""
    more = [*more, *(["--trainer.max_epochs", sys.argv[1]] if sys.argv[1:] else [])]
    began, used = time.perf_counter(), time.process_time()
    run = train(CONFIG, ["--model.lr", str(rate), *more], out=folder)
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - used,
        "epochs": metrics["epochs"],
        "validation": metrics["validation"]["accuracy"],
        "test": metrics["test"]["accuracy"],
    }


def main() -> None:
    """Train with and without, in turn, so that a drifting machine is the same for both."""
    quiet_libraries()
    results: dict[str, dict[str, Any]] = {"images": {}, "kept": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rate in RATES:
            for kind, more in (("images", []), ("kept", ["--cache_features", str(folder / "cache")])):
                results[kind][f"{rate:g}"] = one(rate, folder / f"{kind}-{rate:g}", more)
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*.npy"))
    totals = {kind: sum(run["processor_seconds"] for run in runs.values()) for kind, runs in results.items()}
    later = [run["processor_seconds"] for run in list(results["kept"].values())[1:]]
    ratios = {
        "sweep": totals["kept"] / totals["images"],
        "a_later_run": sum(later) / len(later) / (totals["images"] / len(RATES)),
    }
    path = write(
        "cache_features", {"ratios": ratios, "processor_seconds": totals, "cache_bytes": size, "runs": results}
    )
    print(f"The sweep takes {ratios['sweep']:.2f} of its time, a later run {ratios['a_later_run']:.2f}: {path}")


if __name__ == "__main__":
    main()
