"""Few-shot Fashion-MNIST: a frozen backbone, one method after the other, three seeds.

    python benchmarks/fewshot.py dinov2_vit_s14 --pilot              # minutes: two epochs per rate, no test images
    python benchmarks/fewshot.py dinov2_vit_s14 --minutes 60         # as much as fits; start again to go on
    python benchmarks/fewshot.py vit_tiny --methods lora ssf         # the shipped backbones take every method
    python benchmarks/fewshot.py --table                             # writes the table into docs/benchmarks.md

Each seed draws 100 training images of a class and 20 to choose by. The learning rate of a method is chosen once, with
seed 0, by its best validation accuracy; the best epoch of each run is chosen the same way. The 10,000 test images are
looked at once per seed, at the very end. Every run leaves one JSON in ``results/fewshot/<backbone>/``; what is there
is not run again, so two processes may share the work by taking different methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import assets  # noqa: E402
from common import write_section  # noqa: E402
from pretrain_data import Folders, read_fashion  # noqa: E402

import vispeft  # noqa: E402
from vispeft.building.methods import build_method, method_node  # noqa: E402
from vispeft.cli.common import versions  # noqa: E402
from vispeft.data.base import EpochSampler  # noqa: E402
from vispeft.data.preprocessing import Preprocessing  # noqa: E402
from vispeft.tasks.schedules import warmup_cosine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "fewshot"

TRAIN_PER_CLASS, CHOOSE_PER_CLASS = 100, 20
BATCH, WARMUP, WEIGHT_DECAY = 32, 0.1, 1e-4
PROBE_EPOCHS = 50  # on features computed once, these cost less than one pass over the images
CLASSES = 10


# --------------------------------------------------------------------------------------------- what is compared


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone and the size it sees images in."""

    make: Callable[[], nn.Module]
    """Creates it with a fresh classifier."""
    side: int
    """Height and width of images in pixels."""
    says: str
    """What it is, for the table."""
    methods: tuple[str, ...] = ()
    """What is run on it; every method where none is named."""


def shipped(name: str) -> Callable[[], nn.Module]:
    """Make the function that creates a backbone of the zoo."""
    return lambda: fresh_head(vispeft.create_model(f"zoo:{name}", num_classes=CLASSES))


def converted(name: str, side: int, blocks: int) -> Callable[[], nn.Module]:
    """Make the function that creates one of the converted backbones.

    Args:
        name: A key of `assets.ASSETS`.
        side: Height and width of images; positions are resized to it.
        blocks: How many of its blocks to keep.
    """

    def make() -> nn.Module:
        model = vispeft.create_model(
            assets.ASSETS[name].architecture, weights=assets.weights(name), num_classes=CLASSES, img_size=side
        )
        del model.blocks[blocks:]  # type: ignore[union-attr,operator]
        return fresh_head(model)

    return make


def fresh_head(model: nn.Module) -> nn.Module:
    """Give a model a new classifier; the shipped ones come with one for these very classes."""
    model.reset_classifier(CLASSES)  # type: ignore[operator]
    return model


FEW = ("linear_probe", "lora", "ssf", "vpt", "full")
"""Methods that are run on the large backbones."""

BACKBONES = {
    "dinov2_vit_s14": Backbone(converted("dinov2_vit_s14", 56, 11), 56, "DINOv2-S/14, first 11 blocks", FEW),
    "clip_vit_b16": Backbone(converted("clip_vit_b16", 64, 12), 64, "CLIP ViT-B/16, int8 weights", FEW),
    "vit_tiny": Backbone(shipped("vit_tiny"), 32, "`zoo:vit_tiny`, which was pretrained on these classes"),
    "swin_tiny": Backbone(shipped("swin_tiny"), 64, "`zoo:swin_tiny`, which was pretrained on these classes"),
}

PROMPT_RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates tried for prompts and for scales, whose entries act alone."""
QUERY_RATES = (3e-2, 1e-1, 3e-1)
"""Learning rates tried for VQT, whose pieces are of unit length; its authors try 0.025 to 0.5 for batches of 128."""
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates tried for everything else without rates of its own."""

METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "linear_probe": ({}, (1e-3, 1e-2, 1e-1)),
    "bitfit": ({}, RATES),
    "norm_tuning": ({}, RATES),
    "lora": ({"rank": 8}, RATES),
    "ssf": ({}, PROMPT_RATES),
    "vpt": ({"num_tokens": 10, "deep": True}, PROMPT_RATES),
    "vpt 1 token": ({"class_path": "vpt", "num_tokens": 1, "deep": True}, PROMPT_RATES),
    "vqt": ({}, QUERY_RATES),
    "lst": ({}, RATES),
    "adapter": ({}, RATES),
    "adaptformer": ({}, RATES),
    "bi_adaptformer": ({}, RATES),
    "bi_adaptformer 32 bits": ({"class_path": "bi_adaptformer", "bits": 32}, RATES),
    "prefix": ({}, RATES),
    "prefix 2 tokens": ({"class_path": "prefix", "length": 2}, RATES),
    "mam": ({}, RATES),
    "convpass": ({}, RATES),
    "fact": ({}, RATES),
    "repadapter": ({}, RATES),
    "repadapter scale 0.1": ({"class_path": "repadapter", "scale": 0.1}, RATES),
    "compacter": ({}, RATES),
    "hydra": ({}, RATES),
    "bi_lora": ({}, RATES),
    "full": ({}, (2e-5, 1e-4, 5e-4)),
}
"""Per method of the registry or ``configs/method`` its fields and the rates that are tried."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training."""

    backbone: str
    """A key of `BACKBONES`."""
    method: str
    """A key of `METHODS`, or a name of the registry."""
    lr: float
    """Highest learning rate."""
    seed: int
    """Decides images, start and order."""
    epochs: int
    """Passes over the training images."""

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.method.replace(' ', '_')}-lr{self.lr:g}-seed{self.seed}"


# ------------------------------------------------------------------------------------------------------ images


@dataclasses.dataclass(frozen=True)
class Split:
    """Images as bytes, already resized, and their labels."""

    images: Tensor
    """(N, 1, side, side)."""
    labels: Tensor
    """(N,)."""


class Shots:
    """Draws the splits of a seed out of Fashion-MNIST."""

    def __init__(self, folders: Folders, side: int, preprocessing: Preprocessing) -> None:
        """Read the data set.

        Args:
            folders: Where it is.
            side: Height and width wanted.
            preprocessing: Mean and deviation, and how to resize.
        """
        self._sets = read_fashion(folders)
        self._preprocessing = dataclasses.replace(preprocessing, size=(side, side))
        self.normalise = self._preprocessing.normalise()
        self._drawn: dict[tuple[str, int], Split] = {}
        self.features: dict[tuple[str, int], Tensor] = {}

    def split(self, name: str, seed: int) -> Split:
        """Give a split.

        Args:
            name: train, validation or test.
            seed: Decides which images the first two have.
        """
        key = (name, 0 if name == "test" else seed)
        if key in self._drawn:
            return self._drawn[key]
        images, labels = self._sets["test" if name == "test" else "train"]
        if name != "test":
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            first, last = (
                (0, TRAIN_PER_CLASS) if name == "train" else (TRAIN_PER_CLASS, TRAIN_PER_CLASS + CHOOSE_PER_CLASS)
            )
            chosen = torch.cat([order[labels[order] == kind][first:last] for kind in range(CLASSES)])
            images, labels = images[chosen], labels[chosen]
        split = Split(self._preprocessing.resize()(images), labels)
        self._drawn[key] = split
        return split


# ---------------------------------------------------------------------------------------------------- training


