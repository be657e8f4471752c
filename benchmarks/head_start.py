"""Few images: training from a random classifier beside training from a probe (`head_start: probe`).

    python benchmarks/head_start.py --pilot       # one run of each method, nothing written: how long will it take?
    python benchmarks/head_start.py               # all runs; start again to go on
    python benchmarks/head_start.py --table       # writes the table into docs/benchmarks.md

8, 16 and 32 training images of a class of Fashion-MNIST and of scikit-learn's digits, 10 of a class to choose by, three
seeds, four methods on ``zoo:vit_tiny``, with and without the start, and the probe of frozen features alone. Learning
rates are those that `fewshot.py` chose for the backbone, the same with and without the start. The best epoch is chosen
on validation; the test images are looked at once per run. Every run leaves one JSON in ``results/head_start/``; what is
there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import write_section  # noqa: E402
from fewshot import write  # noqa: E402
from pretrain_data import Folders, read_fashion  # noqa: E402

import vispeft  # noqa: E402
from vispeft.cli.common import versions  # noqa: E402
from vispeft.data import ImageData  # noqa: E402
from vispeft.data.base import MemorySplit  # noqa: E402
from vispeft.tasks import Classification, RunCheckpoints  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "head_start"

CLASSES = 10
CHOOSE_PER_CLASS, TEST_PER_CLASS = 10, 50
BATCH = 16
SEEDS = 3
SHOTS = {8: 6, 16: 3, 32: 2}
"""Epochs by training images of a class: 30, 30 and 40 steps of 16 images."""
DATA = {"fashion": "Fashion-MNIST", "digits": "digits"}
"""Data sets and their names in the table."""
METHODS: dict[str, tuple[vispeft.Method, float]] = {
    "ssf": (vispeft.SSF(), 1e-2),
    "lora": (vispeft.LoRA(), 3e-3),
    "vpt": (vispeft.VPT(), 3e-2),
    "adaptformer": (vispeft.AdaptFormer(), 3e-3),
}
"""Methods with the learning rates that `fewshot.py` chose for ``zoo:vit_tiny``."""
PROBE = "probe"
"""Name of the run without a training: the probe of the frozen backbone's features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    data: str
    """A key of `DATA`."""
    shots: int
    """Training images of a class."""
    seed: int
    """Decides images, start and order."""
    method: str
    """A key of `METHODS`, or `PROBE`."""
    start: bool
    """Whether the classifier starts from the probe."""

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.data}-{self.shots}-{self.method}-{'start' if self.start else 'random'}-seed{self.seed}"


def trials() -> Iterator[Trial]:
    """List all runs, those of one set of images together."""
    for data, shots, seed in itertools.product(DATA, SHOTS, range(SEEDS)):
        yield Trial(data=data, shots=shots, seed=seed, method=PROBE, start=True)
        for method, start in itertools.product(METHODS, (False, True)):
            yield Trial(data=data, shots=shots, seed=seed, method=method, start=start)


class Shots(ImageData):
    """A few images of a class to train on, a few to choose by, and a fixed test split."""

    def __init__(self, images: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], trial: Trial) -> None:
        """Store what is drawn from.

        Args:
            images: Bytes (N, 1, H, W) and labels to draw from.
            test: Those of the test, of which the first of each class are taken.
            trial: The run.
        """
        super().__init__(batch_size=BATCH, seed=trial.seed)
        self.images, self.test, self.trial = images, test, trial

    @property
    def class_names(self) -> tuple[str, ...]:
        """Numbers."""
        return tuple(map(str, range(CLASSES)))

    def load(self, preprocessing: Any) -> dict[str, Any]:
        """Draw the splits."""
        images, labels = self.images
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.trial.seed))
        shots = self.trial.shots
        parts = {
            "train": (images, labels, order, 0, shots),
            "validation": (images, labels, order, shots, shots + CHOOSE_PER_CLASS),
            "test": (*self.test, torch.arange(len(self.test[1])), 0, TEST_PER_CLASS),
        }
        return {name: self._split(preprocessing, *part) for name, part in parts.items()}

    @staticmethod
    def _split(preprocessing: Any, images: Tensor, labels: Tensor, order: Tensor, first: int, last: int) -> MemorySplit:
        chosen = torch.cat([order[labels[order] == kind][first:last] for kind in range(CLASSES)])
        return MemorySplit(preprocessing.resize()(images[chosen]), labels[chosen], preprocessing)


def read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Read scikit-learn's digits: every fifth image is for the test."""
    digits = load_digits()
    grey = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    tested = torch.arange(len(labels)) % 5 == 0
    return {"train": (grey[~tested], labels[~tested]), "test": (grey[tested], labels[tested])}


