"""Trainings of tiny models that are the same in one process and in two, and the program of one of two processes.

LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m tests.tasks.team FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

import vispeft
from tests.tasks.dense_toy import TARGETS, ToyTasks, squares
from tests.tasks.metric_toy import ToyMetricData
from vispeft.cli.processes import make_strategy
from vispeft.data.base import BatchSplit, ImageData, Index, MemorySplit
from vispeft.data.dense_targets import IGNORE
from vispeft.data.metric_listing import GALLERY, QUERY
from vispeft.data.preprocessing import Preprocessing
from vispeft.tasks import Classification, MetricLearning, MultiTaskDense, Segmentation
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.processes import SameEverywhere

TOGETHER = 8
"""Images of a step of all processes."""
STEPS = 20
SWIN = {"pretrained": False, "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
SWIN |= {"depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
VIT = {"pretrained": False, "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
BACKBONES = {"vit": ("vit_tiny_patch16_224", VIT), "swin": ("swin_tiny_patch4_window7_224", SWIN)}
METHODS: dict[str, Callable[[], vispeft.Method]] = {
    "ssf": vispeft.SSF,
    "lora": lambda: vispeft.LoRA(rank=2),
    "vpt": lambda: vispeft.VPT(num_tokens=2, dropout=0.0),
    "mtlora": lambda: vispeft.MTLoRA(rank=2, task_rank=1, dropout=0.0),
}
TASKS = ("classification", "segmentation", "multitask", "metric")
CELLS = [
    *((task, backbone, method) for task in TASKS for backbone in BACKBONES for method in ("ssf", "lora", "vpt")),
    *(("multitask", backbone, "mtlora") for backbone in BACKBONES),
    ("queries", "vit", "lora"),
    ("averaged", "vit", "ssf"),
]
"""Task, backbone and method of each training."""
STRATEGIES = ("ddp", "fsdp2")
Found = dict[str, Tensor]


class _Masks(BatchSplit):
    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self.images, self.targets = images, masks

    def batch(self, indices: list[Index]) -> tuple[Tensor, Tensor]:
        order = torch.tensor([index for _, index in indices])
        return self.images[order], self.targets[order]


class Squares(ImageData):
    """Squares with their masks, or with the number of the quarter that a square begins in; 22 training images."""

    def __init__(self, *, masks: bool, **settings: Any) -> None:
        """Choose the targets."""
        super().__init__(**settings)
        self.target = "mask" if masks else "class"
        self.palette = ((0, 0, 0), (255, 0, 0))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of two classes."""
        return ("ground", "square")

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Draw the splits."""
        splits: dict[str, Dataset[Any]] = {}
        for seed, (name, count) in enumerate((("train", 22), ("validation", 9), ("test", 5))):
            images, labels = squares(count, preprocessing.size[0], seed)
            left = labels["parts"][:, :, : preprocessing.size[1] // 4].eq(1).any((1, 2)).long()
            if name == "validation":
                # All images that the second of two processes measures, in a batch more than the first one.
                labels["parts"][4:] = IGNORE
            splits[name] = _Masks(images, labels["parts"] if self.target == "mask" else left)
        return splits


class _QuerySplit(MemorySplit):
    def batch(self, indices: list[Index]) -> tuple[Tensor, ...]:
        images, labels = super().batch(indices)
        first = torch.tensor([index < len(self) // 2 for _, index in indices])
        return images, labels, torch.where(first, QUERY, GALLERY)


class Queries(ToyMetricData):
    """Evaluation splits whose first half are queries alone, and whose second half is the gallery."""

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Draw the splits, the images of a class in turn."""
        splits = super().load(preprocessing)
        for name in ("validation", "test"):
            split = splits[name]
            order = torch.arange(len(split.targets)).view(3, -1).T.flatten()
            splits[name] = _QuerySplit(split.images[order], split.targets[order], preprocessing)
        return splits


class Watcher(Callback):
    """Keep BatchNorm in evaluation mode, and the gradients of the first step as the optimiser gets them."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.gradients: Found = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Switch BatchNorm to evaluation."""
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the gradients."""
        if trainer.global_step == 0:
            named = pl_module.named_parameters()
            self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def make(task: str, backbone: str, method: str) -> AdapterTask:
    """Make a task with its model."""
    torch.manual_seed(0)
    name, arguments = BACKBONES[backbone]
    common: dict[str, Any] = {"backbone": name, "backbone_args": arguments, "method": METHODS[method](), "lr": 2e-3}
    common |= {"optimizer": "SGD"}
    if task == "classification":
        return Classification(num_classes=2, **common)
    if task == "segmentation":
        return Segmentation(num_classes=2, decoder="fcn", decoder_args={"channels": 8, "dropout": 0.0}, **common)
    if task in ("metric", "queries"):
        return MetricLearning(num_classes=3, dim=8, loss="ProxyAnchorLoss", **common)
    shared: dict[str, Any] = {} if method == "mtlora" else {"shared": True}
    if task == "averaged":
        shared["weighting"] = "average"
    return MultiTaskDense(targets=TARGETS, decoder_args={"channels": [2, 3, 4, 5]}, **shared, **common)


def data_of(task: str, processes: int) -> ImageData:
    """Make the data of a task, with the share of a batch that each process gets."""
    size = TOGETHER // processes
    if task == "metric":
        return ToyMetricData(batch_size=size, images_per_class=4, image_size=32)
    if task == "queries":
        return Queries(batch_size=size, images_per_class=4, image_size=32)
    if task in ("multitask", "averaged"):
        return ToyTasks(batch_size=size, image_size=32, count=16)
    return Squares(masks=task == "segmentation", batch_size=size, image_size=32)


def run(cell: tuple[str, str, str], processes: int, strategy: str = "ddp") -> Found:
    """Train a cell, and return trained tensors, first gradients and the figures of validation."""
    task, data, watcher = make(*cell), data_of(cell[0], processes), Watcher()
    several: dict[str, Any] = {}
    if processes > 1:
        several = {"devices": processes, "strategy": make_strategy({"strategy": strategy}, task.skips_tensors)}
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[watcher, SameEverywhere({"cell": str(cell)})], **several,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    found = {f"tensor {name}": p.detach().clone() for name, p in task.trainable_parameters()}
    found |= {f"gradient {name}": gradient for name, gradient in watcher.gradients.items()}
    names = [name for name in trainer.callback_metrics if name.startswith(("validation/", "train/"))]
    return found | {f"figure {name}": torch.as_tensor(trainer.callback_metrics[name]).float() for name in names}


def main(folder: Path) -> None:
    """Train all cells as one of two processes, and write what the first one finds."""
    torch.set_num_threads(1)
    found = {way: {"/".join(cell): run(cell, 2, way) for cell in CELLS} for way in STRATEGIES}
    torch.save(found, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
