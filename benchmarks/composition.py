"""Averages of adapters, and adapters on a backbone that was trained on: what is left of the accuracy.

    python benchmarks/composition.py              # all runs (about a minute on one free core); start again to go on
    python benchmarks/composition.py --table      # writes the tables into docs/composition.md

A small ViT learns the digits 0 to 4 of scikit-learn, and LoRA of rank 4 on all of its linear layers the digits 5 to 9
(chance is 0.2), three times: from one start in three orders of the images, and from three starts. Averages are of the
changes (`bank.compose`), and of the factors A and B, which is what not to do; the classifiers are averaged in both.
Then the backbone is trained on with noisy images of the digits 0 to 4, at four learning rates, and the adapter is
ported: as it is, without its change (the classifier alone), and with a classifier fitted anew on 64 images. Every run
leaves one JSON in ``results/composition/``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

import vispeft  # noqa: E402
from vispeft.adapters.bank import AdapterBank  # noqa: E402
from vispeft.tasks import refit_head  # noqa: E402

RESULTS = common.RESULTS / "composition"
CLASSES, STEPS, BATCH, SEEDS = 5, 80, 32, 3
LEARNING_RATE = 3e-3
METHOD = vispeft.LoRA(rank=4, roles=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
RATES = (1e-4, 4e-4, 1.2e-3, 4e-3)
"""Learning rates of the training that goes on, which decide how far the backbone drifts."""
MORE_STEPS, REFIT = 30, 64
Data = tuple[Tensor, Tensor]


def digits(first: int) -> tuple[Data, Data]:
    """Read five digits as images (N, 3, 16, 16) with labels from 0: a half to train on, a half to measure."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target)
    own = (labels >= first) & (labels < first + CLASSES)
    images = F.interpolate(images[own], scale_factor=2, mode="bilinear").repeat(1, 3, 1, 1)
    labels = labels[own] - first
    return (images[::2], labels[::2]), (images[1::2], labels[1::2])


def fit(model: nn.Module, parameters: Iterable[Tensor], data: Data, seed: int, **settings: Any) -> None:
    """Train by AdamW on batches drawn by a seed, with noise on the images if asked."""
    steps, noise = settings.get("steps", STEPS), settings.get("noise", 0.0)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(list(parameters), lr=settings.get("lr", LEARNING_RATE))
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (BATCH,), generator=generator)
        images = data[0][chosen]
        images = images + noise * torch.randn(images.shape, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), data[1][chosen]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Measure the share of images whose class is right."""
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def base() -> nn.Module:
    """Return a copy of the backbone."""
    return copy.deepcopy(trained_base())


@cache
def trained_base() -> nn.Module:
    """Train the backbone on the digits 0 to 4."""
    torch.manual_seed(0)
    model = vispeft.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=CLASSES, **SIZES)
    fit(model, model.parameters(), digits(0)[0], seed=0, steps=3 * STEPS, lr=1e-3)
    return model


@cache
def trained_adapter() -> AdapterBank:
    """Train the adapter that is ported."""
    return attach(base(), "default", 7, 0, digits(CLASSES)[0])


def attach(model: nn.Module, name: str, start: int, order: int, data: Data) -> AdapterBank:
    """Train one adapter, whose start and order of images are drawn by two seeds."""
    torch.manual_seed(start)
    bank = vispeft.attach(model, METHOD, name=name, verify=False)
    with torch.no_grad():
        nn.init.zeros_(bank.head(name).weight)
    fit(model, bank.named_tensors(name).values(), data, seed=order)
    return bank


def factor_average(bank: AdapterBank, names: list[str]) -> None:
    """Add an adapter whose factors and classifier are the averages: what not to do."""
    vispeft.attach(bank.model, METHOD, name="factors", verify=False)
    states = [bank.state_dict(name) for name in names]
    bank.load_state_dict({key: sum(s[key] for s in states) / len(states) for key in states[0]}, "factors")


def averages(starts: str) -> dict[str, Any]:
    """Train three adapters and average them."""
    train, test = digits(CLASSES)
    model = base()
    names = [f"run{seed}" for seed in range(SEEDS)]
    for seed, name in enumerate(names):
        bank = attach(model, name, 7 if starts == "one" else 70 + seed, seed, train)
    found: dict[str, Any] = {}
    for name in names:
        bank.set_active(name)
        found[name] = accuracy(model, test)
    bank.compose("changes", names)
    found["changes"] = accuracy(model, test)
    bank.compose("ties", names, how="ties", density=0.5)
    found["ties"] = accuracy(model, test)
    small = bank.compose("rank4", names, rank=4)
    found |= {"rank4": accuracy(model, test), "rank4_energy": small.kept_energy}
    factor_average(bank, names)
    bank.set_active("factors")
    found["factors"] = accuracy(model, test)
    return found


def porting(rate: float) -> dict[str, Any]:
    """Train the backbone on, and port an adapter to it."""
    train, test = digits(CLASSES)
    new = base()
    fit(new, new.parameters(), digits(0)[0], seed=1, steps=MORE_STEPS, lr=rate, noise=0.5)
    bank = trained_adapter()
    found: dict[str, Any] = {"old": accuracy(bank.model, test)}
    plain, again = copy.deepcopy(new), copy.deepcopy(new)
    ported = bank.port(new, allow_drift=True)
    found |= {"drift": ported.drift.total, "ported": accuracy(new, test)}
    probe = vispeft.attach(plain, vispeft.LinearProbe(), verify=False)
    probe.put_head("default", copy.deepcopy(bank.head()))
    found["head"] = accuracy(plain, test)
    refit_head(ported.bank, [(train[0][:REFIT], train[1][:REFIT])])
    found["refit"] = accuracy(new, test)
    attach(again, "default", 7, 0, train)
    found["again"] = accuracy(again, test)
    return found


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "three_starts": lambda: averages("three"),
    "one_start": lambda: averages("one"),
    **{f"port_{rate:g}": lambda rate=rate: porting(rate) for rate in RATES},  # type: ignore[misc]
}


def tables() -> list[str]:
    """Make the tables of the page from the files that are there."""
    files = {name: RESULTS / f"{name}.json" for name in RUNS}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    lines = [
        "| three LoRA adapters | alone | average of changes | the same at rank 4 | TIES | average of factors |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in (("one_start", "one start, three orders"), ("three_starts", "three starts")):
        own = found.get(name)
        if own is None:
            continue
        alone = sorted(own[f"run{seed}"] for seed in range(SEEDS))
        figures = " | ".join(f"{own[key]:.2f}" for key in ("changes", "rank4", "ties", "factors"))
        lines.append(f"| {title} | {alone[0]:.2f} to {alone[-1]:.2f} | {figures} |")
    ported = [found[name] for name in RUNS if name.startswith("port") and name in found]
    if not ported:
        return lines
    lines += [
        "",
        f"| drift | on the old backbone | ported | classifier alone | refit on {REFIT} images | trained again |",
        "|---|---|---|---|---|---|",
    ]
    for own in ported:
        figures = " | ".join(f"{own[key]:.2f}" for key in ("old", "ported", "head", "refit", "again"))
        lines.append(f"| {100 * own['drift']:.1f} % | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the tables into docs/composition.md")
    if parser.parse_args().table:
        common.write_section("composition", tables(), page="composition")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, run in RUNS.items():
        if (RESULTS / f"{name}.json").is_file():
            continue
        found = run()
        common.write(f"composition/{name}", found)
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
