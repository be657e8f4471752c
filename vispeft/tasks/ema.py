"""The exponential moving average (EMA) of the tensors that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vispeft.errors import FileError

__all__ = ["EMA", "check_average"]


class EMA(Callback):
    """Average the trained tensors of a task over the steps; validation and the adapter's file use the average.

    timm's `ModelEmaV3` copies the whole model; here the frozen backbone exists once. Buffers are not averaged. The
    tensors are those the task declares (`AdapterTask.trainable_parameters`), whether or not a step changes them.
    """

    def __init__(self, decay: float) -> None:
        """Set the decay.

        Args:
            decay: Fraction of the average kept by a step, below 1; early steps keep less, (1 + steps) / (10 + steps).
        """
        self.decay, self.updates = decay, 0
        self.exchanged = False
        """Whether the module holds the average, and this object the trained tensors."""
        self._tensors: dict[str, Tensor] = {}

    def average(self, module: LightningModule) -> dict[str, Tensor]:
        """The average by state-dict name; empty before the first step.

        Args:
            module: The task.
        """
        own = module.state_dict()
        return {name: own[name] if self.exchanged else tensor for name, tensor in self._tensors.items()}

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors while the module holds the average in their place; empty otherwise."""
        return self._tensors if self.exchanged else {}

    def state(self, module: LightningModule) -> dict[str, Any]:
        """Everything a checkpoint needs.

        Args:
            module: The task.
        """
        return {"tensors": dict(self.average(module)), "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Args:
            state: A result of `state`.
        """
        self._tensors, self.updates, self.exchanged = dict(state["tensors"]), state["updates"], False

    @torch.no_grad()
    def exchange(self, module: LightningModule) -> None:
        """Swap the tensors of the module and of this object.

        Args:
            module: The task.
        """
        parameters = dict(module.named_parameters())
        for name, tensor in self._tensors.items():
            held = parameters[name].detach().clone()
            parameters[name].copy_(tensor)
            tensor.copy_(held)
        self.exchanged = not self.exchanged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the current tensors, or continue."""
        if self.exchanged:
            self.exchange(pl_module)  # an earlier fit left the average in place
        trained = dict(cast(Any, pl_module).trainable_parameters())
        known = self._tensors
        self._tensors = {n: known[n].to(p.device) if n in known else p.detach().clone() for n, p in trained.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average."""
        if trainer.global_step == self.updates:
            return  # gradients are still accumulating
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(pl_module.named_parameters())
        for name, tensor in self._tensors.items():
            tensor.lerp_(parameters[name].detach(), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.exchange(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the trained tensors."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.exchange(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model, to be saved."""
        if self._tensors and not self.exchanged:
            self.exchange(pl_module)


def check_average(ema: EMA | None, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with an average that a task does not keep, or without the one that it keeps.

    Args:
        ema: The average of the task.
        checkpoint: The content of the checkpoint.

    Raises:
        FileError: If only one of them has an average.
    """
    if (ema is not None) != ("average" in checkpoint):
        raise FileError(
            f"The checkpoint has {'an' if 'average' in checkpoint else 'no'} EMA of the weights, and this task "
            f"{'keeps' if ema is not None else 'has'} {'one' if ema is not None else 'none'}. "
            "Give the same ema as it was written with."
        )
