"""What all tasks share: the adapted backbone, the optimiser, small checkpoints, and the guard against NaN."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from vispeft.adapters.attach import attach, load
from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.method import Method
from vispeft.backbones.create import create_model
from vispeft.backbones.registry import unwrap
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.tasks.callbacks import FiniteGuard
from vispeft.tasks.schedules import warmup_cosine

__all__ = ["AdapterTask"]


class AdapterTask(LightningModule):
    """Base of every task: a frozen backbone with one adapter, trained with AdamW, warm-up and cosine.

    Checkpoints hold what training changes and nothing of the frozen backbone.
    """

    monitor: str
    """Name of the validation metric that chooses the best epoch."""
    monitor_mode: str = "max"
    """Whether more or less of it is better: ``max`` or ``min``."""

    def __init__(
        self,
        *,
        backbone: str,
        method: Method,
        num_classes: int,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            backbone: Name of a timm model, or ``zoo:NAME``.
            method: The adapter.
            num_classes: Number of classes; configs take it from the data.
            backbone_args: Further arguments for ``timm.create_model``, such as ``pretrained`` or ``img_size``.
            weights: File with the backbone's weights, instead of pretrained ones.
            lr: Highest learning rate.
            weight_decay: Weight decay of matrices; vectors have none.
            warmup: Share of all steps in which the learning rate rises.

        Raises:
            ConfigError: If a number is out of range, or the backbone is not known.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        super().__init__()
        for name, value, good in (
            ("lr", lr, lr > 0 and math.isfinite(lr)),
            ("weight_decay", weight_decay, weight_decay >= 0 and math.isfinite(weight_decay)),
            ("warmup", warmup, 0 <= warmup < 1),
            ("num_classes", num_classes, num_classes >= 2),
        ):
            if not good:
                raise ConfigError(f"{type(self).__name__}({name}={value}): {_NEEDED[name]} is needed.")
        taken = sorted({"num_classes", "weights"} & set(backbone_args or {}))
        if taken:
            raise ConfigError(f"backbone_args has {', '.join(taken)}, which {type(self).__name__} takes by that name.")
        self.strict_loading = False  # checkpoints have no frozen tensors; on_load_checkpoint checks the others
        self.lr, self.weight_decay, self.warmup, self.num_classes = lr, weight_decay, warmup, num_classes
        self.backbone, self.backbone_args, self.weights = backbone, dict(backbone_args or {}), weights
        self.model: nn.Module = create_model(backbone, num_classes=num_classes, weights=weights, **self.backbone_args)
        self.preprocessing = Preprocessing.of(self.model)
        self.bank: AdapterBank = attach(self.model, method)

    def load_adapter(self, path: str | Path) -> None:
        """Replace the adapter by a saved one.

        Args:
            path: Its directory.

        Raises:
            FileError: If a file is missing, truncated or altered.
            BaseMismatchError: If it was trained on another backbone.
        """
        for name in self.bank.names:
            self.bank.detach(name)
        self.bank = load(self.model, path)

    def restore(self, checkpoint: str | Path) -> int:
        """Take the weights of a checkpoint this task wrote.

        Args:
            checkpoint: Its file.

        Returns:
            The epoch after which it was written, counted from zero.

        Raises:
            FileError: If it cannot be read, or belongs to another method or backbone.
        """
        try:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise FileError(f"The checkpoint {checkpoint} cannot be read: {error}") from error
        self.on_load_checkpoint(content)
        self.load_state_dict(content["state_dict"], strict=False)
        return int(content["epoch"])

    def forward(self, images: Tensor) -> Tensor:
        """Run the adapted model.

        Args:
            images: Normalised images (B, 3, H, W).

        Returns:
            Class scores (B, classes).
        """
        return self.model(images)

    def check_data(self, data: Any) -> None:
        """Check that data fit the model, as far as they say.

        Args:
            data: A data module.

        Raises:
            DataError: If class count or image size do not fit.
        """
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise DataError(
                f"The data have {classes} classes, and the model was made for {self.num_classes}. "
                f"Make it with num_classes={classes}."
            )
        wanted, made_for = getattr(data, "preprocessing", self.preprocessing).size, self.preprocessing.size
        patches = getattr(unwrap(self.model), "patch_embed", None)
        if getattr(patches, "strict_img_size", False) and tuple(wanted) != tuple(made_for):
            raise DataError(
                f"The images have {wanted[0]} x {wanted[1]} pixels, and {self.backbone} was made for "
                f"{made_for[0]} x {made_for[1]}. Leave data.image_size out, or give the backbone img_size "
                "(model.backbone_args.img_size), or flexible_size."
            )

    def setup(self, stage: str) -> None:
        """Check the trainer's data before the first step."""
        self.check_data(getattr(self.trainer, "datamodule", None))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Give AdamW over the adapter's groups, and its schedule."""
        optimizer = AdamW(self.bank.parameter_groups(self.lr, self.weight_decay))
        schedule = warmup_cosine(optimizer, self.trainer.estimated_stepping_batches, self.warmup)  # type: ignore[arg-type]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        """Add the guard against values that are not finite to whichever trainer runs the task."""
        return [FiniteGuard()]

    def _changed(self) -> set[str]:
        """Name what training changes: what has a gradient, and buffers that stand beside it."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        owners = {name.rpartition(".")[0] for name in trained}
        return trained | {name for name, _ in self.named_buffers() if name.rpartition(".")[0] in owners}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen tensors out of a checkpoint."""
        changed = self._changed()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in changed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint has exactly what training changes.

        Raises:
            FileError: If it belongs to another method or backbone.
        """
        found, needed = set(checkpoint["state_dict"]), self._changed() & set(self.state_dict())
        if found != needed:
            listing = ", ".join(sorted(found ^ needed)[:3])
            raise FileError(
                f"The checkpoint has {len(found)} trained tensors and this task has {len(needed)}; they differ in "
                f"{len(found ^ needed)}, first {listing}. Use the method and the backbone it was written with."
            )


_NEEDED = {
    "lr": "a finite number above 0",
    "weight_decay": "a finite number from 0",
    "warmup": "a share of all steps, from 0 up to, not including, 1,",
    "num_classes": "at least 2",
}
