"""``vispeft quickstart``: SSF against a linear probe on real images, merged and reloaded, in about two minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import vispeft
from vispeft.backbones.create import create_model
from vispeft.cli import runs
from vispeft.cli.common import console, make_parser, versions
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluate import load_run
from vispeft.cli.evaluation import evaluate
from vispeft.cli.train import train
from vispeft.core.families import unwrap
from vispeft.data.base import EpochSampler, ImageData
from vispeft.errors import ConfigError, MergeError
from vispeft.resources import find_config
from vispeft.storage.places import check_folder
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.schedules import warmup_cosine

__all__ = ["main", "train_probe"]

PROBE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Learning rates for tuning the probe; SSF uses the single rate of its config."""

EXAMPLE = """example:
  vispeft quickstart
  vispeft quickstart --seeds 3 --json quickstart.json

Trains SSF on scikit-learn's handwritten digits over zoo:vit_tiny, merges it, reloads it from its file, compares the
three models' predictions, and measures it beside a linear probe. The probe trains as many epochs as SSF, once for each
of several learning rates, and its best rate and epoch are chosen on validation like SSF's best epoch."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("quickstart", "Train, merge and reload an adapter on real images.", EXAMPLE)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds; default 1")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--out", metavar="DIR", help="where runs go; default runs/quickstart/<n>")
    given = parser.parse_args(list(argv))
    if given.seeds < 1:
        raise ConfigError(f"--seeds is {given.seeds}; at least 1 is needed.")
    if given.json:
        check_folder(Path(given.json).parent, "The folder of --json")
        if os.path.isdir(given.json):
            raise ConfigError(f"--json is {given.json!r}, which is a folder. Name a file.")
    place = runs.claim(given.out, Path("quickstart"))
    results = [compare(seed, place) for seed in range(given.seeds)]
    for result in results:
        console.print(_table(result))
    console.print(f"Everything is kept in {place}. Next: vispeft predict {place}/ssf-0 IMAGES --out predictions")
    if given.json:
        machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        command = f"vispeft quickstart --seeds {given.seeds}"
        runs.write_json(
            Path(given.json), {"command": command, "machine": machine, "versions": versions(), "seeds": results}
        )


def compare(seed: int, place: Path) -> dict[str, Any]:
    """Train SSF and the probe with one seed.

    Args:
        seed: The seed.
        place: Directory for the runs.

    Returns:
        The results of both, and the differences of the merged and the reloaded model.

    Raises:
        MergeError: If their predictions differ from the trained model's.
    """
    overrides = ["--seed_everything", str(seed)]
    console.rule(f"SSF, seed {seed}")
    began = time.perf_counter()
    folder = train(find_config("classification/digits_ssf"), overrides, out=place / f"ssf-{seed}")
    seconds = time.perf_counter() - began
    run = runs.Run.open(folder)
    equality = check_equality(run)
    console.print(
        f"Trained, merged and reloaded model agree on all {equality['images']} test images "
        f"(outputs within {equality['merged']:.0e} and {equality['reloaded']:.0e} of the largest)."
    )
    console.rule(f"Linear probe, seed {seed}")
    probe = tune_probe(overrides, place / f"probe-{seed}", run.metrics["epochs"])
    return {"seed": seed, "ssf": {**_figures(run), "seconds": seconds}, "linear_probe": probe, "equality": equality}


def check_equality(run: runs.Run) -> dict[str, float]:
    """Compare the trained model with the merged one and with one reloaded from the run's files.

    Args:
        run: The run.

    Returns:
        Number of test images and, for both, the largest difference of outputs divided by the largest output.

    Raises:
        MergeError: If a prediction differs.
    """
    cli = load_run(run)
    task, data = cli.model, cli.datamodule
    data.fit_to(task.preprocessing)
    data.setup()
    fresh = create_model(task.backbone, num_classes=task.num_classes, weights=task.weights, **task.backbone_args)
    vispeft.load(fresh, run.adapter)
    with torch.inference_mode():
        trained = _scores(task.model, data)
        reloaded = _scores(fresh.eval(), data)
        task.bank.merge()
        merged = _scores(task.model, data)
    errors = {"images": len(trained)}
    for name, scores in (("merged", merged), ("reloaded", reloaded)):
        differing = int((scores.argmax(1) != trained.argmax(1)).sum())
        if differing:
            raise MergeError(f"The {name} model gives another class for {differing} of {len(trained)} test images.")
        errors[name] = float((scores - trained).abs().max() / trained.abs().max())
    return errors


def _scores(model: nn.Module, data: ImageData) -> Tensor:
    return torch.cat([model(images) for images, _ in data.test_dataloader()])


# ------------------------------------------------------------------ the probe


def tune_probe(overrides: Sequence[str], folder: Path, epochs: int) -> dict[str, Any]:
    """Train the probe once per learning rate and keep the best on validation.

    Args:
        overrides: Changes to the probe's config.
        folder: Folder for its adapter.
        epochs: Epochs for each rate.
    """
    began = time.perf_counter()
    cli = ConfigCLI(find_config("classification/digits_linear_probe"), overrides)
    task, data = cli.model, cli.datamodule
    data.fit_to(task.preprocessing)
    data.setup()
    features = {split: _features(task, data, split) for split in ("train", "validation")}
    tried: dict[float, float] = {}
    best: dict[str, Tensor] = {}
    for rate in PROBE_RATES:
        accuracy, weights = train_probe(task, features, rate, epochs, data.batch_size, data.seed)
        if accuracy > max(tried.values(), default=-1.0):
            best = weights
        tried[rate] = accuracy
        console.print(f"learning rate {rate:g}: validation accuracy {accuracy:.4f} after the best of {epochs} epochs")
    task.bank.load_state_dict({f"head/{name}": tensor for name, tensor in best.items()})
    measured = {split: evaluate(cli.trainer, task, data, split) for split in ("validation", "test")}
    task.bank.annotate(class_names=data.class_names, preprocessing=data.preprocessing.to_dict())
    task.bank.save(folder)
    return {
        "trainable": task.bank.report().trainable,
        "trainable_head": task.bank.report().trainable_head,
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "validation": measured["validation"]["accuracy"],
        "test": measured["test"]["accuracy"],
        "epochs": epochs,
        "tried": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
        "seconds": time.perf_counter() - began,
    }


Features = dict[str, tuple[Tensor, Tensor]]
"""Input of the classifier (N, width) and labels (N,), by split."""


def _features(task: AdapterTask, data: ImageData, split: str) -> tuple[Tensor, Tensor]:
    """Compute the classifier's input once; it is the same in every epoch, as backbone and images do not change."""
    images, labels = data.split(split).__getitems__(range(len(data.split(split))))  # type: ignore[attr-defined, arg-type]
    model = unwrap(task.model).eval()
    with torch.inference_mode():
        parts = [model.forward_head(model.forward_features(part), pre_logits=True) for part in images.split(256)]
    return torch.cat(parts).clone(), labels


