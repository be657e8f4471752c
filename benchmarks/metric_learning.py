"""Emoji of classes never trained on: a frozen DINOv2-S at 112 pixels, one method after the other.

    python benchmarks/metric_learning.py --pilot               # a few steps of each row
    python benchmarks/metric_learning.py --minutes 60          # as much as fits; start again to go on
    python benchmarks/metric_learning.py --rows vptsp lora
    python benchmarks/metric_learning.py --frozen              # the figures of the backbone as it is
    python benchmarks/metric_learning.py --table               # writes the table into docs/metric_learning.md

Needs ``python benchmarks/assets.py dinov2_vit_s14`` and the three archives of `vispeft.data.EmojiData`. All rows have
the same images, head, epochs and loss, but for VPTSP, which brings its own, and for a row that shows another loss.
The learning rate of a row is chosen once, with seed 0, by R@1 of the validation classes after one epoch; the epoch of
a run likewise. Test classes are looked at once per run. The three best rows have three seeds, the others one. Backbones
compute in bfloat16, which takes half the time. Each run is a process of its own, so that its peak memory is its own,
and leaves one JSON in ``results/metric_learning/``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, I001 - first: it makes torchvision importable where its library does not fit

import assets  # noqa: E402
import torch  # noqa: E402
from common import write_section  # noqa: E402
from vispeft.building.config_files import dump_config  # noqa: E402
from vispeft.cli.common import quiet_libraries, versions  # noqa: E402
from vispeft.cli.train import train  # noqa: E402
from vispeft.data import EmojiData  # noqa: E402
from vispeft.metrics import RetrievalScores  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "metric_learning"
PAGE, ASSET = "metric_learning", "dinov2_vit_s14"
SIZE, DIM, BATCH, EPOCHS, SEEDS = 112, 384, 64, 4, (0, 1, 2)
PROXY_LR, BEST = 5e-2, 3
"""Learning rate of the proxies, and number of rows that get all seeds."""
MAIN = "recall@1"
ONE_EPOCH = ["--trainer.max_epochs", "1", "--trainer.limit_test_batches", "1"]
"""What makes a run to choose a rate by: its figures of test images are not kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    says: str
    """Name in the table."""
    method: str
    """Name of a method or of a file in ``configs/method``."""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the method."""
    rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates that are tried."""
    loss: str | None = "MultiSimilarityLoss"
    """The loss; None where the method brings its own."""