def run(trial: Trial, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Train, and test the best epoch.

    Args:
        trial: What to train.
        sets: Images and labels of train and test.

    Returns:
        What is written about it.
    """
    from lightning.pytorch import Trainer, seed_everything  # behind vispeft, which may have to mend torchvision

    began, cpu = time.perf_counter(), time.process_time()
    seed_everything(trial.seed)
    probe = trial.method == PROBE
    method, lr = (vispeft.LinearProbe(), 1e-12) if probe else METHODS[trial.method]
    task = Classification(
        backbone="zoo:vit_tiny", num_classes=CLASSES, method=method, lr=lr, head_start="probe" if trial.start else None
    )
    task.model.reset_classifier(CLASSES)  # the shipped one is for these very classes
    data = Shots(sets["train"], sets["test"], trial)
    with tempfile.TemporaryDirectory() as folder:
        kept = RunCheckpoints(folder, monitor=task.monitor)
        curve: list[float] = []
        trainer = Trainer(
            # One step of a vanishing rate, so that Lightning has something to do: epoch 0 is what counts.
            **({"max_steps": 1} if probe else {"max_epochs": SHOTS[trial.shots]}),
            accelerator="cpu",
            precision="bf16-mixed",
            logger=False,
            callbacks=[kept],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        log = task.on_validation_epoch_end
        task.on_validation_epoch_end = lambda: (
            log(),
            curve.append(float(task.validation_metrics.compute()[task.monitor])),
        )
        trainer.fit(task, datamodule=data)
        task.restore(kept.best_model_path)
        best = dict(kept.best or {})
        test = trainer.test(task, datamodule=data, verbose=False)[0]["test/accuracy"]
    return {
        **dataclasses.asdict(trial),
        "backbone": "zoo:vit_tiny",
        "fields": method.to_dict()["fields"],
        "lr": lr,
        "epochs": 0 if probe else SHOTS[trial.shots],
        "batch_size": BATCH,
        "validation": best["score"],
        "best_epoch": best["epoch"] + 1,
        "curve": curve,
        "head_start": {} if task.head_start is None else task.head_start.record,
        "test": test,
        "images": {"train": trial.shots * CLASSES, **{name: len(data.split(name)) for name in ("validation", "test")}},
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "precision": "bf16-mixed",
        "versions": versions(),
    }


def pilot(sets: dict[str, Any]) -> None:
    """Run every method once for each number of images, write nothing, and say how long everything would take."""
    total = 0.0
    for shots, method in itertools.product(SHOTS, (PROBE, *METHODS)):
        facts = run(Trial(data="digits", shots=shots, seed=0, method=method, start=True), sets["digits"])
        runs = len(DATA) * SEEDS * (1 if method == PROBE else 2)
        total += runs * facts["cpu_seconds"]
        print(
            f"{shots} {method}: {facts['cpu_seconds']:.1f} s of a core, {facts['seconds']:.1f} s in all; validation "
            f"{facts['validation']:.3f}, best epoch {facts['best_epoch']} of {facts['curve']}",
            flush=True,
        )
    print(f"All of it: about {total / 60:.0f} minutes of one core.")


# --------------------------------------------------------------------------------------------------- the table


def read_results() -> list[dict[str, Any]]:
    """Read what is on disk."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def table_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Make the table.

    Args:
        found: What was written about the runs.

    Yields:
        Lines of Markdown.
    """
    yield "| data | images a class | probe | " + " | ".join(f"{m}, random | {m}, probe" for m in METHODS) + " |"
    yield "|---|--:|" + "--:|" * (1 + 2 * len(METHODS))
    for data, shots in itertools.product(DATA, SHOTS):
        cells = [_cell(found, data, shots, PROBE, True)]
        for method, start in itertools.product(METHODS, (False, True)):
            cells.append(_cell(found, data, shots, method, start))
        yield f"| {DATA[data]} | {shots} | " + " | ".join(cells) + " |"
    yield ""
    started = [facts for facts in found if facts["start"] and facts["method"] != PROBE]
    probes = {_place(facts): facts for facts in found if facts["method"] == PROBE}
    pairs = [(facts, probes[_place(facts)]) for facts in started if _place(facts) in probes]
    below = [facts for facts, probe in pairs if facts["validation"] < probe["validation"]]
    kept = [facts for facts in started if facts["best_epoch"] == 0]
    yield (
        f"On validation {len(pairs) - len(below)} of {len(pairs)} runs from the probe end at the probe of the frozen "
        f"features or above it; {len(kept)} of {len(started)} keep epoch 0. SSF, LoRA and AdaptFormer start as the "
        "identity, so that none of theirs can end below it. Prompts act from the start; a run of the command that ends "
        "below the probe says so."
    )
    yield ""
    for facts in below:
        probe, images = probes[_place(facts)], f"{facts['shots']} images a class, seed {facts['seed']}"
        pair = f"{100 * facts['validation']:.1f} against {100 * probe['validation']:.1f} %"
        yield f"* Below: {facts['method']}, {DATA[facts['data']]}, {images}: {pair}."


def _place(facts: dict[str, Any]) -> tuple[Any, ...]:
    return facts["data"], facts["shots"], facts["seed"]


def _cell(found: list[dict[str, Any]], data: str, shots: int, method: str, start: bool) -> str:
    key = (data, shots, method, start)
    tests = [100 * f["test"] for f in found if (f["data"], f["shots"], f["method"], f["start"]) == key]
    if not tests:
        return "not yet run"
    return f"{statistics.mean(tests):.1f}" + ("" if len(tests) == SEEDS else f" ({len(tests)} of {SEEDS} seeds)")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: %(default)s")
    fashion = "folder of the four IDX .gz files of Fashion-MNIST"
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help=fashion)
    parser.add_argument("--pilot", action="store_true", help="one run of each kind on digits, nothing written")
    parser.add_argument("--table", action="store_true", help="write the table into docs/benchmarks.md, and leave")
    args = parser.parse_args()
    if args.table:
        write_section("head_start", table_lines(read_results()))
        return
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sets = {"digits": read_digits()}
    if args.pilot:
        pilot(sets)
        return
    deadline = time.monotonic() + 60 * args.minutes
    work = ROOT / "runs" / "pretrain" / "data"
    work.mkdir(parents=True, exist_ok=True)
    sets["fashion"] = read_fashion(Folders(args.fashion, ROOT, ROOT, work))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for trial in trials():
        path = RESULTS / f"{trial.stem}.json"
        if path.is_file():
            continue
        if time.monotonic() > deadline:
            raise SystemExit("The time is used up; start again to go on.")
        facts = run(trial, sets[trial.data])
        write(path, facts)
        print(f"{trial.stem}: validation {facts['validation']:.3f}, test {facts['test']:.3f}", flush=True)


if __name__ == "__main__":
    main()
