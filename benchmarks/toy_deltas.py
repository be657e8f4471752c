"""Changes of weights, masks and schedules on a toy: a tiny ViT that knows digits learns turned ones.

    python benchmarks/toy_deltas.py --pilot      # one run of each method, nothing written: how long will it take?
    python benchmarks/toy_deltas.py              # all runs; start again to go on
    python benchmarks/toy_deltas.py --table      # writes the table into docs/benchmarks.md

A ViT of four blocks, 64 wide, is pretrained on 1,000 of scikit-learn's digits. Then each method adapts it to digits
that are turned by a quarter, inverted and put into five classes: 400 images to train on, 200 to choose by, 597 for the
test, 300 steps of AdamW. The learning rate of a method is chosen once, with seed 0, on validation; the test images are
looked at once per seed. Every run leaves one JSON in ``results/toy_deltas/``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import write_section  # noqa: E402
from fewshot import write  # noqa: E402

import vispeft  # noqa: E402
from vispeft.cli.common import versions  # noqa: E402
from vispeft.data import ImageData  # noqa: E402
from vispeft.data.base import MemorySplit  # noqa: E402
from vispeft.data.preprocessing import Preprocessing  # noqa: E402
from vispeft.methods import ranks_of, top_heads  # noqa: E402
from vispeft.tasks import Classification, SampledLayers  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "toy_deltas"
BACKBONE = ROOT / "runs" / "toy_deltas" / "backbone.safetensors"
"""The pretrained network, made by the first start; git ignores it."""

ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
PRETRAIN, CHOOSE, TRAIN, TEST = 1000, 200, 400, 597
"""Images of the pretraining, behind which come those to choose by, and the test; the first ones adapt."""
CLASSES, GROUPS = 10, 5
BATCH, EPOCHS = 40, 30
"""300 steps."""
PRETRAIN_EPOCHS, PRETRAIN_LR = 40, 2e-3
SEEDS = 3

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SPARSE = functools.partial(vispeft.Sparse, budget="lora:2")
"""8,192 entries in all layers together."""
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of factors and of values that are added to weights."""
SINGULAR = (1e-2, 3e-2, 1e-1)
"""Learning rates of singular values, which are of order 1 to 10, and of LoFiT, where the classifier does most."""
MASKED = (3e-4, 1e-3, 3e-3)
"""Learning rates of masks: with 300 steps a weight flips from about 1e-4 on."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is run."""

    method: vispeft.Method
    """The method."""
    rates: tuple[float, ...] = RATES
    """Learning rates that are tried."""
    prototype: str = ""
    """Accuracy of a prototype that was written from the paper before this library, of one seed on other images."""
    schedule: Callable[[], SampledLayers] | None = None
    """Makes a schedule over blocks."""
    heads: int = 0
    """Number of the heads with offsets, which a first training with scales chooses; 0 for no first training."""


