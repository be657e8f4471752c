"""Changes of the tasks of an adapter: a task comes, goes, gets another name, or trains alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.placing import build_units, place_items
from vispeft.adapters.row_routes import RowRoutes
from vispeft.adapters.training import TrainingBank
from vispeft.core.fields import check_task_names
from vispeft.core.method import Method
from vispeft.core.plan import Plan, make_plan
from vispeft.core.route import Route
from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["TaskBank"]


class TaskBank(TrainingBank):
    """The tasks of a bank's adapters. The units of the other tasks, and those of all tasks, stay the same objects."""

    _routes: dict[tuple[tuple[str, ...], str | tuple[str, ...] | None], Route]
    _row_routes: RowRoutes

    def _forget_routes(self) -> None:
        """Drop kept routes, after a change of the adapters."""
        self._routes.clear()
        self._row_routes.clear()

    def add_task(self, task: str, name: str | None = None, *, method: Method | None = None, alone: bool = True) -> None:
        """Add a task to an adapter. The outputs of the other tasks stay as they are, bit for bit.

        Args:
            task: Name of the task.
            name: The adapter; may be left out where only one acts.
            method: Configuration with the new task, where it needs numbers of its own, such as a rank.
            alone: Train the new task alone (`train_task`), so that the other tasks' outputs stay; `unfreeze` lets all
                train again.

        Raises:
            UnknownNameError: If there is no such adapter.
            ConfigError: If the adapter has no tasks, or this one already; if its tasks depend on each other (MTLoRA's
                mode ``addition``); or if the method would change other units.
        """
        with self.changing("get another task"):  # the checks too: another thread may be changing the tasks
            label, entry, tasks = self._tasks_of(name, f"add_task({task!r})")
            wanted = [*tasks, task]
            check_task_names(wanted, f"add_task({task!r}) to the tasks {', '.join(tasks)}")
            changed = method or entry.method.with_tasks(wanted, dict(zip(tasks, tasks, strict=True)))
            plan = make_plan(changed, self._outer, wanted)
            self._check_kept(entry, plan, {item.key for item in entry.plan})
            if alone:
                _check_alone(plan, task, label)
            fresh = [item for item in plan if item.key not in entry.units]
            seed = int(torch.randint(0, 2**31 - 1, ()))
            entry.units |= build_units(fresh, self._model, seed, entry.units)
            try:
                place_items(entry, label, fresh, self._model, self.view, self._routing)
            except BaseException:
                self._take_out(entry, label, {item.key for item in fresh})
                raise
            self._take_over(entry, plan)
            if alone:
                self.train_task(task, label)
            else:
                self._declare(entry, label)

    def drop_task(self, task: str, name: str | None = None) -> None:
        """Remove a task from an adapter, with its units.

        Args:
            task: The task.
            name: The adapter; may be left out where only one acts.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            ConfigError: If it is the only task, or the tasks depend on each other.
        """
        with self.changing("lose a task"):
            label, entry, tasks = self._tasks_of(name, f"drop_task({task!r})")
            _check_known(task, label, tasks)
            wanted = [other for other in tasks if other != task]
            if not wanted:
                raise ConfigError(f"{task!r} is the only task of adapter {label!r}. Detach the adapter instead.")
            plan = make_plan(entry.method.with_tasks(wanted, {other: other for other in wanted}), self._outer, wanted)
            self._check_kept(entry, plan, {item.key for item in plan})
            self._take_out(entry, label, {item.key for item in entry.plan if item.task == task})
            entry.alone = None if entry.alone == task else entry.alone
            self._take_over(entry, plan)
            self._declare(entry, label)

    def rename_task(self, task: str, new: str, name: str | None = None) -> None:
        """Give a task of an adapter another name.

        Args:
            task: The present name.
            new: The new name.
            name: The adapter; may be left out where only one acts.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            ConfigError: If the name is invalid or taken.
        """
        with self.changing("rename a task"):
            label, entry, tasks = self._tasks_of(name, f"rename_task({task!r}, {new!r})")
            _check_known(task, label, tasks)
            wanted = [new if other == task else other for other in tasks]
            check_task_names(wanted, f"rename_task({task!r}, {new!r}) among the tasks {', '.join(tasks)}")
            method = entry.method.with_tasks(wanted, dict(zip(wanted, tasks, strict=True)))
            plan = make_plan(method, self._outer, wanted)
            keys = {item.key: dataclasses.replace(item, task=new).key for item in entry.plan if item.task == task}
            entry.units = {keys.get(key, key): unit for key, unit in entry.units.items()}
            for unit in entry.units.values():
                unit.rename_task(task, new)
            entry.placed = [dataclasses.replace(p, task=new) if p.task == task else p for p in entry.placed]
            for host in dict.fromkeys(entry.hosts):
                host.adapters[label] = _renamed(host.adapters[label], f"@{task}", f"@{new}")
            entry.alone = new if entry.alone == task else entry.alone
            self._take_over(entry, plan, {task: new})

    def train_task(self, task: str, name: str | None = None) -> None:
        """Let one task train alone: the units of other tasks and of all tasks, and the classifier, stay as they are.

        `unfreeze` lets all of them train again.

        Args:
            task: The task.
            name: The adapter; may be left out where only one acts.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            ConfigError: If its tasks have no units of their own, or depend on each other.
        """
        with self.changing("train one task alone"):
            label, entry, tasks = self._tasks_of(name, f"train_task({task!r})")
            _check_known(task, label, tasks)
            _check_alone(entry.plan, task, label)
            entry.alone = task
            self._declare(entry, label)
            self._wake()

    def _tasks_of(self, name: str | None, asked: str) -> tuple[str, Entry, Sequence[str]]:
        """Return name, record and tasks of an adapter whose tasks are about to change."""
        self.check_ready("change its tasks")
        label = self._label(name)
        entry = self._entries[label]
        if not entry.tasks:
            raise ConfigError(
                f"{asked}: adapter {label!r} has no tasks. Attach it with tasks, as attach(..., tasks=['seg'])."
            )
        if self._routing.used_elsewhere(label):
            raise ConfigError(f"Adapter {label!r} acts in a block of using() of another thread; let it end first.")
        return label, entry, entry.tasks

    @staticmethod
    def _check_kept(entry: Entry, plan: Plan, keys: Iterable[str]) -> None:
        """Refuse a plan in which units that stay would be missing or of other shapes."""
        before, after = ({item.key: item.shapes() for item in items} for items in (entry.plan, plan))
        for key in keys:
            if before.get(key) != after.get(key):
                raise ConfigError(
                    f"The change of tasks would change {key}, from {before.get(key)} to {after.get(key)}. Give a "
                    "method that differs in its tasks alone."
                )

    def _take_out(self, entry: Entry, label: str, keys: set[str]) -> None:
        """Remove units from their hosts."""
        gone = {id(entry.units.pop(key)) for key in keys}
        for host in entry.hosts:
            units = host.adapters[label] if label in host.adapters else nn.ModuleDict()
            assert isinstance(units, nn.ModuleDict)
            for slot in [slot for slot, unit in units.items() if id(unit) in gone]:
                del units[slot]
        entry.placed = [placed for placed in entry.placed if id(placed.unit) not in gone]

    def _take_over(self, entry: Entry, plan: Plan, names: Mapping[str, str] | None = None) -> None:
        """Note the new plan, and make routes again; a default route for a task that is gone is for none."""
        entry.method, entry.plan, entry.tasks = plan.method, plan, plan.tasks
        entry.units = {item.key: entry.units[item.key] for item in plan}
        entry.hosts, entry.carriers = list(dict.fromkeys(entry.hosts)), list(dict.fromkeys(entry.carriers))
        self._forget_routes()
        default = self._routing.default
        task = (names or {}).get(default.task or "", default.task)
        known = {task for other in default.names for task in self._entries[other].tasks or ()}
        self._routing.set(self.route(default.names, task if task in known else None, default.weights))


def _check_known(task: str, label: str, tasks: Sequence[str]) -> None:
    if task not in tasks:
        raise UnknownNameError(f"task of adapter {label!r}", task, tasks)


def _check_alone(plan: Plan, task: str, label: str) -> None:
    """Refuse to train one task alone, where it has no units or others depend on it."""
    if not any(item.task == task for item in plan):
        raise ConfigError(f"Adapter {label!r} has no units of the task {task!r} alone, so it cannot train alone.")
    if any(plan.method.acts_for(other, task) for other in plan.tasks or () if other != task):
        raise ConfigError(
            f"The tasks of this {type(plan.method).__name__} depend on each other, so {task!r} cannot train without "
            "changing the others."
        )


def _renamed(units: nn.Module, old: str, new: str) -> nn.ModuleDict:
    """Return the units of a host under new names, in their order."""
    names = {name: name.removesuffix(old) + new if name.endswith(old) else name for name, _ in units.named_children()}
    made = nn.ModuleDict({names[name]: unit for name, unit in units.named_children()})
    made.training = units.training
    return made
