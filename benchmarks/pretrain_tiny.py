"""Pretrain a tiny backbone that ships in ``model_zoo/backbones/``, and write its weights, config and card.

    python benchmarks/pretrain_tiny.py                         # trains vit_fashion on 2 cores
    python benchmarks/pretrain_tiny.py --data DIR --out DIR    # other places for the data set and for the result

The data are the four IDX files of Fashion-MNIST, as Debian's package ``dataset-fashion-mnist`` installs them. Order
and augmentation are functions of (seed, epoch), a checkpoint is written after every epoch, and a run that was
interrupted goes on from the last one when it is started again. The 10,000 test images are looked at once, after the
last epoch. What was measured goes to ``benchmarks/results/pretrain_<name>.json``; the card is generated from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vispeft._compat import ensure_torchvision  # noqa: E402

ensure_torchvision()

import timm  # noqa: E402
import torchvision  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

console = Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes."""

    architecture: str
    """Name of the timm architecture."""
    args: dict[str, Any]
    """Constructor arguments that differ from the architecture's own."""
    epochs: int
    """Passes over the training images."""
    full_epochs: int = 1
    """How many of the last passes see every patch; the others see a random half, at half the cost."""
    patch_drop: float = 0.5
    """Share of the patches left out in the other passes."""
    batch_size: int = 128
    """Images in a step."""
    lr: float = 2e-3
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of the matrices; vectors have none."""
    warmup_steps: int = 300
    """Steps in which the learning rate rises from zero."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    mean: float = 0.5
    """Subtracted from every channel of an image in [0, 1]."""
    std: float = 0.5
    """What every channel is then divided by."""


