"""Several dense tasks with the shipped tiny Swin: methods with tasks of their own, copies per task, shared ones.

    python benchmarks/multitask.py scenes --pilot              # one epoch per row, on few images, no test split
    python benchmarks/multitask.py scenes --minutes 60         # as much as fits; start again to go on
    python benchmarks/multitask.py earth --root downloads/pypi --rows mtlora decoders
    python benchmarks/multitask.py --table                     # writes the tables into docs/multitask.md

All rows of a data set have the same images, maps, decoders, epochs and optimiser. The learning rate of a row is chosen
once, with seed 0, by its validation score (`vispeft.tasks.baselines.mean_score`), the best epoch of each run likewise;
test images are looked at once per seed. The single-task row trains one model per task, and is what delta m compares
with; another column compares with the decoders alone, and has the lowest of the seeds. Every run leaves one JSON in
``results/multitask/``; what is there is not run again, so two processes may share the work by taking different rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, I001 - first: it makes torchvision importable where its library does not fit

import torch  # noqa: E402

from common import write_section  # noqa: E402
from vispeft.building.config_files import dump_config  # noqa: E402
from vispeft.cli.common import quiet_libraries, versions  # noqa: E402
from vispeft.cli.train import train  # noqa: E402
from vispeft.errors import VispeftError  # noqa: E402
from vispeft.metrics import delta_m  # noqa: E402
from vispeft.tasks.baselines import mean_score  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "multitask"
PAGE = "multitask"
DATA: dict[str, dict[str, Any]] = {
    "scenes": {
        "class_path": "vispeft.data.SceneMultiTaskData",
        "init_args": {"images": 240, "scene_size": 96, "image_size": 96, "batch_size": 8},
    },
    "earth": {
        "class_path": "vispeft.data.EarthMultiTaskData",
        "init_args": {"root": "downloads/pypi", "overlapping": True, "image_size": 128, "batch_size": 8},
    },
}
TASKS = {"scenes": ("semseg", "sal", "normals", "depth", "edge"), "earth": ("climate", "land", "coast", "relief")}
BETTER = {"miou": True, "odsf": True}
"""Main figures of which more is better; of others, less is."""
EPOCHS = {"scenes": 10, "earth": 30}
"""Passes over the training images; the few tiles of the Earth need more of them."""
SEEDS, WEIGHT_DECAY, DECODER_LR = (0, 1, 2), 0.01, 3e-3
DECODER = {"decoder": "segformer", "decoder_args": {"channels": 64}}
"""Decoders of all rows: small ones, so that the backbone takes most of the time."""
FULL, PARTS = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3)
"""Rates that are tried: of methods that train the backbone, and of others."""
FFN = {"roles": ["mlp"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    says: str
    """Name in the table."""
    method: str = "linear_probe"
    """Name of a method or of a file in ``configs/method``."""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the method."""
    shared: bool = False
    """Whether all tasks use the same units."""
    alone: bool = False
    """Whether each task has a model of its own."""
    rates: tuple[float, ...] = PARTS
    """Learning rates that are tried."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of the task."""


