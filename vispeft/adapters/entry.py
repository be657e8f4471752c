"""The record of one adapter on a model: its method, units and their hosts, tensors and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vispeft.core.method import Method
from vispeft.core.plan import Plan
from vispeft.core.units import Unit
from vispeft.hosts.base import Host

__all__ = ["Entry", "Placed", "UnitTensor"]


@dataclass(frozen=True)
class Placed:
    """A unit at its host."""

    host: Host
    """The host."""
    unit: Unit
    """The unit."""
    task: str | None = None
    """The task it belongs to; None if it belongs to all."""


@dataclass(frozen=True)
class UnitTensor:
    """One trainable tensor of a unit."""

    key: str
    """Name of the unit in files."""
    name: str
    """Name in the unit."""
    unit: Unit
    """The unit."""
    tensor: nn.Parameter
    """The tensor."""

    def __str__(self) -> str:
        """Return its name in files."""
        return f"{self.key}.{self.name}"


@dataclass
class Entry:
    """One adapter of a bank."""

    method: Method
    plan: Plan
    units: dict[str, Unit]
    """Units by key."""
    tasks: tuple[str, ...] | None
    seed: int
    """Seed of the initial values."""
    frozen: bool = False
    """Whether training leaves it unchanged."""
    alone: str | None = None
    """The only task whose units train; None if all train."""
    placed: list[Placed] = field(default_factory=list)
    """The units at their hosts, including those of stochastic depth."""
    carriers: list[Host] = field(default_factory=list)
    """Hosts its streams pass through."""
    hosts: list[Host] = field(default_factory=list)
    """All hosts this adapter uses, each once."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Class names, preprocessing and metrics, for the file."""
    merge_error: float | None = None
    """Error of the last merge, if any."""

    @property
    def per_task(self) -> bool:
        """Whether it has one copy of its units per task."""
        return self.tasks is not None and not self.method.multi_task

    def held(self) -> set[str]:
        """Return the keys of units that stay as they are while one task trains alone."""
        return {item.key for item in self.plan if self.alone is not None and item.task != self.alone}

    def tensors(self) -> list[UnitTensor]:
        """List the trainable tensors of its units, in order."""
        return [UnitTensor(key, n, unit, t) for key, unit in self.units.items() for n, t in unit.named_parameters()]

    def blocks(self) -> dict[str, int | None]:
        """Map each unit's key to the index of its block."""
        return {item.key: item.site.block for item in self.plan}

    def roles(self) -> dict[str, str]:
        """Map each unit's key to the role of its site."""
        return {item.key: item.site.role for item in self.plan}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of its units by their names in files, in the form used in training."""
        return {f"{key}.{name}": t for key, unit in self.units.items() for name, t in unit.state_dict().items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its units by their names in files, in the form of `Method.file_method`."""
        return {f"{key}.{name}": t for key, unit in self.units.items() for name, t in unit.file_tensors().items()}

    def acting(self, task: str | None) -> Iterator[tuple[int, Unit]]:
        """Iterate over the units that act for a task, each with the slot number of its host.

        Args:
            task: The task; None for no task.
        """
        for placed in self.placed:
            unit = placed.unit.routed(task) if self.method.acts_for(placed.task, task) else None
            if unit is not None:
                yield placed.host.slot, unit
