"""Pretrain a tiny backbone that ships in ``model_zoo/backbones/``, and write its weights, config and card.

    python benchmarks/pretrain_tiny.py --name vit_tiny
    python benchmarks/pretrain_tiny.py --name swin_tiny

Supervised, on four sets at once: every batch holds some images of each, and each set has a linear head of its own.
The data are read by `pretrain_data`, which names the packages. Everything random is a function of (seed, step), a
checkpoint is written every `SAVE_EVERY` steps, and a run that was interrupted goes on from the last one when it is
started again. What is tested on (`pretrain_eval`) is looked at once, after the last step. What was measured goes to
``benchmarks/results/pretrain_<name>.json``; the card is made from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vispeft._compat import install_hook  # noqa: E402

install_hook()

import timm  # noqa: E402
import torchvision  # noqa: E402
from pretrain_data import PACKAGES, Folders, Source, training_sources  # noqa: E402
from pretrain_eval import card, measure_backbone, own_probe  # noqa: E402
from rich.console import Console  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

console = Console()

SAVE_EVERY = 100
"""Steps between two checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes."""

    architecture: str
    """Name of the timm architecture."""
    args: dict[str, Any]
    """Constructor arguments that differ from the architecture's own."""
    steps: int
    """Steps of the optimiser."""
    batch: dict[str, int]
    """Images of each set in a batch."""
    patch_drop: float = 0.0
    """Share of the patches left out in the first steps (ViT only)."""
    whole_steps: int = 0
    """How many of the last steps see every patch."""
    lr: float = 3e-3
    """Highest learning rate."""
    weight_decay: float = 0.05
    """Weight decay of the matrices; vectors have none."""
    warmup_steps: int = 150
    """Steps in which the learning rate rises from zero."""
    decay_steps: int
    """Steps at the end in which it falls to zero; until they begin, a run can still be made longer or shorter."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    mean: float = 0.5
    """Subtracted from every channel of an image in [0, 1]."""
    std: float = 0.5
    """What every channel is then divided by."""


RECIPES = {
    "vit_tiny": Recipe(
        architecture="vit_tiny_patch16_224",
        args={"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 8, "num_heads": 3},
        steps=1400,
        decay_steps=600,
        batch={"fashion": 60, "mnist": 16, "emoji": 36, "earth": 16},
        patch_drop=0.5,
        whole_steps=200,
    ),
    "swin_tiny": Recipe(
        architecture="swin_tiny_patch4_window7_224",
        args={
            "img_size": 64,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 32,
            "depths": [2, 2, 6, 2],
            "num_heads": [1, 2, 4, 8],
        },
        steps=2400,
        decay_steps=1200,
        batch={"fashion": 60, "mnist": 16, "emoji": 36, "earth": 16},
    ),
}


# ------------------------------------------------------------------------------------------------------ training


def build(recipe: Recipe, seed: int) -> nn.Module:
    """Make the model with random weights.

    Args:
        recipe: Says which.
        seed: Decides the weights.

    Returns:
        The model, with the ten classes of clothes.
    """
    torch.manual_seed(seed)
    dropping = {"patch_drop_rate": recipe.patch_drop} if recipe.patch_drop else {}
    return timm.create_model(recipe.architecture, num_classes=10, **dropping, **recipe.args)


class Run:
    """A training run: the model, its heads, the optimisers, and how far it is."""

    def __init__(self, recipe: Recipe, sources: list[Source], seed: int, checkpoint: Path) -> None:
        self.recipe, self.sources, self.seed, self.checkpoint = recipe, sources, seed, checkpoint
        self.model = build(recipe, seed)
        # The model's own classifier is the head of the clothes, and the only one that ships.
        others = {s.name: nn.Linear(self.model.num_features, s.classes) for s in sources if s.name != "fashion"}
        self.heads = nn.ModuleDict(others)
        self.optimizers = optimizers(self.model, self.heads, recipe)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        decided = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "steps"}
        self.key = json.dumps(
            {"recipe": decided, "seed": seed, "images": {s.name: s.count for s in sources}}, sort_keys=True
        )

    def restore(self) -> None:
        """Go on from the checkpoint, when there is one."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["key"] != self.key:
            raise SystemExit(
                f"{self.checkpoint} belongs to a run with another recipe, seed or number of images. Give another "
                "--work folder, or --restart to begin anew."
            )
        if state["steps"] != self.recipe.steps and state["step"] > (
            begins := min(state["steps"], self.recipe.steps) - self.recipe.decay_steps
        ):
            raise SystemExit(
                f"{self.checkpoint} is {state['step']} steps into a run of {state['steps']}; {self.recipe.steps} were "
                f"asked for. The number can be changed until the decay begins, here at step {begins}. Keep the number, "
                "or --restart to begin anew."
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        console.print(f"going on after step {self.step} of {self.recipe.steps}")

    def save(self) -> None:
        """Write the checkpoint; the one before stays until this one is whole."""
        state = {
            "key": self.key,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "steps": self.recipe.steps,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(state, self.checkpoint.with_suffix(".part"))
        os.replace(self.checkpoint.with_suffix(".part"), self.checkpoint)

    def train(self) -> None:
        """Train to the last step."""
        self.restore()
        self.model.train()
        taken: list[dict[str, float]] = []
        began = time.perf_counter()
        while self.step < self.recipe.steps:
            taken.append(self.advance())
            if self.step % SAVE_EVERY and self.step < self.recipe.steps:
                continue
            self.seconds += time.perf_counter() - began
            began = time.perf_counter()
            means = {name: round(statistics.mean(step[name] for step in taken), 4) for name in taken[0]}
            self.history.append({"step": self.step, **means})
            taken.clear()
            self.save()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            console.print(f"step {self.step}/{self.recipe.steps}, {self.seconds:.0f} s: {shown}", soft_wrap=True)

    def advance(self) -> dict[str, float]:
        """Take one step.

        Returns:
            Loss of each set, and the share of right answers for the clothes.
        """
        recipe, side = self.recipe, self.recipe.args["img_size"]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        torch.manual_seed(self.seed * 1_000_003 + self.step)  # timm draws the dropped patches from the global source
        drawn = [
            s.draw(drawn_indices(s, self.step, recipe.batch[s.name], self.seed), side, generator) for s in self.sources
        ]
        images = (torch.cat([x for x, _ in drawn]) - recipe.mean) / recipe.std
        if recipe.patch_drop:
            self.model.patch_drop.prob = recipe.patch_drop if self.step < recipe.steps - recipe.whole_steps else 0.0
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        loss, losses = torch.zeros(()), {}
        parts = features.float().split([len(x) for x, _ in drawn])
        for source, part, (x, target) in zip(self.sources, parts, drawn, strict=True):
            scores = (self.model.get_classifier() if source.name == "fashion" else self.heads[source.name])(part)
            own = F.cross_entropy(scores, target, label_smoothing=recipe.label_smoothing * (target.ndim == 1))
            # Weighted by images: the step is that of one mean over the batch.
            loss = loss + own * len(x) / len(images)
            losses[source.name] = own.item()
            if source.name == "fashion":
                losses["accuracy"] = float((scores.argmax(1) == target).float().mean())
        loss.backward()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"The loss is not finite in step {self.step}; {self.checkpoint} is kept.")
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses


def optimizers(model: nn.Module, heads: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else.

    With so few steps Muon learns clearly more in the same time: 52 % of the clothes right after 75 s, AdamW 40 %
    (swin_tiny, one thread).

    Args:
        model: The backbone.
        heads: The heads beside its own.
        recipe: Says rate and decay.

    Returns:
        Both optimisers.
    """
    inner, matrices, vectors = [], [], []
    for name, parameter in [*model.named_parameters(), *heads.named_parameters()]:
        if parameter.ndim == 2 and ("blocks." in name or "downsample." in name) and "bias_table" not in name:
            inner.append(parameter)
        elif parameter.ndim > 1 and parameter.shape[0] != 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(inner, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98)),
    ]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rise linearly, stay, fall linearly to zero.

    Args:
        recipe: Says the highest value and when it is reached and left.
        step: Steps done so far.

    Returns:
        The learning rate of this step.
    """
    rising = (step + 1) / recipe.warmup_steps
    falling = (recipe.steps - step) / recipe.decay_steps
    return recipe.lr * min(1.0, rising, falling)


def drawn_indices(source: Source, step: int, count: int, seed: int) -> Tensor:
    """Say which images of a set a step sees: pass after pass, each in an order of its own.

    Args:
        source: The set.
        step: Steps done so far.
        count: Images wanted.
        seed: Decides the orders.

    Returns:
        Indices (count,).
    """
    places = torch.arange(step * count, (step + 1) * count)
    orders = {
        number: torch.randperm(source.count, generator=torch.Generator().manual_seed(seed * 7_368_787 + number))
        for number in (places // source.count).unique().tolist()
    }
    return torch.stack([orders[int(p) // source.count][int(p) % source.count] for p in places])


# ------------------------------------------------------------------------------------------------------- results


def write_backbone(model: nn.Module, recipe: Recipe, folder: Path, class_names: list[str]) -> int:
    """Write weights in half precision, and the config.

    Args:
        model: The trained model.
        recipe: What it was trained by.
        folder: Where to; made when missing.
        class_names: What its classifier's outputs mean.

    Returns:
        Bytes of the weight file.
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
        "num_classes": len(class_names),
        "preprocessing": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [recipe.mean] * 3,
            "std": [recipe.std] * 3,
        },
        "class_names": class_names,
        "license": "Apache-2.0",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return weights.stat().st_size


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Example: python benchmarks/pretrain_tiny.py --name vit_tiny"
    )
    parser.add_argument("--name", choices=sorted(RECIPES), required=True, help="which backbone")
    fashion = "folder of the four IDX .gz files of Fashion-MNIST"
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help=fashion)
    parser.add_argument("--downloads", type=Path, default=ROOT / "downloads", help="holds pypi/ and npm/")
    parser.add_argument("--zoo", type=Path, help="the result goes to backbones/NAME in it (default: model_zoo)")
    parser.add_argument("--result", type=Path, help="file of what was measured (default: benchmarks/results/...)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pretrain", help="checkpoints and unpacked data")
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--limit", type=int, help="use only so many clothes (for a trial)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, order and augmentation")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--restart", action="store_true", help="forget a checkpoint that is there")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.name]
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    folders = Folders(args.fashion, args.downloads / "pypi", args.downloads / "npm", args.work / "data")
    checkpoint = args.work / args.name / "last.pt"
    for folder in (folders.work, checkpoint.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if args.restart:
        checkpoint.unlink(missing_ok=True)
    run = Run(recipe, training_sources(folders, args.limit), args.seed, checkpoint)
    run.train()

    model, class_names = run.model, list(torchvision.datasets.FashionMNIST.classes)
    if recipe.patch_drop:
        model.patch_drop.prob = 0.0
    zoo = args.zoo or ROOT / "model_zoo"
    out = zoo / "backbones" / args.name
    weight_bytes = write_backbone(model, recipe, out, class_names)
    os.environ["VISPEFT_ZOO"] = str(zoo)
    measured = {}
    for kind, network in (("pretrained", model), ("random", build(recipe, args.seed + 1))):
        own = own_probe(args.name, pretrained=kind == "pretrained")
        measured[kind] = {**measure_backbone(network, recipe, folders), "digits_own_probe": own}
    options = [a for a in ("name", "steps", "limit", "seed", "threads") if getattr(args, a) != parser.get_default(a)]
    result = {
        "name": args.name,
        "command": " ".join(["python benchmarks/pretrain_tiny.py", *(f"--{a} {getattr(args, a)}" for a in options)]),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "data": {s.name: {"images": s.count, "classes": s.classes, "source": PACKAGES[s.name]} for s in run.sources},
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weight_bytes,
        "threads": args.threads,
        "seconds": run.seconds,
        "history": run.history,
        "measured": measured,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }
    console.print_json(data=measured)
    (out / "CARD.md").write_text(card(result), encoding="utf-8")
    target = args.result or ROOT / "benchmarks" / "results" / f"pretrain_{args.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