class Training:
    """One adapted backbone, trained on the few images of a seed."""

    def __init__(self, trial: Trial, shots: Shots) -> None:
        """Create the backbone, attach the method, and draw the images.

        Args:
            trial: What to train.
            shots: Where images come from.
        """
        self.trial, self.shots = trial, shots
        torch.manual_seed(trial.seed)
        self.model = BACKBONES[trial.backbone].make()
        self.bank = vispeft.attach(self.model, method_of(trial.method))
        # A probe sees the same features in every epoch, so they are computed once.
        self.cached = trial.method == "linear_probe"
        self.best: dict[str, Any] = {"accuracy": -1.0}

    def inputs(self, name: str) -> Tensor:
        """Give what `scores` takes of a split: the images, or a probe's features (N, width)."""
        split = self.shots.split(name, self.trial.seed)
        if not self.cached:
            return split.images
        # The test images are the same for every seed, and the frozen backbone too.
        key = (name, 0 if name == "test" else self.trial.seed)
        if key not in self.shots.features:
            self.shots.features[key] = self.features(split.images)
        return self.shots.features[key]

    def features(self, images: Tensor) -> Tensor:
        """Compute what the classifier sees of bytes (N, 1, H, W)."""
        self.model.eval()
        with torch.inference_mode(), autocast():
            found = [
                self.model.forward_head(self.model.forward_features(self.seen(part)), pre_logits=True)  # type: ignore[operator]
                for part in images.split(250)
            ]
        return torch.cat(found).float().clone()

    def seen(self, images: Tensor) -> Tensor:
        """Turn bytes (B, 1, H, W) into what the backbone sees (B, 3, H, W)."""
        return self.shots.normalise(images.expand(-1, 3, -1, -1))

    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores (B, 10) in float32."""
        if self.cached:
            return self.model.get_classifier()(inputs)  # type: ignore[operator]
        with autocast():
            return self.model(self.seen(inputs)).float()

    def accuracy(self, inputs: Tensor, labels: Tensor) -> float:
        """Measure the share of right answers."""
        self.model.eval()
        with torch.inference_mode():
            parts = [self.scores(part).argmax(1) for part in inputs.split(250)]
        return float((torch.cat(parts) == labels).float().mean())

    def run(self, report: Callable[[int, float], None]) -> list[float]:
        """Train, and keep the tensors of the epoch that is best on validation.

        Args:
            report: Told the epoch and its validation accuracy.

        Returns:
            Validation accuracy after each epoch.
        """
        trial, history = self.trial, []
        epochs = PROBE_EPOCHS if self.cached else trial.epochs
        y, y_choose = (self.shots.split(name, trial.seed).labels for name in ("train", "validation"))
        x, x_choose = self.inputs("train"), self.inputs("validation")
        optimizer = torch.optim.AdamW(self.bank.parameter_groups(trial.lr, WEIGHT_DECAY))
        schedule = warmup_cosine(optimizer, epochs * -(-len(x) // BATCH), WARMUP)
        sampler = EpochSampler(len(x), trial.seed)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            self.model.train()
            for batch in torch.tensor([index for _, index in sampler]).split(BATCH):
                loss = F.cross_entropy(self.scores(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            history.append(self.accuracy(x_choose, y_choose))
            report(epoch, history[-1])
            if history[-1] > self.best["accuracy"]:
                tensors = {name: parameter.detach().clone() for name, parameter in self.bank.trainable_parameters()}
                self.best = {"accuracy": history[-1], "epoch": epoch + 1, "tensors": tensors}
        return history

    def test(self) -> float:
        """Measure the best epoch on the test images."""
        with torch.no_grad():
            for name, parameter in self.bank.trainable_parameters():
                parameter.copy_(self.best["tensors"][name])
        return self.accuracy(self.inputs("test"), self.shots.split("test", self.trial.seed).labels)


def autocast() -> torch.autocast:
    """Compute in bfloat16 where torch finds it safe."""
    return torch.autocast("cpu", torch.bfloat16)


def method_of(label: str) -> vispeft.Method:
    """Build a method by its key in `METHODS`, or by its name in the registry or ``configs/method``."""
    fields = dict(METHODS.get(label, ({}, ()))[0])
    return build_method(method_node({"class_path": fields.pop("class_path", label), "init_args": fields}))


def rates_of(method: str) -> tuple[float, ...]:
    """Give the learning rates that are tried for a method."""
    return METHODS.get(method, ({}, RATES))[1]


def methods_of(backbone: str) -> list[str]:
    """List the methods that are run on a backbone."""
    return list(BACKBONES[backbone].methods or METHODS)


# -------------------------------------------------------------------------------------------------- the search


class Search:
    """All trainings of one backbone: what is on disk is not run again."""

    def __init__(self, backbone: str, folders: Folders, epochs: int, deadline: float) -> None:
        """Prepare.

        Args:
            backbone: A key of `BACKBONES`.
            folders: Where the data set is, and a place for weights on the way.
            epochs: Passes over the training images.
            deadline: On `time.monotonic`: no training is begun after it.
        """
        self.backbone, self.epochs, self.deadline = backbone, epochs, deadline
        self.results = RESULTS / backbone
        self.kept = folders.work.parent / "fewshot" / backbone
        for folder in (self.results, self.kept):
            folder.mkdir(parents=True, exist_ok=True)
        preprocessing = Preprocessing.of(BACKBONES[backbone].make())
        self.shots = Shots(folders, BACKBONES[backbone].side, preprocessing)

    def method(self, name: str, seeds: int) -> None:
        """Choose the rate of a method, then train and test it with every seed.

        Args:
            name: A registry name.
            seeds: How many.
        """
        trials = [
            Trial(backbone=self.backbone, method=name, lr=lr, seed=0, epochs=self.epochs) for lr in rates_of(name)
        ]
        tried = {trial.lr: self.chosen_by(trial) for trial in trials}
        best = max(tried, key=lambda lr: (tried[lr], -lr))
        for seed in range(seeds):
            self.tested(Trial(backbone=self.backbone, method=name, lr=best, seed=seed, epochs=self.epochs))

    def chosen_by(self, trial: Trial) -> float:
        """Train unless it is on disk; give the best validation accuracy."""
        path = self.results / f"{trial.stem}.json"
        facts = on_disk(path, trial.epochs)
        if facts is not None:
            return float(facts["validation"])
        training, facts = self.train(trial)
        torch.save(training.best, self.kept / f"{trial.stem}.pt")
        write(path, facts)
        return float(facts["validation"])

    def tested(self, trial: Trial) -> None:
        """Test what was trained, or train it first; done when its file has a test accuracy."""
        path, kept = self.results / f"{trial.stem}.json", self.kept / f"{trial.stem}.pt"
        facts = on_disk(path, trial.epochs)
        if facts is not None and "test" in facts:
            return
        if facts is not None and kept.is_file():
            training = Training(trial, self.shots)
            training.best = torch.load(kept, weights_only=True)
        else:
            training, facts = self.train(trial)
        facts["test"] = training.test()
        write(path, facts)
        kept.unlink(missing_ok=True)
        print(f"{trial.stem}: test accuracy {facts['test']:.4f}", flush=True)

    def train(self, trial: Trial) -> tuple[Training, dict[str, Any]]:
        """Train.

        Args:
            trial: What.

        Returns:
            The training, and what is written about it.
        """
        if time.monotonic() > self.deadline:
            raise SystemExit("The time is used up; start again to go on.")
        began = time.perf_counter()
        training = Training(trial, self.shots)
        history = training.run(lambda epoch, value: print(f"{trial.stem}: epoch {epoch + 1} {value:.4f}", flush=True))
        counts = training.bank.report()
        facts = {
            **dataclasses.asdict(trial),
            "fields": training.bank.plan().method.to_dict()["fields"],
            "validation": training.best["accuracy"],
            "best_epoch": training.best["epoch"],
            "history": history,
            "trainable": counts.trainable,
            "trainable_head": counts.trainable_head,
            "stored_bytes": counts.stored_bytes,
            "seconds": time.perf_counter() - began,
            "threads": torch.get_num_threads(),
            "precision": "bfloat16 autocast",
            "side": BACKBONES[trial.backbone].side,
            "versions": versions(),
        }
        return training, facts

    def pilot(self, names: list[str]) -> None:
        """Train every rate for two epochs, without writing anything, and say how long everything would take."""
        seconds = 0.0
        for name in names:
            for lr in rates_of(name):
                trial = Trial(backbone=self.backbone, method=name, lr=lr, seed=0, epochs=2)
                _, facts = self.train(trial)
                # The rates, and two further seeds at the best of them.
                seconds += facts["seconds"] / 2 * self.epochs * (1 + 2 / len(rates_of(name)))
                print(f"{trial.stem}: {facts['seconds']:.0f} s, validation {facts['validation']:.4f}", flush=True)
        print(f"All of it with {self.epochs} epochs: about {seconds / 60:.0f} minutes, and the tests.")


def on_disk(path: Path, epochs: int) -> dict[str, Any] | None:
    """Read what an earlier start found, unless it trained for another number of epochs."""
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["epochs"] != epochs:
        raise SystemExit(f"{path} is of a training of {facts['epochs']} epochs, not of {epochs}. Move it away first.")
    return facts


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write a JSON file at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# --------------------------------------------------------------------------------------------------- the table


def table_lines() -> Iterator[str]:
    """Make the tables out of what is on disk.

    Yields:
        Lines of Markdown.
    """
    for name, backbone in BACKBONES.items():
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / name).glob("*.json"))]
        yield from (f"**{backbone.says}**, {backbone.side} x {backbone.side} pixels", "")
        yield "| method | trainable | + head | stored bytes | rate | validation | test | seconds of a training |"
        yield "|---|--:|--:|--:|--:|--:|--:|--:|"
        known = {facts["method"] for facts in found}
        for method in [*methods_of(name), *sorted(known - set(methods_of(name)))]:
            yield row(method, [facts for facts in found if facts["method"] == method and "test" in facts])
        yield ""


def row(method: str, runs: list[dict[str, Any]]) -> str:
    """Make a line of a table.

    Args:
        method: Registry name.
        runs: Its tested runs.
    """
    if not runs:
        return f"| {method} | not yet run | | | | | | |"
    first, count = runs[0], len(runs)
    test = [100 * run["test"] for run in runs]
    spread = f"± {statistics.stdev(test):.1f}" if count > 1 else "one seed"
    marked = "" if count >= 3 else f" ({count} of 3 seeds)"
    validation = 100 * statistics.mean(run["validation"] for run in runs)
    seconds = statistics.median(run["seconds"] for run in runs)
    return (
        f"| {method}{marked} | {first['trainable']:,} | {first['trainable_head']:,} | {first['stored_bytes']:,} | "
        f"{first['lr']:g} | {validation:.1f} % | {statistics.mean(test):.1f} % {spread} | {seconds:.0f} |"
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", choices=sorted(BACKBONES), help="which backbone")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that are meant for the backbone")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after so many")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default: %(default)s")
    fashion = "folder of the four IDX .gz files of Fashion-MNIST"
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help=fashion)
    parser.add_argument("--pilot", action="store_true", help="two epochs per rate, no test images, nothing written")
    parser.add_argument("--table", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    if args.backbone is None and not args.table:
        parser.error("name a backbone, or give --table")
    torch.set_num_threads(args.threads)
    if args.backbone is not None:
        methods = args.methods or methods_of(args.backbone)
        work = ROOT / "runs" / "pretrain" / "data"
        work.mkdir(parents=True, exist_ok=True)
        folders = Folders(args.fashion, ROOT / "downloads" / "pypi", ROOT / "downloads" / "npm", work)
        search = Search(args.backbone, folders, args.epochs, time.monotonic() + 60 * args.minutes)
        if args.pilot:
            search.pilot(methods)
        else:
            for name in methods:
                search.method(name, args.seeds)
    if args.table:
        write_section("fewshot", table_lines())


if __name__ == "__main__":
    main()
