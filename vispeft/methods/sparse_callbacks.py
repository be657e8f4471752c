"""The schedules of `vispeft.methods.sparse` in a task's training."""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from vispeft.adapters.schedules import Schedule
from vispeft.core.families import frozen_tensor
from vispeft.core.method import Method
from vispeft.errors import ConfigError
from vispeft.methods.sparse_schedules import SM3, DropAndRegrow, Refresh, check_optimizer
from vispeft.methods.sparse_unit import SparseUnit

__all__ = ["Bound", "Refreshing", "Regrowing"]

Rule = TypeVar("Rule", DropAndRegrow, Refresh)
"""Which entries go and come, and when."""


class Bound(Schedule):
    """Values that tell `SM3` their entries, in a task's training."""

    def __init__(self, method: Method) -> None:
        """Store the method.

        Args:
            method: The configuration.
        """
        self.method = method

    def units(self, task: Any) -> list[SparseUnit]:
        """Return the units of the method that train.

        Args:
            task: The task.
        """
        names = [name for name in task.bank.names if task.bank.plan(name).method == self.method]
        units = [unit for name in names if name not in task.bank.frozen for unit in task.bank.units(name).values()]
        return [unit for unit in units if isinstance(unit, SparseUnit)]

    def begin(self, task: Any, trainer: Any) -> None:
        """Tell the optimiser which entries the values belong to."""
        for optimizer in trainer.optimizers:
            for unit in self.units(task) if isinstance(optimizer, SM3) else ():
                optimizer.bind(unit.values, unit.positions, unit.site.out_features, unit.site.columns)


def _check(task: Any, trainer: Any, schedule: str, reasons: dict[str, bool]) -> None:
    """Refuse a training in which entries cannot change, for these reasons or those of all schedules."""
    for reason, holds in {
        **reasons,
        "processes would choose other entries; train with one": trainer.world_size > 1,
        "an average of the values would mix those of different entries; leave ema out": task.ema is not None,
    }.items():
        if holds:
            raise ConfigError(f"Sparse(schedule={schedule!r}) cannot run here: {reason}, or schedule='fixed'.")
    check_optimizer(trainer.optimizers[0], schedule)


class Ruled(Bound, Generic[Rule]):
    """Entries that change by a rule in a task's training, whose state is the rule's."""

    def __init__(self, method: Method, rule: Rule) -> None:
        """Store what is scheduled.

        Args:
            method: The configuration.
            rule: The rule.
        """
        super().__init__(method)
        self.rule = rule

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return self.rule.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """
        self.rule.restore(state)


class Regrowing(Ruled[DropAndRegrow]):
    """Drop and regrow in a task's training."""

    def begin(self, task: Any, trainer: Any) -> None:
        """Refuse trainings in which gradients of whole weights cannot be seen, or moments not be set."""
        reasons = {
            "a compiled model shows no gradients of whole weights; leave compile out": task.bank.is_compiled,
            "gradients are scaled in float16; take bf16-mixed or 32-true": task.scaled,
            "the training has no end; give max_epochs or max_steps": math.isinf(trainer.estimated_stepping_batches),
        }
        _check(task, trainer, "rigl", reasons)
        super().begin(task, trainer)

    def before(self, task: Any, trainer: Any) -> None:
        """Watch gradients where they choose."""
        self.rule.before_step(self.units(task), trainer.accumulate_grad_batches)

    def after(self, task: Any, trainer: Any) -> None:
        """Replace entries where it is time to."""
        total = int(trainer.estimated_stepping_batches)
        self.rule.after_step(self.units(task), trainer.optimizers[0], total)

    def end(self, task: Any) -> None:
        """Watch no gradients any more."""
        for unit in self.units(task):
            unit.observer = None


class Refreshing(Ruled[Refresh]):
    """LIFT's entries, chosen again in a task's training."""

    def begin(self, task: Any, trainer: Any) -> None:
        """Refuse trainings in which entries cannot change."""
        reasons = {"a compiled model keeps its numbers of entries; leave compile out": task.bank.is_compiled}
        _check(task, trainer, "lift", reasons)
        super().begin(task, trainer)

    def after(self, task: Any, trainer: Any) -> None:
        """Choose again where it is time to."""
        units = self.units(task)
        self.rule.after_step(units, [self._weight(task, unit) for unit in units], trainer.optimizers[0])

    @staticmethod
    def _weight(task: Any, unit: SparseUnit) -> Tensor:
        weight = cast(Tensor, frozen_tensor(task.bank.model.get_submodule(unit.site.path), "weight"))
        return weight.detach()
