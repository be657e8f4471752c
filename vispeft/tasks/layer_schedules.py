"""Schedules over the blocks of any method: which blocks train in a step, and decay that differs by tensor."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from vispeft.building.known import register_class
from vispeft.core.units import Unit
from vispeft.errors import ConfigError, counted

__all__ = ["LayerSchedule", "ProgressiveLayers", "TensorDecay", "layers_of"]

logger = logging.getLogger(__name__)

Layer = tuple[list[nn.Parameter], dict[str, Unit]]
"""Trainable tensors and units of one block, these by their names in files."""


class LayerSchedule(Callback):
    """A schedule that trains the adapters of some blocks in each step, over any method with units in several blocks.

    The classifier, units outside of blocks and tensors that several units share always train. The other blocks get no
    gradient, no update and no decay in the step, no optimiser state before they are first chosen, and keep no
    activations for their adapters; the backward pass still runs down to the lowest chosen block. In a compiled model,
    and with several processes, gradients are computed and then dropped: the same training, without that saving. A
    choice holds for all batches whose gradients are summed for a step.
    """

    def __init__(self) -> None:
        """Choose nothing yet."""
        self.chosen: tuple[int, ...] = ()
        """The blocks of the present step, as indices among those with units."""
        self.masks = False
        """Whether gradients are computed and dropped."""
        self.layers: list[Layer] = []
        """The blocks with units, in forward order."""

    @abstractmethod
    def choose(self, trainer: Trainer, task: Any, batch: Any) -> tuple[int, ...]:
        """Choose the blocks of a step.

        Args:
            trainer: The trainer, before the step.
            task: The task.
            batch: The step's first batch.

        Returns:
            Indices among the blocks with units.
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks with units.

        Raises:
            ConfigError: If the method has units of its own in fewer than two blocks.
        """
        bank = cast(Any, pl_module).bank
        self.layers = layers_of(bank, type(self).__name__)
        reasons = (("there are several processes", trainer.world_size > 1), ("the model is compiled", bank.is_compiled))
        reason = next((told for told, holds in reasons if holds), None)
        self.masks = reason is not None
        if self.masks:
            logger.warning(
                "%s computes all gradients and drops those of the blocks that a step leaves out, since %s: memory and "
                "time stay those of an ordinary training.",
                type(self).__name__,
                reason,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the blocks at the first batch of a step, and switch the others off."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.chosen = self.choose(trainer, pl_module, batch)
        if not self.masks:
            self._switch(self.chosen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Let every tensor require a gradient again."""
        self._switch(range(len(self.layers)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let every tensor require a gradient again."""
        self._switch(range(len(self.layers)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of the blocks that the step leaves out; without a gradient nothing decays either."""
        for index, (tensors, _) in enumerate(self.layers):
            for tensor in tensors if index not in self.chosen else ():
                tensor.grad = None

    def _switch(self, chosen: Sequence[int]) -> None:
        for index, (tensors, _) in enumerate(self.layers):
            for tensor in tensors:
                tensor.requires_grad_(index in chosen)


@register_class
class ProgressiveLayers(LayerSchedule):
    """Train the adapters of the last blocks first, and one block after the other as the training goes on."""

    def __init__(self, until: float = 0.5, first: int = 1) -> None:
        """Set the schedule.

        Args:
            until: Share of the training after which all blocks train.
            first: Number of blocks, counted from the last, that train from the start.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        if not 0 < until <= 1:
            raise ConfigError(f"ProgressiveLayers(until={until}): a share of the training is needed, above 0 up to 1.")
        if not isinstance(first, int) or first < 1:
            raise ConfigError(f"ProgressiveLayers(first={first!r}): a whole number of at least 1 is needed.")
        self.until, self.first = until, first

    def choose(self, trainer: Trainer, task: Any, batch: Any) -> tuple[int, ...]:
        """Choose the last blocks: their number rises evenly from `first` to all."""
        steps, count = trainer.estimated_stepping_batches, len(self.layers)
        passed = min(1.0, trainer.global_step / max(1.0, self.until * steps))
        first = min(self.first, count)
        return tuple(range(count - first - math.floor(passed * (count - first)), count))


@register_class
class TensorDecay(Callback):
    """Give tensors a weight decay of their own, by name, such as 0 for LoRA's A and 0.5 for B.

    The default is the asymmetric decay of STAR (arXiv 2403.01165; public code callanwu/STAR).
    """

    def __init__(self, decays: Mapping[str, float] | None = None) -> None:
        """Set the decays.

        Args:
            decays: Weight decay by the name of a tensor within its unit; None for ``{"A": 0.0, "B": 0.5}``.

        Raises:
            ConfigError: If a decay is negative.
        """
        self.decays = {"A": 0.0, "B": 0.5} if decays is None else dict(decays)
        for name, decay in self.decays.items():
            if not 0 <= decay < math.inf:
                raise ConfigError(f"TensorDecay(decays={{{name!r}: {decay}}}): a number of at least 0 is needed.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the units, before the optimiser is made.

        Raises:
            ConfigError: If no unit has a tensor of one of the names.
        """
        bank = cast(Any, pl_module).bank
        units = [unit for name in bank.names if name not in bank.frozen for unit in bank.units(name).values()]
        own = {name for unit in units for name, _ in unit.named_parameters()}
        for name in self.decays:
            if name not in own:
                raise ConfigError(
                    f"TensorDecay was given a decay for {name!r}, and the units that train have no such tensor; they "
                    f"have {', '.join(sorted(own)) or 'none'}."
                )
        for unit in units:
            unit.decays = {name: decay for name, decay in self.decays.items() if name in unit._parameters}


def layers_of(bank: Any, asked: str) -> list[Layer]:
    """Collect the trainable tensors and the units of each block that has some, over all adapters that train.

    Args:
        bank: The bank of the model.
        asked: The schedule, for the error message.

    Returns:
        One entry per block, in forward order; units that lend their tensors to others are left out.

    Raises:
        ConfigError: If there are fewer than two such blocks.
    """
    layers: dict[int, Layer] = {}
    for name in bank.names:
        plan = () if name in bank.frozen else bank.plan(name)
        lenders = {item.lender for item in plan}
        units = bank.units(name)
        for item in plan:
            own = list(units[item.key].parameters())
            if item.site.block is not None and own and item.key not in lenders:
                tensors, members = layers.setdefault(item.site.block, ([], {}))
                tensors += own
                members[item.key] = units[item.key]
    if len(layers) < 2:
        raise ConfigError(
            f"{asked} chooses among blocks, and the adapters that train have units of their own in "
            f"{counted(len(layers), 'block')}. Take a method with a unit in each block, such as LoRA or AdapterPlus."
        )
    return [layers[block] for block in sorted(layers)]