RECIPES = {
    "vit_fashion": Recipe(
        architecture="vit_tiny_patch16_224",
        args={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
        epochs=7,
    ),
}


# ---------------------------------------------------------------------------------------------------------- data


def read_fashion(source: Path, work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read Fashion-MNIST from its four gzipped IDX files.

    Args:
        source: The folder that holds them.
        work: A folder for the unpacked copy, which torchvision reads.

    Returns:
        For ``"train"`` and ``"test"`` the images (N, 28, 28), bytes, and the labels (N,).
    """
    raw = work / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            packed, plain = source / f"{part}-{kind}.gz", raw / f"{part}-{kind}"
            if plain.is_file():
                continue
            if not packed.is_file():
                raise SystemExit(
                    f"Fashion-MNIST was asked for in {source}, but {packed.name} is not there. Install Debian's "
                    "package dataset-fashion-mnist, or give the folder of the four .gz files with --data."
                )
            unfinished = plain.with_suffix(".part")
            with gzip.open(packed, "rb") as compressed, open(unfinished, "wb") as out:
                shutil.copyfileobj(compressed, out)
            os.replace(unfinished, plain)
    sets = {part: torchvision.datasets.FashionMNIST(work, train=part == "train") for part in ("train", "test")}
    return {part: (data.data, data.targets) for part, data in sets.items()}


def plain_images(images: Tensor, recipe: Recipe, size: int) -> Tensor:
    """Bring images to the form the model sees in evaluation.

    Args:
        images: (B, 28, 28) bytes.
        recipe: Says mean and deviation.
        size: Height and width wanted.

    Returns:
        (B, 3, size, size), normalised.
    """
    x = F.interpolate(images[:, None].float() / 255, size=(size, size), mode="bicubic", align_corners=False)
    return ((x.clamp(0, 1) - recipe.mean) / recipe.std).expand(-1, 3, -1, -1)


def augmented_images(images: Tensor, recipe: Recipe, size: int, generator: torch.Generator) -> Tensor:
    """Distort a batch at random: geometry, sharpness, tone and colour.

    Strong on purpose: the features should serve images that are not clothes. Blur by a coarse grid, inversion and
    colour are there because small greyscale pictures elsewhere differ from these in just that.

    Args:
        images: (B, 28, 28) bytes.
        recipe: Says mean and deviation.
        size: Height and width wanted.
        generator: The only source of chance.

    Returns:
        (B, 3, size, size), normalised.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def chosen(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < share).float()

    x = images[:, None].float() / 255
    angle, shear = uniform(-20, 20) * math.pi / 180, uniform(-0.2, 0.2)
    # Inverse map: a value above one shrinks the object.
    wide, high = uniform(0.8, 1.35), uniform(0.85, 1.2)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    stretch = torch.stack([wide * flip, shear, torch.zeros(n), wide * high], 1).view(n, 2, 2)
    theta = torch.cat([rotation @ stretch, uniform(-0.2, 0.2, 2, 1)], 2)
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    for share, cells in ((0.2, size // 4), (0.2, size // 2)):
        coarse = F.interpolate(F.adaptive_avg_pool2d(x, cells), size=(size, size), mode="bicubic", align_corners=False)
        x = torch.lerp(x, coarse.clamp(0, 1), chosen(share))
    x = x.clamp(0, 1) ** torch.lerp(torch.ones(n, 1, 1, 1), uniform(0.5, 2.0, 1, 1, 1), chosen(0.5))
    x = torch.lerp(x, 1 - x, chosen(0.3))
    x = x * uniform(0.6, 1.0, 1, 1, 1) + uniform(0.0, 0.2, 1, 1, 1) * chosen(0.5)
    tint = torch.lerp(torch.ones(n, 3, 1, 1), uniform(0.5, 1.2, 3, 1, 1), chosen(0.3))
    x = x * tint
    x = x + torch.randn(x.shape, generator=generator) * uniform(0.0, 0.1, 1, 1, 1) * chosen(0.3)
    return (x.clamp(0, 1) - recipe.mean) / recipe.std


# ------------------------------------------------------------------------------------------------------ training


def build(recipe: Recipe, seed: int) -> nn.Module:
    """Make the model with random weights.

    Args:
        recipe: Says which.
        seed: Decides the weights.

    Returns:
        The model, with ten classes.
    """
    torch.manual_seed(seed)
    return timm.create_model(recipe.architecture, num_classes=10, patch_drop_rate=recipe.patch_drop, **recipe.args)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Warm up linearly, then follow half a cosine to zero.

    Args:
        recipe: Says the highest value and the length of the warm-up.
        step: Steps done so far.
        steps: Steps in all.

    Returns:
        The learning rate of this step.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffle and cut into whole batches.

    Args:
        count: Number of images.
        size: Images in a batch.
        generator: Decides the order.

    Yields:
        Indices (size,).
    """
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def train(recipe: Recipe, images: Tensor, labels: Tensor, *, seed: int, work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Train, or go on with a run that was interrupted.

    Args:
        recipe: What to do.
        images: (N, 28, 28) bytes.
        labels: (N,) class indices.
        seed: Decides weights, order and augmentation.
        work: Folder of the checkpoint.

    Returns:
        The trained model, and per epoch the mean loss and accuracy on augmented images, and all seconds.
    """
    model = build(recipe, seed)
    size = recipe.args["img_size"]
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] != 1]
    plain = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] != 1)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    history: list[dict[str, float]] = []
    seconds = 0.0
    key = json.dumps({"recipe": dataclasses.asdict(recipe), "seed": seed, "images": len(images)}, sort_keys=True)
    checkpoint = work / "last.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["key"] != key:
            raise SystemExit(
                f"{checkpoint} belongs to a run with another recipe, seed or number of images. Give another --work "
                "folder, or --restart to begin anew."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, seconds = state["history"], state["seconds"]
        console.print(f"going on after epoch {len(history)} of {recipe.epochs}")

    per_epoch = len(images) // recipe.batch_size
    steps = per_epoch * recipe.epochs
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        for epoch in range(len(history), recipe.epochs):
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            # The dropped patches are drawn by timm from the global source.
            torch.manual_seed(seed * 1_000_003 + epoch)
            model.train()
            whole = epoch >= recipe.epochs - recipe.full_epochs
            model.patch_drop.prob = 0.0 if whole else recipe.patch_drop
            bar = progress.add_task(f"epoch {epoch + 1}/{recipe.epochs}", total=per_epoch)
            losses, hits = 0.0, 0
            for i, chosen in enumerate(batches(len(images), recipe.batch_size, generator)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, epoch * per_epoch + i, steps)
                logits = model(augmented_images(images[chosen], recipe, size, generator))
                loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                if not math.isfinite(loss.item()):
                    raise SystemExit(f"The loss is not finite in epoch {epoch + 1}, step {i}; {checkpoint} is kept.")
                losses += loss.item()
                hits += int((logits.argmax(1) == labels[chosen]).sum())
                progress.update(bar, advance=1)
            seconds += time.perf_counter() - started
            history.append({"loss": losses / per_epoch, "accuracy": hits / (per_epoch * recipe.batch_size)})
            state = {
                "key": key,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            last = history[-1]
            progress.console.print(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {last['loss']:.4f}, accuracy on augmented training images "
                f"{last['accuracy']:.4f}, {seconds:.0f} s so far"
            )
    model.patch_drop.prob = 0.0
    return model, {"history": history, "seconds": seconds}


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> float:
    """Measure the share of right answers.

    Args:
        model: The model; it is put into evaluation mode.
        images: (N, 28, 28) bytes.
        labels: (N,) class indices.
        recipe: Says how images are prepared.

    Returns:
        A share from 0 to 1.
    """
    model.eval()
    size, hits = recipe.args["img_size"], 0
    for part, expected in zip(images.split(500), labels.split(500), strict=True):
        hits += int((model(plain_images(part, recipe, size)).argmax(1) == expected).sum())
    return hits / len(images)


@torch.inference_mode()
def probe_digits(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Fit a linear classifier on frozen features of scikit-learn's digits.

    The strength of its penalty is chosen on a validation part; the test part is used once.

    Args:
        model: The backbone; it is put into evaluation mode.
        recipe: Says how images are prepared.

    Returns:
        Accuracy on the validation and on the test part.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    model.eval()
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255)
    size = recipe.args["img_size"]
    features = torch.cat(
        [model.forward_head(model.forward_features(plain_images(p, recipe, size)), pre_logits=True)
         for p in images.split(500)]
    ).numpy()  # fmt: skip
    rest, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    fit, val = train_test_split(rest, test_size=0.25, random_state=0, stratify=digits.target[rest])
    scaled = StandardScaler().fit(features[fit]).transform(features)
    best: tuple[float, Any] = (-1.0, None)
    for penalty in (0.001, 0.01, 0.1, 1.0, 10.0):
        probe = LogisticRegression(C=penalty, max_iter=2000).fit(scaled[fit], digits.target[fit])
        score = probe.score(scaled[val], digits.target[val])
        if score > best[0]:
            best = (score, probe)
    return {"val": float(best[0]), "test": float(best[1].score(scaled[test], digits.target[test]))}


# ------------------------------------------------------------------------------------------------------- results


def write_backbone(model: nn.Module, recipe: Recipe, folder: Path, result: dict[str, Any]) -> None:
    """Write weights in half precision, the config and the card.

    Args:
        model: The trained model.
        recipe: What it was trained by.
        folder: Where to; made when missing.
        result: What was measured; becomes the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    tensors = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").chmod(0o644)  # safetensors lets only the owner read
    os.replace(folder / "model.part", weights)
    size = recipe.args["img_size"]
    config = {
        "architecture": recipe.architecture,
        "args": recipe.args,
        "num_classes": 10,
        "preprocessing": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [recipe.mean] * 3,
            "std": [recipe.std] * 3,
        },
        "class_names": result["class_names"],
        "license": "Apache-2.0",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "CARD.md").write_text(card(result, weights.stat().st_size), encoding="utf-8")


def card(result: dict[str, Any], weight_bytes: int) -> str:
    """Write the text of a backbone's card from what was measured.

    Args:
        result: The content of the result file.
        weight_bytes: Size of the weight file.

    Returns:
        Markdown.
    """
    name, args, probe = result["name"], result["recipe"]["args"], result["digits_probe"]
    shape = ", ".join(f"{key} {value}" for key, value in args.items())
    percent = "{:.1f} %".format
    return f"""# {name}

A tiny timm `{result["recipe"]["architecture"]}` ({shape}), {result["parameters"]:,} parameters, \
{weight_bytes:,} bytes in half precision. It is loaded with `vispeft.create_model("zoo:{name}")`.

**Training.** Supervised, on {result["data"]["train_images"]:,} training images of {result["data"]["name"]} \
({result["data"]["license"]}), {result["recipe"]["epochs"]} epochs, {result["seconds"]:.0f} s on \
{result["threads"]} threads, from random weights. Command: `{result["command"]}`.

| measured | value |
|---|---|
| {result["data"]["name"]}, {result["data"]["test_images"]:,} test images, once after training | \
{percent(100 * result["test_accuracy"])} |
| linear probe on frozen features, scikit-learn digits, test part | {percent(100 * probe["pretrained"]["test"])} |
| the same probe with the same network at random weights | {percent(100 * probe["random"]["test"])} |

**Good for** trying adapters and for tests that need a network that has learned something. It has seen ten kinds of \
clothes at 28 x 28 pixels and nothing else: it is no general vision backbone.

**Licence.** Weights: Apache-2.0. Data: {result["data"]["license"]}.

Generated from `benchmarks/results/pretrain_{name}.json`, written by torch {result["versions"]["torch"]}, timm \
{result["versions"]["timm"]}.
"""


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Example: python benchmarks/pretrain_tiny.py --name vit_fashion"
    )
    parser.add_argument("--name", choices=sorted(RECIPES), default="vit_fashion", help="which backbone")
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the four IDX .gz files"
    )
    parser.add_argument("--out", type=Path, help="folder of the result (default: model_zoo/backbones/NAME)")
    parser.add_argument("--result", type=Path, help="file of what was measured (default: benchmarks/results/...)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoint (default: runs/pretrain/NAME)")
    parser.add_argument("--epochs", type=int, help="another number of epochs than the recipe's")
    parser.add_argument("--limit", type=int, help="use only so many training images (for a trial)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, order and augmentation")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--restart", action="store_true", help="forget a checkpoint that is there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.name]
    if args.epochs:
        recipe = dataclasses.replace(recipe, epochs=args.epochs)
    work = args.work or ROOT / "runs" / "pretrain" / args.name
    work.mkdir(parents=True, exist_ok=True)
    if args.restart:
        (work / "last.pt").unlink(missing_ok=True)
    sets = read_fashion(args.data, work)
    images, labels = (part[: args.limit] for part in sets["train"])
    model, measured = train(recipe, images, labels, seed=args.seed, work=work)

    options = [a for a in ("name", "epochs", "limit", "seed") if getattr(args, a) != parser.get_default(a)]
    result = {
        "name": args.name,
        "command": " ".join(["python benchmarks/pretrain_tiny.py", *(f"--{a} {getattr(args, a)}" for a in options)]),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "data": {
            "name": "Fashion-MNIST",
            "license": "MIT",
            "source": "Debian package dataset-fashion-mnist",
            "train_images": len(images),
            "test_images": len(sets["test"][0]),
        },
        "class_names": list(torchvision.datasets.FashionMNIST.classes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": args.threads,
        **measured,
        "test_accuracy": accuracy(model, *sets["test"], recipe),
        "digits_probe": {
            "pretrained": probe_digits(model, recipe),
            "random": probe_digits(build(recipe, args.seed + 1), recipe),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }
    console.print_json(data={k: result[k] for k in ("seconds", "test_accuracy", "digits_probe")})
    write_backbone(model, recipe, args.out or ROOT / "model_zoo" / "backbones" / args.name, result)
    target = args.result or ROOT / "benchmarks" / "results" / f"pretrain_{args.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
