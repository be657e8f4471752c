"""Choose the learning rates of the quickstart's configs on validation.

    python benchmarks/quickstart_lr.py --json benchmarks/results/quickstart_lr.json

Every rate trains as many epochs as the config says, with seed 0; what counts is the best validation accuracy of an
epoch. The test images are not looked at. The linear probe's rates are tried by the quickstart itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vispeft._compat import install_hook  # noqa: E402

install_hook()

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

from vispeft.cli.common import quiet_libraries, versions  # noqa: E402
from vispeft.cli.config import ConfigCLI  # noqa: E402
from vispeft.cli.runs import write_json  # noqa: E402

RATES = {"ssf": (3e-3, 1e-2, 3e-2), "lora": (1e-3, 3e-3, 1e-2)}
"""Three rates each; the probe, whose steps cost nothing, is given six by the quickstart."""


class Epochs(Callback):
    """Keeps the validation accuracy of every epoch."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracies.append(float(trainer.callback_metrics["validation/accuracy"]))


def validation_accuracies(config: Path, overrides: list[str]) -> list[float]:
    """Train as a config says, without any file.

    Args:
        config: The YAML file.
        overrides: Changes to it.

    Returns:
        The validation accuracy after each epoch.
    """
    cli = ConfigCLI(config, overrides)
    epochs = Epochs()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [epochs]}
    trainer = Trainer(**{**cli.trainer_settings, **quiet, "enable_model_summary": False})
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return epochs.accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go; rates already there are kept")
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    given = parser.parse_args()
    quiet_libraries()
    results: dict[str, dict[str, Any]] = {}
    if given.json is not None and given.json.is_file():
        results = json.loads(given.json.read_text(encoding="utf-8"))["methods"]
    for method in given.methods:
        for rate in RATES[method]:
            if f"{rate:g}" in results.setdefault(method, {}):
                continue
            began = time.perf_counter()
            config = ROOT / "configs" / "classification" / f"digits_{method}.yaml"
            accuracies = validation_accuracies(config, ["--seed_everything", "0", "--model.lr", str(rate)])
            best = max(accuracies)
            results[method][f"{rate:g}"] = {
                "best_validation": best,
                "best_epoch": accuracies.index(best) + 1,
                "last_validation": accuracies[-1],
                "epochs": len(accuracies),
                "seconds": time.perf_counter() - began,
            }
            print(f"{method:6s} {rate:<8g} best {best:.4f} in epoch {accuracies.index(best) + 1}", flush=True)
            if given.json is not None:
                machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
                command = "python benchmarks/quickstart_lr.py --json benchmarks/results/quickstart_lr.json"
                record = {"command": command, "machine": machine, "versions": versions(), "methods": results}
                write_json(given.json, record)


if __name__ == "__main__":
    main()