NORMS = {"output_norms": True}
STAGES = {"merged_maps": False}
"""Maps of MTLoRA at the ends of the stages, as those of all other rows."""
ROWS = {
    "single": Row(says="single-task full", method="full", shared=True, alone=True, rates=FULL),
    "decoders": Row(says="decoders only", shared=True, rates=(DECODER_LR,)),
    "mtlora": Row(says="MTLoRA, r = 16", method="mtlora", fields={"rank": 16, **STAGES}),
    "polyhistor": Row(says="Polyhistor", method="polyhistor", settings=NORMS),
    "full": Row(says="multi-task full", method="full", shared=True, rates=FULL),
    "bitfit": Row(says="BitFit", method="bitfit", fields={"include_rel_pos_bias": True}),
    "lora": Row(says="LoRA, r = 4", method="lora", fields={"rank": 4, "roles": ["attn.qkv"]}),
    "adapter": Row(says="adapter", method="adapter_half"),
    "mtlora_plus": Row(says="MTLoRA+, r = 16", method="mtlora", fields={"rank": 16, "plus": True, **STAGES}),
    "mtlora_merged": Row(says="MTLoRA, r = 16, maps behind patch merging", method="mtlora", fields={"rank": 16}),
    "mtlora_1bit": Row(says="MTLoRA, r = 16, 1 bit", method="mtlora", fields={"rank": 16, "bits": 1, **STAGES}),
    "polyhistor_lite": Row(says="Polyhistor-Lite", method="polyhistor_lite", settings=NORMS),
    "hyperformer": Row(says="HyperFormer", method="hyperformer", settings=NORMS),
    "rel_pos": Row(says="relative bias only", method="bitfit", fields={"roles": ["rel_pos"]}),
    "vpt_shallow": Row(says="prompts in windows, shallow", method="vpt_window", fields={"deep": False}),
    "vpt_deep": Row(says="prompts in windows, deep", method="vpt_window", fields={"deep": True}),
    "shared_adapter": Row(says="shared adapter", method="adapter_half", shared=True),
    "low_rank_adapter": Row(says="low-rank adapter", method="low_rank_adapter"),
    "phm": Row(says="PHM layers", method="phm_adapter"),
    "compacter": Row(says="Compacter", method="compacter"),
    "compacter_plus": Row(says="Compacter++", method="compacter_plus"),
}
"""The rows in the order in which they are run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One row with one learning rate and one seed."""

    data: str
    """A key of `DATA`."""
    row: str
    """A key of `ROWS`."""
    lr: float
    """Highest learning rate of the adapter; the decoders have their own."""
    seed: int
    """Decides start, order and augmentation."""
    epochs: int | None = None
    """Passes over the training images; None takes those of the data."""

    @property
    def path(self) -> Path:
        """Its result."""
        return RESULTS / f"{self.data}-{self.row}-lr{self.lr:g}-seed{self.seed}.json"

    def config(self, tasks: tuple[str, ...], root: str | None) -> dict[str, Any]:
        """Return the config of a training.

        Args:
            tasks: Tasks of the model.
            root: Folder of the data, where they have files.
        """
        row, data = ROWS[self.row], DATA[self.data]
        places = {} if root is None or "root" not in data["init_args"] else {"root": root}
        return {
            "seed_everything": self.seed,
            "model": {
                "class_path": "vispeft.tasks.MultiTaskDense",
                "init_args": {
                    "backbone": "zoo:swin_tiny",
                    "method": {"class_path": row.method, "init_args": row.fields},
                    "shared": row.shared,
                    "lr": self.lr,
                    "decoder_lr": DECODER_LR,
                    "weight_decay": WEIGHT_DECAY,
                    **DECODER,
                    **row.settings,
                },
            },
            "data": {**data, "init_args": {**data["init_args"], **places, "tasks": list(tasks)}},
            "trainer": {"max_epochs": self.epochs or EPOCHS[self.data], "gradient_clip_val": 5.0},
        }

    def run(self, root: str | None, overrides: list[str]) -> dict[str, Any]:
        """Train, measure, and return the figures of all tasks.

        Args:
            root: Folder of the data, where they have files.
            overrides: Further settings, as on the command line.
        """
        began, tasks = time.perf_counter(), TASKS[self.data]
        groups = [(task,) for task in tasks] if ROWS[self.row].alone else [tasks]
        found: dict[str, Any] = {"validation": {}, "test": {}, "main": {}, "trainable": 0, "decoders": 0}
        for group in groups:
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder) / "config.yaml"
                config.write_text(dump_config(self.config(group, root)))
                place = train(config, overrides, out=Path(folder) / "run", command="benchmarks/multitask.py")
                metrics = json.loads((place / "metrics.json").read_text())
            for split in ("validation", "test"):
                named = {name: value for name, value in metrics[split].items() if "/" in name}
                found[split] |= named
            found["main"] |= metrics["main_figures"]
            found["trainable"] += metrics["parameters"]["trainable"]
            found["decoders"] += metrics["parameters"]["decoder"]
        return {**found, "seconds": time.perf_counter() - began}


def score(result: dict[str, Any], split: str) -> float:
    """Compute `mean_score` of the main figures of a result: a figure of zero counts as small, and is no error."""
    figures = {task: torch.tensor(result[split][f"{task}/{main}"]) for task, main in result["main"].items()}
    return float(mean_score(figures, {task: BETTER.get(main, False) for task, main in result["main"].items()}))


def trials(data: str, rows: list[str]) -> Iterator[Trial]:
    """Iterate over the runs in the order in which they are done: the rates with seed 0, then the other seeds."""
    for row in rows:
        yield from (Trial(data=data, row=row, lr=lr, seed=SEEDS[0]) for lr in ROWS[row].rates)
    for seed in SEEDS[1:]:
        for row in rows:
            chosen = best_rate(data, row)
            if chosen is not None:
                yield Trial(data=data, row=row, lr=chosen, seed=seed)