def train_probe(
    task: AdapterTask, features: Features, lr: float, epochs: int, batch_size: int, seed: int
) -> tuple[float, dict[str, Tensor]]:
    """Train a classifier on features, with the same steps as `Classification` on the images.

    Args:
        task: Source of the classifier's initial values, weight decay and warm-up.
        features: Features and labels of the splits train and validation.
        lr: Highest learning rate.
        epochs: Number of epochs.
        batch_size: Images per batch.
        seed: Seed of the order.

    Returns:
        The best validation accuracy of all epochs, and the classifier's tensors after that epoch.
    """
    x, y = features["train"]
    start = unwrap(task.model).get_classifier()
    classifier = nn.Linear(start.in_features, start.out_features)
    classifier.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(
        [
            {"params": [classifier.weight], "weight_decay": task.weight_decay},
            {"params": [classifier.bias], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    sampler = EpochSampler(len(x), seed)
    schedule = warmup_cosine(optimizer, epochs * -(-len(x) // batch_size), task.warmup)
    best, weights = -1.0, {}
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in torch.tensor([index for _, index in sampler]).split(batch_size):
            loss = F.cross_entropy(classifier(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.inference_mode():
            scores = classifier(features["validation"][0])
        accuracy = float((scores.argmax(1) == features["validation"][1]).float().mean())
        if accuracy > best:
            best, weights = accuracy, {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    return best, weights


# ------------------------------------------------------------------ figures


def _figures(run: runs.Run) -> dict[str, Any]:
    metrics = run.metrics
    return {
        "trainable": metrics["parameters"]["trainable"],
        "trainable_head": metrics["parameters"]["trainable_head"],
        "file_bytes": sum(metrics["adapter_bytes"].values()),
        "validation": metrics["validation"]["accuracy"],
        "test": metrics["test"]["accuracy"],
        "epochs": metrics["epochs"],
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Handwritten digits, seed {result['seed']}")
    table.add_column("method", no_wrap=True)
    for heading in ("trainable", "+ head", "file bytes", "validation", "test", "seconds"):
        table.add_column(heading, justify="right")
    for label, key in (("SSF", "ssf"), ("linear probe", "linear_probe")):
        row = result[key]
        table.add_row(
            label,
            f"{row['trainable']:,}",
            f"{row['trainable_head']:,}",
            f"{row['file_bytes']:,}",
            f"{row['validation']:.2%}",
            f"{row['test']:.2%}",
            f"{row['seconds']:.0f}",
        )
    return table
