"""What a tiny backbone is measured by, and the card that says so.

Each measure uses frozen features, so that a network at random weights can be measured beside it: the project's own
linear probe on scikit-learn's digits, converged logistic regressions whose penalty is chosen on a validation part (all
digits; ten of a class; Fashion-MNIST with 100 images of a class; climate of Earth squares), and retrieval of emoji
among characters that were not trained on.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pretrain_data import CLIMATES, TILE, TILE_ROWS, Folders, halves, read_earth, read_emoji, read_fashion
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pretrain_tiny import Recipe

SQUARE = 75
"""Side of an Earth square: nine of them make a tile."""

PENALTIES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the probes' penalty that are tried."""


PROBE_EPOCHS = 12
"""Passes of the project's own probe, as in its config."""


def measure_backbone(model: nn.Module, recipe: Recipe, folders: Folders) -> dict[str, Any]:
    """Measure a backbone.

    Args:
        model: The backbone, with its classifier; it is put into evaluation mode.
        recipe: Says how images are prepared.
        folders: Where the packages are.

    Returns:
        Shares from 0 to 1, by measure.
    """
    model.eval()
    clothes = read_fashion(folders)
    return {
        "fashion_test": fashion_test(model, recipe, *clothes["test"]),
        **probe_digits(model, recipe),
        "fashion_probe": probe_fashion(model, recipe, clothes),
        "earth_probe": probe_earth(model, recipe, *read_earth(folders)),
        "emoji_recall": recall_emoji(model, recipe, *read_emoji(folders)),
    }


