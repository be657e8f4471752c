"""The plan: the units a method would build on a model, printable before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from rich.console import Console, RenderResult
from rich.table import Table
from torch import nn

from vispeft.core.families import describe, unwrap
from vispeft.core.fields import check_task_names
from vispeft.core.method import Method, PlanItem
from vispeft.errors import ConfigError, SiteError

__all__ = ["Plan", "make_plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """The units a method would put on a model."""

    method: Method
    """The method."""
    family: str
    """The model's family."""
    items: tuple[PlanItem, ...]
    """One item per unit, in forward order."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks; None for none."""

    def __iter__(self) -> Iterator[PlanItem]:
        """Iterate over the items."""
        return iter(self.items)

    def __len__(self) -> int:
        """Count the units."""
        return len(self.items)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List every trainable tensor by its name in files."""
        return {f"{item.key}.{name}": shape for item in self.items for name, shape in item.shapes().items()}

    @property
    def trainable(self) -> int:
        """Number of trainable parameters, without the classifier."""
        return sum(prod(shape) for shape in self.shapes().values())

    def by_role(self) -> dict[str, int]:
        """Sum the trainable parameters by role."""
        counts: Counter[str] = Counter()
        for item in self.items:
            counts[item.site.role] += sum(prod(shape) for shape in item.shapes().values())
        return dict(counts)

    def __rich_console__(self, console: Console, _: object) -> RenderResult:
        """Render as a table."""
        table = Table(title=f"{type(self.method).__name__} on {self.family}: {self.trainable:,} parameters to train")
        for heading in ("site", "role", "unit", "tensors", "parameters"):
            table.add_column(heading, justify="right" if heading == "parameters" else "left", overflow="fold")
        for item in self.items:
            shapes = item.shapes()
            tensors = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            count = sum(prod(shape) for shape in shapes.values())
            unit = item.key.rpartition("/")[2]  # with its task
            table.add_row(item.site.key or "(model)", item.site.role, unit, tensors, f"{count:,}")
        yield table

    def __str__(self) -> str:
        """Render as text."""
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def make_plan(method: Method, model: nn.Module, tasks: Sequence[str] | None = None) -> Plan:
    """Plan a method on a model.

    Args:
        method: The method.
        model: A timm model, or a wrapper around one.
        tasks: Names of the tasks, unless the method names its own; one that is not `Method.multi_task` gets one copy of
            its units per task.

    Returns:
        The plan.

    Raises:
        BackboneError: If the model is not supported.
        SiteError: If a role matches nothing, or the method is not defined for the family.
        ConfigError: If a task name is invalid or given twice.
    """
    if tasks is not None:
        check_task_names(tasks, f"attach(..., tasks={tasks!r})")
    if not isinstance(method, Method):
        raise ConfigError(
            f"plan was given {method!r} as method; give a configuration such as vispeft.SSF(), or "
            "vispeft.method('ssf')."
        )
    view, method = describe(model), method.for_tasks(tasks)
    items = tuple(method.items(view, unwrap(model)))
    _check_lenders(method, items)
    if tasks is not None and not method.multi_task:
        items = tuple(item.copy_for(task) for item in items for task in tasks)
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise SiteError(f"{type(method).__name__} plans two units under one name: {', '.join(twice[:3])}. Rename one.")
    named = tuple(tasks or method.task_names())
    return Plan(method=method, family=view.family, items=items, tasks=named or None)


def _check_lenders(method: Method, items: tuple[PlanItem, ...]) -> None:
    known: set[str] = set()
    for item in items:
        if item.lender is not None and item.lender not in known:
            raise ConfigError(
                f"{type(method).__name__} plans {item.key} with the tensors of {item.lender}, which is no earlier "
                f"item; there are {', '.join(sorted(known)[:3]) or 'none'}. Yield the lender first."
            )
        known.add(item.key)


def plan(model: nn.Module, method: Method) -> Plan:
    """Plan the units a method would build on a model, without changing the model.

    Args:
        model: A timm model, or a ``features_only`` wrapper around one.
        method: The method.

    Returns:
        The plan; print it, or iterate over it.

    Raises:
        BackboneError: If the model is not supported.
        SiteError: If a role matches nothing, or the method is not defined for the family.
    """
    return make_plan(method, model)