def best_rate(data: str, row: str) -> float | None:
    """Choose the learning rate of a row by validation with seed 0; None until all were tried."""
    tried = [Trial(data=data, row=row, lr=lr, seed=SEEDS[0]) for lr in ROWS[row].rates]
    if not all(trial.path.is_file() for trial in tried):
        return None
    return max(tried, key=lambda trial: score(json.loads(trial.path.read_text()), "validation")).lr


def finished(data: str, row: str) -> dict[int, dict[str, Any]]:
    """Read the results of a row with its chosen rate, by seed."""
    rate = best_rate(data, row)
    paths = {} if rate is None else {seed: Trial(data=data, row=row, lr=rate, seed=seed).path for seed in SEEDS}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}


def gains(result: dict[str, Any], single: dict[str, Any]) -> float:
    """Compute delta m of a result over single-task models, in percent."""
    main = result["main"]
    figures = ({task: found["test"][f"{task}/{name}"] for task, name in main.items()} for found in (result, single))
    return delta_m(*figures, {task: BETTER.get(name, False) for task, name in main.items()})


def table(data: str) -> list[str]:
    """Make the table of a data set, rows that were not run included."""
    tasks, singles, decoders = TASKS[data], finished(data, "single"), finished(data, "decoders")
    mains = next((found["main"] for row in ROWS for found in finished(data, row).values()), dict.fromkeys(tasks, ""))
    heads = [f"{task} {mains[task]}{'' if BETTER.get(mains[task], False) else ' (less is better)'}" for task in tasks]
    lines = [
        "| " + " | ".join(["row", *heads, *COLUMNS]) + " |",
        "|---" + "|---:" * (len(tasks) + len(COLUMNS)) + "|",
    ]
    for name, row in ROWS.items():
        found = finished(data, name)
        if not found:
            lines.append(f"| {row.says} |" + " |" * (len(tasks) + len(COLUMNS) - 1) + " not run yet |")
            continue
        cells = [_mean([result["test"][f"{task}/{mains[task]}"] for result in found.values()]) for task in tasks]
        deltas, above = (
            [gains(result, others[seed]) for seed, result in found.items() if seed in others]
            for others in (singles, decoders)
        )
        compared = [_mean(deltas, 1) if deltas else "", f"{min(above):.1f}" if above else ""]
        first = found[min(found)]
        counts = [f"{first['trainable']:,}", f"{first['decoders']:,}", f"{first['seconds']:.0f}", str(len(found))]
        lines.append("| " + " | ".join([row.says, *cells, *compared, *counts]) + " |")
    return lines


COLUMNS = ("delta m %", "over decoders only % (lowest seed)", "trainable", "decoders", "seconds", "seeds")


def _mean(values: list[float], digits: int = 4) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=list(DATA))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--root", help="folder of the data's files")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--pilot", action="store_true", help="one short epoch per row, nothing is kept")
    parser.add_argument("--table", action="store_true", help="write the tables")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.table:
        for data in DATA:
            write_section(f"multitask {data}", table(data), PAGE)
        return
    if given.data is None:
        parser.error("name the data, scenes or earth, or give --table")
    quiet_libraries()
    end = time.monotonic() + 60 * given.minutes
    if given.pilot:
        pilot(given.data, given.rows, given.root, end)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for trial in trials(given.data, given.rows):
        if time.monotonic() > end:
            break
        if not trial.path.is_file():
            settings = {**dataclasses.asdict(trial), "epochs": EPOCHS[trial.data]}
            result = {**settings, **trial.run(given.root, []), "versions": versions()}
            trial.path.write_text(json.dumps(result, indent=1) + "\n")
            print(trial.path.stem, f"score {score(result, 'validation'):.4f}", f"{result['seconds']:.0f} s", flush=True)


def pilot(data: str, rows: list[str], root: str | None, end: float) -> None:
    """Train every row for a few steps, to find those that cannot run, and how long an image takes."""
    few = [
        "--trainer.limit_train_batches",
        "4",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.limit_test_batches",
        "1",
    ]
    for row in rows:
        if time.monotonic() > end:
            break
        trial = Trial(data=data, row=row, lr=ROWS[row].rates[0], seed=SEEDS[0], epochs=1)
        try:
            result = trial.run(root, few)
        except VispeftError as error:
            print(f"{row}: {error}", flush=True)
            continue
        print(f"{row}: score {score(result, 'validation'):.4f}, {result['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    assert vispeft.__version__
    main()