METHODS: dict[str, Entry] = {
    "linear_probe": Entry(vispeft.LinearProbe(), (1e-2, 3e-2, 1e-1), "0.44 to 0.48"),
    "full": Entry(vispeft.Full(), (3e-4, 1e-3, 3e-3), "0.88"),
    "lora, rank 4": Entry(vispeft.LoRA(rank=4, alpha=8, roles=LINEARS), prototype="0.88"),
    "bone (MiSS), rank 8": Entry(vispeft.Bone(rank=8), prototype="0.89"),
    "bone (BAT), rank 8": Entry(vispeft.Bone(rank=8, variant="bat"), prototype="0.90"),
    "svfit": Entry(vispeft.SVFit(), SINGULAR, "0.89"),
    "mask, attention": Entry(vispeft.Mask(), MASKED, "0.81"),
    "mask, four linears": Entry(vispeft.Mask(roles=LINEARS), MASKED, "0.86"),
    "sparse, random": Entry(SPARSE(), prototype="0.88"),
    "sparse, magnitude": Entry(SPARSE(support="magnitude"), prototype="0.87"),
    "sparse, lift": Entry(SPARSE(support="lift"), prototype="0.86"),
    "sparse, gradient": Entry(SPARSE(support="gradient"), prototype="0.83"),
    "sparse, rigl": Entry(SPARSE(schedule="rigl")),
    "lofit, scales": Entry(vispeft.LoFiT(), SINGULAR, "0.48"),
    "lofit, offsets of 8 heads": Entry(vispeft.LoFiT(stage="offsets"), SINGULAR, "0.50 (16 heads)", heads=8),
    "pst, half removed": Entry(vispeft.PST(sparsity=0.5, start="kaiming")),
    "triadapt, mean rank 4": Entry(vispeft.TriAdapt(rank=4, alpha=8)),
    "mos": Entry(vispeft.MoS()),
    "snell": Entry(vispeft.SNELL()),
    "mlae": Entry(vispeft.MLAE()),
    "adapter_plus": Entry(vispeft.AdapterPlus()),
    "mona": Entry(vispeft.Mona(bottleneck=8)),
    "conformer_adapter": Entry(vispeft.ConformerAdapter(reduction=8, kernel=9)),
    "lora, IST": Entry(
        vispeft.LoRA(rank=4, alpha=8, roles=LINEARS), prototype="0.72 at 3e-3, 0.61 at 1e-2", schedule=SampledLayers
    ),
    "lora, blocks drawn alike": Entry(
        vispeft.LoRA(rank=4, alpha=8, roles=LINEARS),
        prototype="0.74 at 3e-3, 0.70 at 1e-2",
        schedule=functools.partial(SampledLayers, uniform=True),
    ),
}
"""What is run, by its name in the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    method: str
    """A key of `METHODS`."""
    lr: float
    """Highest learning rate."""
    seed: int
    """Decides start and order of the images."""

    @property
    def stem(self) -> str:
        """Name of its file."""
        plain = "".join(letter for letter in self.method if letter.isalnum() or letter in "_ ")
        return f"{plain.replace(' ', '_')}-lr{self.lr:g}-seed{self.seed}"


# ---------------------------------------------------------------------------------------------- images, backbone


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Read scikit-learn's digits in a fixed random order, as bytes (N, 1, 8, 8) and labels, by split."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8)[:, None][order]
    labels = torch.from_numpy(found.target).long()[order]
    cuts = {
        "pretrain": slice(0, PRETRAIN),
        "train": slice(0, TRAIN),
        "validation": slice(PRETRAIN, PRETRAIN + CHOOSE),
        "test": slice(PRETRAIN + CHOOSE, None),
    }
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


def turned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Turn images by a quarter, invert them, and put digits d and d + 5 into one class."""
    return 255 - images.rot90(1, (2, 3)), labels % GROUPS


class Turned(ImageData):
    """Images of the new task."""

    def __init__(self, sets: dict[str, tuple[Tensor, Tensor]], seed: int) -> None:
        """Store what the splits are made of.

        Args:
            sets: As from `digits`.
            seed: Decides the order.
        """
        super().__init__(batch_size=BATCH, seed=seed)
        self.sets = sets

    @property
    def class_names(self) -> tuple[str, ...]:
        """Pairs of digits."""
        return tuple(f"{digit} or {digit + GROUPS}" for digit in range(GROUPS))

    def load(self, preprocessing: Any) -> dict[str, Any]:
        """Turn the images of all splits."""
        found = {}
        for name in ("train", "validation", "test"):
            images, labels = turned(*self.sets[name])
            found[name] = MemorySplit(preprocessing.resize()(images), labels, preprocessing)
        return found