ROWS = {
    "linear": Row(says="linear head", method="linear_probe"),
    "anchor": Row(says="linear head, Proxy-Anchor", method="linear_probe", loss="ProxyAnchorLoss"),
    "bitfit": Row(says="BitFit", method="bitfit"),
    "lora": Row(says="LoRA, r = 8", method="lora", fields={"rank": 8}),
    "vptsp": Row(says="VPTSP-G", method="vptsp", rates=(3e-4, 1e-3, 3e-3), loss=None),
    "vptsp_m": Row(says="VPTSP-M", method="vptsp_m", rates=(3e-4, 1e-3, 3e-3), loss=None),
    "ssf": Row(says="SSF", method="ssf"),
    "vpt": Row(says="VPT, 10 prompts", method="vpt"),
    "bi_adaptformer": Row(says="AdaptFormer, 1 bit", method="bi_adaptformer"),
    "full": Row(says="full fine-tuning", method="full", rates=(3e-5, 1e-4)),
}
"""The rows in the order in which they are run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One row with one learning rate and one seed."""

    row: str
    """A key of `ROWS`."""
    lr: float
    """Highest learning rate of adapter and head; the proxies have their own."""
    seed: int
    """Decides start, order and augmentation."""
    short: bool = False
    """Whether it is for the choice of the rate: one epoch, no test classes."""

    @property
    def path(self) -> Path:
        """Its result."""
        return RESULTS / f"{self.row}-lr{self.lr:g}-{'short' if self.short else f'seed{self.seed}'}.json"

    def config(self, root: str) -> dict[str, Any]:
        """Return the config of the training.

        Args:
            root: Folder of the archives.
        """
        row, asset = ROWS[self.row], assets.ASSETS[ASSET]
        return {
            "seed_everything": self.seed,
            "model": {
                "class_path": "vispeft.tasks.MetricLearning",
                "init_args": {
                    "backbone": asset.architecture,
                    "backbone_args": {"img_size": SIZE},
                    "weights": str(assets.weights(ASSET)),
                    "method": {"class_path": row.method, "init_args": row.fields},
                    **({} if row.loss is None else {"loss": row.loss}),
                    "dim": DIM,
                    "head_norm": "affine",
                    "lr": self.lr,
                    "proxy_lr": PROXY_LR,
                },
            },
            "data": {
                "class_path": "vispeft.data.EmojiData",
                "init_args": {"root": root, "image_size": SIZE, "batch_size": BATCH, "images_per_class": 2},
            },
            "trainer": {"max_epochs": EPOCHS, "gradient_clip_val": 5.0, "precision": "bf16-mixed"},
        }

    def run(self, root: str, overrides: list[str]) -> dict[str, Any]:
        """Train, measure, and return the figures.

        Args:
            root: Folder of the archives.
            overrides: Further settings, as on the command line.
        """
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            config.write_text(dump_config(self.config(root)))
            place = train(config, overrides, out=Path(folder) / "run", command="benchmarks/metric_learning.py")
            metrics = json.loads((place / "metrics.json").read_text())
        return {
            **dataclasses.asdict(self),
            "validation": metrics["validation"],
            **({} if self.short else {"test": metrics["test"]}),
            "parameters": metrics["parameters"],
            "seconds": time.perf_counter() - began,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def frozen(root: str) -> dict[str, Any]:
    """Measure the features of the backbone as it is.

    Args:
        root: Folder of the archives.
    """
    asset = assets.ASSETS[ASSET]
    model = vispeft.create_model(asset.architecture, weights=str(assets.weights(ASSET)), img_size=SIZE).eval()
    data = EmojiData.for_model(model, root=root, image_size=SIZE, batch_size=BATCH)
    found: dict[str, Any] = {}
    for split, stage in (("validation", "fit"), ("test", "test")):
        data.setup(stage)
        scores = RetrievalScores()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for images, labels, roles in data.val_dataloader() if split == "validation" else data.test_dataloader():
                scores.update(model(images).float(), labels, roles)
        found[split] = {name: float(value) for name, value in scores.compute().items()}
    return {**found, "versions": versions()}


def best_rate(row: str) -> float | None:
    """Choose the learning rate of a row by validation after one epoch; None until all were tried."""
    tried = list(short_runs(row))
    if not all(trial.path.is_file() for trial in tried):
        return None
    return max(tried, key=lambda trial: read(trial)["validation"][MAIN]).lr


def short_runs(row: str) -> Iterator[Trial]:
    """Iterate over the runs that choose the rate of a row."""
    return (Trial(row=row, lr=lr, seed=SEEDS[0], short=True) for lr in ROWS[row].rates)


def read(trial: Trial) -> dict[str, Any]:
    """Read the result of a run."""
    found: dict[str, Any] = json.loads(trial.path.read_text())
    return found


def finished(row: str) -> list[dict[str, Any]]:
    """Read the results of a row with its chosen rate, by seed."""
    rate = best_rate(row)
    trials = [] if rate is None else [Trial(row=row, lr=rate, seed=seed) for seed in SEEDS]
    return [read(trial) for trial in trials if trial.path.is_file()]


def trials(rows: list[str]) -> Iterator[Trial]:
    """Iterate over the runs in their order: the rates and seed 0 of each row, then other seeds of the best rows."""
    for row in rows:
        yield from short_runs(row)
        rate = best_rate(row)
        if rate is not None:
            yield Trial(row=row, lr=rate, seed=SEEDS[0])
    scored = {row: found[0]["validation"][MAIN] for row in rows if (found := finished(row))}
    for row in sorted(scored, key=lambda name: -scored[name])[:BEST]:
        rate = best_rate(row)
        assert rate is not None
        yield from (Trial(row=row, lr=rate, seed=seed) for seed in SEEDS[1:])


def table() -> list[str]:
    """Make the table, rows that were not run included."""
    heads = ["row", "R@1", "MAP@R", "validation R@1", "trained", "deployed", "seconds", "peak MiB", "rate", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    if FROZEN.is_file():
        found_frozen = json.loads(FROZEN.read_text())
        cells = [f"{found_frozen[split][key]:.3f}" for split, key in FIGURES]
        lines.append("| " + " | ".join(["features of the backbone as it is", *cells, "0", *[""] * 5]) + " |")
    for name, row in ROWS.items():
        found = finished(name)
        if not found:
            lines.append(f"| {row.says} |" + " |" * (len(heads) - 2) + " not run yet |")
            continue
        first, counts = found[0], found[0]["parameters"]
        cells = [
            *(_mean([run[split][key] for run in found]) for split, key in FIGURES),
            f"{counts['trained']:,}",
            f"{counts['deployed']:,}",
            f"{first['seconds']:.0f}",
            f"{max(run['peak_mib'] for run in found):.0f}",
            f"{first['lr']:g}",
            str(len(found)),
        ]
        lines.append("| " + " | ".join([row.says, *cells]) + " |")
    return lines


FROZEN = RESULTS / "frozen.json"
FIGURES = (("test", MAIN), ("test", "map@r"), ("validation", MAIN))


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--root", default="downloads/npm", help="folder of the archives")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--pilot", action="store_true", help="a few steps of each row, nothing is kept")
    parser.add_argument("--frozen", action="store_true", help="measure the features of the backbone as it is")
    parser.add_argument("--table", action="store_true", help="write the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        write_section("metric learning emoji", table(), PAGE)
        return
    quiet_libraries()
    if given.frozen:
        RESULTS.mkdir(parents=True, exist_ok=True)
        FROZEN.write_text(json.dumps(frozen(given.root), indent=1) + "\n")
        return
    if given.one:
        print(json.dumps(Trial(**json.loads(given.one)).run(given.root, given.overrides)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    pilots = (Trial(row=row, lr=ROWS[row].rates[0], seed=SEEDS[0]) for row in given.rows)
    for trial in pilots if given.pilot else trials(given.rows):
        if time.monotonic() > end:
            break
        if given.pilot or not trial.path.is_file():
            carry_out(trial, given.root, FEW if given.pilot else ONE_EPOCH if trial.short else [])


FEW = [word for name in ("train", "val", "test") for word in (f"--trainer.limit_{name}_batches", "4")]
"""What makes a pilot short."""


def carry_out(trial: Trial, root: str, overrides: list[str]) -> None:
    """Run a trial in a process of its own, and keep its result; that of a pilot is printed alone."""
    command = [sys.executable, __file__, "--root", root, "--one", json.dumps(dataclasses.asdict(trial))]
    done = subprocess.run([*command, "--", *overrides], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{trial.path.stem}: failed with status {done.returncode}", flush=True)
        return
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if overrides is not FEW:
        trial.path.write_text(json.dumps(result, indent=1) + "\n")
    found = f"validation {result['validation'][MAIN]:.4f}, {result['seconds']:.0f} s, {result['peak_mib']:.0f} MiB"
    print(f"{trial.path.stem}: {found}", flush=True)


if __name__ == "__main__":
    assert vispeft.__version__
    main()