@torch.inference_mode()
def features(model: nn.Module, images: Tensor, recipe: Recipe) -> Tensor:
    """Compute what the classifier sees.

    Args:
        model: The backbone, in evaluation mode.
        images: (N, 1 or 3, H, W) in [0, 255].
        recipe: Says side, mean and deviation.

    Returns:
        (N, width).
    """
    side, found = recipe.args["img_size"], []
    for part in images.split(250):
        x = F.interpolate(part.float() / 255, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        x = ((x.clamp(0, 1) - recipe.mean) / recipe.std).expand(-1, 3, -1, -1)
        found.append(model.forward_head(model.forward_features(x), pre_logits=True))  # type: ignore[operator]
    return torch.cat(found).float()


def probe(fit: tuple[Any, Any], choose: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, float]:
    """Fit a linear classifier; choose its penalty on one part, measure it once on another.

    Args:
        fit: Features (N, width) and labels (N,) to fit.
        choose: The same, to choose by.
        test: The same, to measure.

    Returns:
        Accuracy on the last two, and balanced accuracy on the last.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    best: tuple[float, Any] = (-1.0, None)
    for penalty in PENALTIES:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000)).fit(*fit)
        score = float(fitted.score(*choose))
        if score > best[0]:
            best = (score, fitted)
    guessed = best[1].predict(test[0])
    return {
        "validation": best[0],
        "test": float((guessed == np.asarray(test[1])).mean()),
        "balanced": float(balanced_accuracy_score(test[1], guessed)),
    }


def fashion_test(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor) -> float:
    """Measure the backbone's own classifier.

    Args:
        model: The backbone, in evaluation mode.
        recipe: Says how images are prepared.
        images: (N, 1, 28, 28) bytes.
        labels: (N,).

    Returns:
        Share of right answers.
    """
    with torch.inference_mode():
        scores = model.get_classifier()(features(model, images, recipe))  # type: ignore[operator]
    return float((scores.argmax(1) == labels).float().mean())


def probe_digits(model: nn.Module, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Probe on scikit-learn's digits: with 60 % of them, and with ten of a class, drawn five times.

    Args:
        model: The backbone, in evaluation mode.
        recipe: Says how images are prepared.

    Returns:
        Figures of `probe` for both.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    y = digits.target
    x = features(model, torch.from_numpy(digits.images / 16 * 255)[:, None], recipe).numpy()
    rest, test = train_test_split(range(len(x)), test_size=0.2, random_state=0, stratify=y)
    fit, val = train_test_split(rest, test_size=0.25, random_state=0, stratify=y[rest])
    draws = []
    for seed in range(5):
        few, _ = train_test_split(rest, train_size=150, random_state=seed, stratify=y[rest])
        few, choose = train_test_split(few, test_size=50, random_state=seed, stratify=y[few])
        draws.append(probe(*((x[part], y[part]) for part in (few, choose, test))))
    return {
        "digits_probe": probe(*((x[part], y[part]) for part in (fit, val, test))),
        "digits_few": {key: statistics.mean(draw[key] for draw in draws) for key in draws[0]},
    }


def own_probe(name: str, pretrained: bool) -> dict[str, float]:
    """Run the project's linear probe on the digits: AdamW, twelve epochs, the best of its rates on validation.

    Args:
        name: A backbone of the zoo.
        pretrained: Whether with its weights or with random ones.

    Returns:
        Accuracy on validation and test.
    """
    from vispeft.cli.quickstart import tune_probe

    overrides = ["--model.backbone", f"zoo:{name}"]
    if not pretrained:
        overrides += ["--model.backbone_args.pretrained", "false"]
    with tempfile.TemporaryDirectory() as folder:
        figures = tune_probe(overrides, Path(folder) / "probe", PROBE_EPOCHS)
    return {key: figures[key] for key in ("validation", "test")}


def probe_fashion(model: nn.Module, recipe: Recipe, clothes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Probe on Fashion-MNIST: 100 images of a class to fit, 20 to choose, all test images to measure.

    Args:
        model: The backbone, in evaluation mode.
        recipe: Says how images are prepared.
        clothes: The parts train and test.

    Returns:
        Figures of `probe`.
    """
    images, labels = clothes["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = [order[labels[order] == kind] for kind in range(10)]
    parts = [torch.cat([of[:100] for of in by_class]), torch.cat([of[100:120] for of in by_class])]
    sets = [(features(model, images[part], recipe).numpy(), labels[part].numpy()) for part in parts]
    test = (features(model, clothes["test"][0], recipe).numpy(), clothes["test"][1].numpy())
    return probe(sets[0], sets[1], test)


def probe_earth(model: nn.Module, recipe: Recipe, image: Tensor, climate: Tensor) -> dict[str, float]:
    """Probe for the commonest climate of squares of 75 pixels, split by longitude.

    Tile columns 0, 3, 6 ... are measured, columns 1, 7, 13 ... choose, the rest fit. Squares with at most a quarter of
    land are left out.

    Args:
        model: The backbone, in evaluation mode.
        recipe: Says how images are prepared.
        image: (3, H, W) bytes.
        climate: (H, W) indices.

    Returns:
        Figures of `probe`.
    """
    squares: dict[str, list[Tensor]] = {"fit": [], "choose": [], "test": []}
    labels: dict[str, list[int]] = {"fit": [], "choose": [], "test": []}
    for column in range(0, image.shape[2], SQUARE):
        tile = column // TILE
        part = "test" if tile % 3 == 0 else "choose" if tile % 6 == 1 else "fit"
        for row in range(TILE_ROWS.start * TILE, TILE_ROWS.stop * TILE, SQUARE):
            place = (slice(row, row + SQUARE), slice(column, column + SQUARE))
            counts = torch.bincount(climate[place].flatten(), minlength=len(CLIMATES))
            if counts[1:].sum() <= SQUARE**2 / 4:
                continue
            squares[part].append(image[(slice(None), *place)])
            labels[part].append(int(counts[1:].argmax()) + 1)
    sets = {
        part: (features(model, torch.stack(squares[part]), recipe).numpy(), np.array(labels[part])) for part in squares
    }
    return probe(sets["fit"], sets["choose"], sets["test"])


def recall_emoji(model: nn.Module, recipe: Recipe, images: Tensor, codes: list[str]) -> float:
    """Measure how often the nearest other drawing shows the same character, by another vendor.

    Args:
        model: The backbone, in evaluation mode.
        recipe: Says how images are prepared.
        images: (characters, 3, 4, 64, 64) bytes, RGBA.
        codes: Their code points.

    Returns:
        Recall at one over the characters that were not trained on.
    """
    drawn = images[halves(codes)[1]]
    x = drawn.flatten(0, 1).float()
    alpha = x[:, 3:] / 255
    found = F.normalize(features(model, x[:, :3] * alpha + 255 * (1 - alpha), recipe))
    likeness = (found @ found.T).fill_diagonal_(-2)
    character = torch.arange(len(drawn)).repeat_interleave(drawn.shape[1])
    return float((character[likeness.argmax(1)] == character).float().mean())


def card(result: dict[str, Any]) -> str:
    """Write the text of a backbone's card from what was measured.

    Args:
        result: The content of the result file.

    Returns:
        Markdown.
    """
    name, recipe = result["name"], result["recipe"]
    shape = ", ".join(f"{key} {value}" for key, value in recipe["args"].items())
    ours, random = result["measured"]["pretrained"], result["measured"]["random"]

    def row(label: str, key: str, figure: str | None = "test") -> str:
        pair = [100 * (part[key][figure] if figure else part[key]) for part in (ours, random)]
        return f"| {label} | {pair[0]:.1f} % | {pair[1]:.1f} % |"

    rows = [
        row("scikit-learn digits, the project's linear probe (12 epochs, best of its rates)", "digits_own_probe"),
        row("scikit-learn digits, converged logistic regression on standardised features", "digits_probe"),
        row("the same with ten images of a class, mean of five draws", "digits_few"),
        row("Fashion-MNIST, logistic regression, 100 images of a class, 10,000 test images", "fashion_probe"),
        row("climate of Earth squares in columns not trained on, logistic regression", "earth_probe"),
        row("the same, mean over the climates", "earth_probe", "balanced"),
        row("emoji, nearest other drawing is the same character, characters not trained on", "emoji_recall", None),
    ]
    seen = "\n".join(
        f"- {recipe['batch'][key]} of every {sum(recipe['batch'].values())} images: {part['source']}; "
        f"{part['classes']} classes"
        + (f", {part['images']:,} images." if key != "earth" else ", crops at random places of the training columns.")
        for key, part in result["data"].items()
    )
    return f"""# {name}

A tiny timm `{recipe["architecture"]}` ({shape}), {result["parameters"]:,} parameters, {result["weight_bytes"]:,} \
bytes in half precision. It is loaded with `vispeft.create_model("zoo:{name}")`.

**Training.** Supervised from random weights, with a linear head for each set; {recipe["steps"]:,} steps of \
{sum(recipe["batch"].values())} images, {result["seconds"]:.0f} s on {result["threads"]} thread(s) of a shared \
machine. Command: `{result["command"]}`. The classifier that ships tells the ten classes of Fashion-MNIST.

{seen}

| measured on frozen features, once after training | {name} | same network, random weights |
|---|---|---|
{chr(10).join(rows)}

Its own classifier is right on {100 * ours["fashion_test"]:.1f} % of Fashion-MNIST's 10,000 test images.

**Read the figures with care.** Random features of this width tell the digits apart well when a regression on them \
converges; the gain shows with few images or few epochs. The network has seen the labels of Fashion-MNIST's training \
images, and 5,000 digits of MNIST: \
scikit-learn's digits are other images of other writers in another resolution, but the same ten shapes. No Earth tile \
of a test column and no emoji of the test half was trained on.

**Good for** trying adapters and for tests that need a network that has learned something. It knows small pictures of \
clothes, digits, emoji and land seen from space, and nothing else: it is no general vision backbone.

**Licence.** Weights: Apache-2.0. Data: as listed.

Generated from `benchmarks/results/pretrain_{name}.json`, written by torch {result["versions"]["torch"]}, timm \
{result["versions"]["timm"]}.
"""