def pretrain(sets: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Train the backbone on upright digits, write it, and return its accuracy on the test images of these."""
    torch.manual_seed(0)
    model: Any = vispeft.create_model(ARCHITECTURE, pretrained=False, num_classes=CLASSES, **SHAPE)
    preprocessing = Preprocessing.of(model)

    def seen(name: str) -> tuple[Tensor, Tensor]:
        images, labels = sets[name]
        return preprocessing.normalise()(preprocessing.resize()(images).expand(-1, 3, -1, -1)), labels

    images, labels = seen("pretrain")
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LR)
    steps = PRETRAIN_EPOCHS * len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_LR, total_steps=steps)
    for _ in range(PRETRAIN_EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    images, labels = seen("test")
    with torch.inference_mode():
        accuracy = float((model.eval()(images).argmax(1) == labels).float().mean())
    model.reset_classifier(0)
    BACKBONE.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), BACKBONE)
    return accuracy


# -------------------------------------------------------------------------------------------------- training


class Run:
    """One training of one method."""

    def __init__(self, trial: Trial, sets: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Train.

        Args:
            trial: What.
            sets: As from `digits`.
        """
        began, entry = time.process_time(), METHODS[trial.method]
        self.trial, self.data, method = trial, Turned(sets, trial.seed), entry.method
        if entry.heads:
            first, _ = self._fit(vispeft.LoFiT(), 1e-2, None)
            method = dataclasses.replace(method, heads=top_heads(first.bank, entry.heads))  # type: ignore[call-arg]
        self.task, self.trainer = self._fit(method, trial.lr, entry.schedule)
        counts = self.task.bank.report()
        self.facts: dict[str, Any] = {
            **dataclasses.asdict(trial),
            "fields": method.to_dict()["fields"],
            "validation": float(self.trainer.callback_metrics["validation/accuracy"]),
            "trainable": counts.trainable,
            "trainable_head": counts.trainable_head,
            "stored_bytes": counts.stored_bytes,
            "removed": removed(self.task.bank),
            "ranks": list(ranks_of(self.task.bank).values()),
            "cpu_seconds": time.process_time() - began,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def _fit(self, method: vispeft.Method, lr: float, schedule: Callable[[], Any] | None) -> tuple[Any, Any]:
        from lightning.pytorch import Trainer, seed_everything  # behind vispeft, which may have to mend torchvision

        seed_everything(self.trial.seed)
        task = Classification(
            backbone=ARCHITECTURE,
            backbone_args=dict(SHAPE),
            weights=str(BACKBONE),
            num_classes=GROUPS,
            method=method,
            lr=lr,
        )
        trainer = Trainer(
            max_epochs=EPOCHS,
            check_val_every_n_epoch=EPOCHS,
            accelerator="cpu",
            logger=False,
            callbacks=[] if schedule is None else [schedule()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(task, datamodule=self.data)
        return task, trainer

    def test(self) -> float:
        """Measure accuracy on the test images."""
        return float(self.trainer.test(self.task, datamodule=self.data, verbose=False)[0]["test/accuracy"])


def removed(bank: Any) -> float | None:
    """Measure the share of the adapted weights that masks remove; None where there are none."""
    masks = [unit.mask for unit in bank.units().values() if isinstance(unit, vispeft.methods.mask.MaskUnit)]
    if not masks:
        return None
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def search(name: str, sets: dict[str, tuple[Tensor, Tensor]], seeds: int, deadline: float) -> None:
    """Choose the rate of a method, then train and test it with every seed, but for what is on disk.

    Args:
        name: A key of `METHODS`.
        sets: As from `digits`.
        seeds: How many.
        deadline: On `time.monotonic`: no run is begun after it.
    """
    runs: dict[float, Run] = {}
    tried = {}
    for lr in METHODS[name].rates:
        trial = Trial(method=name, lr=lr, seed=0)
        facts = on_disk(trial)
        if facts is None:
            runs[lr] = begun(trial, sets, deadline)
            facts = runs[lr].facts
        tried[lr] = facts["validation"]
    best = max(tried, key=lambda lr: (tried[lr], -lr))
    for seed in range(seeds):
        trial = Trial(method=name, lr=best, seed=seed)
        if "test" in (on_disk(trial) or {}):
            continue
        run = runs[best] if seed == 0 and best in runs else begun(trial, sets, deadline)
        accuracy = run.test()
        write(path_of(trial), {**run.facts, "test": accuracy})
        print(f"{trial.stem}: test {accuracy:.3f}", flush=True)


def begun(trial: Trial, sets: dict[str, tuple[Tensor, Tensor]], deadline: float) -> Run:
    """Train, unless the time is used up, and write what is known without the test images."""
    if time.monotonic() > deadline:
        raise SystemExit("The time is used up; start again to go on.")
    run = Run(trial, sets)
    write(path_of(trial), run.facts)
    print(f"{trial.stem}: validation {run.facts['validation']:.3f}", flush=True)
    return run


def path_of(trial: Trial) -> Path:
    """Name the file of a run."""
    return RESULTS / f"{trial.stem}.json"


def on_disk(trial: Trial) -> dict[str, Any] | None:
    """Read what an earlier start found."""
    path = path_of(trial)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def pilot(sets: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Run every method once, write nothing, and say how long everything would take."""
    total = 0.0
    for name, entry in METHODS.items():
        facts = Run(Trial(method=name, lr=entry.rates[1], seed=0), sets).facts
        total += facts["cpu_seconds"] * (len(entry.rates) + SEEDS - 1)
        print(f"{name}: {facts['cpu_seconds']:.1f} s of a core, validation {facts['validation']:.3f}", flush=True)
    print(f"All of it: about {total / 60:.0f} minutes of one core.")


# --------------------------------------------------------------------------------------------------- the table


def table_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Make the table.

    Args:
        found: What was written about the runs.

    Yields:
        Lines of Markdown.
    """
    yield "| method | trainable | stored bytes | rate | validation | test | prototype |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name, entry in METHODS.items():
        runs = [facts for facts in found if facts["method"] == name and "test" in facts]
        if not runs:
            yield f"| {name} | not yet run | | | | | {entry.prototype} |"
            continue
        first, tests = runs[0], [facts["test"] for facts in runs]
        spread = f"± {statistics.stdev(tests):.3f}" if len(tests) > 1 else "one seed"
        marked = name + told(first) + ("" if len(tests) == SEEDS else f" ({len(tests)} of {SEEDS} seeds)")
        validation = statistics.mean(facts["validation"] for facts in runs)
        yield (
            f"| {marked} | {first['trainable']:,} | {first['stored_bytes']:,} | {first['lr']:g} | {validation:.3f} | "
            f"{statistics.mean(tests):.3f} {spread} | {entry.prototype} |"
        )
    yield from supports(found)


def told(facts: dict[str, Any]) -> str:
    """Tell what else is known about the weights of a run."""
    ranks = facts.get("ranks")
    if ranks:
        return f", ranks {min(ranks)} to {max(ranks)}, mean {statistics.mean(ranks):.1f}"
    return f", {100 * facts['removed']:.0f} % of the weights removed" if facts.get("removed") is not None else ""


def supports(found: list[dict[str, Any]]) -> Iterator[str]:
    """Compare the choices of sparse entries with the random one.

    Args:
        found: What was written about the runs.

    Yields:
        Lines of Markdown; none before the random entries were tested.
    """
    tests = {
        name: [facts["test"] for facts in found if facts["method"] == name and "test" in facts]
        for name in METHODS
        if name.startswith("sparse, ")
    }
    means = {name.removeprefix("sparse, "): statistics.mean(values) for name, values in tests.items() if values}
    drawn = means.pop("random", None)
    if drawn is None or not means:
        return
    error = 100 * math.sqrt(drawn * (1 - drawn) / TEST)
    told = ", ".join(f"{name} {100 * (mean - drawn):+.1f}" for name, mean in means.items())
    yield ""
    yield (
        f"Choices of the sparse entries over random ones, in points: {told}. The standard error of one accuracy on "
        f"{TEST} images is {error:.1f} points."
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: %(default)s")
    parser.add_argument("--pilot", action="store_true", help="one run of each method, nothing written")
    parser.add_argument("--table", action="store_true", help="write the table into docs/benchmarks.md, and leave")
    args = parser.parse_args()
    if args.table:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-seed*.json"))]
        write_section("toy_deltas", table_lines(runs))
        return
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("vispeft").setLevel(logging.ERROR)
    sets = digits()
    if not BACKBONE.is_file():
        print(f"Pretrained: {pretrain(sets):.3f} of the upright test digits are right.", flush=True)
    if args.pilot:
        pilot(sets)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for seeds in range(1, SEEDS + 1):  # one seed of each method before the second of any
        for name in args.methods:
            search(name, sets, seeds, deadline)


if __name__ == "__main__":
    main()
