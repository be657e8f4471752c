"""The training side of a bank: the declaration, optimiser groups, verification of gradients, and counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from vispeft.adapters.compiling import CompilingBank
from vispeft.adapters.entry import Entry
from vispeft.adapters.memory import left_alone, place_memory
from vispeft.adapters.report import Report
from vispeft.adapters.task_maps import TaskMaps
from vispeft.adapters.token_merging import place_merging
from vispeft.adapters.verify import Probe, find_dead
from vispeft.core.origin import MEMORY, Memory
from vispeft.core.route import Route
from vispeft.errors import UnknownNameError, counted
from vispeft.hosts.base import Host, take_off
from vispeft.hosts.model import HEADS, ModelHost
from vispeft.hosts.token_merging import without_merging

__all__ = ["TrainingBank"]

logger = logging.getLogger(__name__)


class TrainingBank(CompilingBank):
    """The declaration of a bank (which adapters train) and the functions that depend on it."""

    def route(self, names: tuple[str, ...], task: str | None, weights: tuple[float, ...] = ()) -> Route:
        """Return the route of a choice of adapters."""
        raise NotImplementedError

    @property
    def memory(self) -> Memory:
        """How much a training step keeps for its backward pass, with equal gradients.

        ``plain`` keeps what PyTorch keeps. ``lean``, the default, computes the outputs of norms and activations in
        front of adapted layers again. ``leaner`` also computes the first layers of MLPs again, which takes about a
        ninth of a step of full fine-tuning more. In a model compiled by a named backend the compiler finds what to
        compute again: element-wise operations in ``lean``, and what takes the fewest operations for each byte in
        ``leaner``.
        """
        return self._routing.memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if memory not in MEMORY:
            raise UnknownNameError("memory", memory, MEMORY)
        self._check_unmerged("choose how much a step keeps")
        self.check_whole("choose how much a step keeps")
        self._routing.memory = memory
        self._place_memory()
        self._set_compiled()
        self._place_compiled()
        chooses = memory == "leaner" and not self.is_compiled  # else the compiler does
        left = left_alone(self._model, self.view) if chooses else []
        if left:
            logger.warning(
                "memory='leaner' leaves %s as they are, which are gated or unusual: %s%s.",
                counted(len(left), "activation"),
                ", ".join(left[:3]),
                " ..." if len(left) > 3 else "",
            )

    def _place_memory(self) -> None:
        """Make the hosts that memory and token merging need, and take off those they do not need any more."""
        found = place_memory(self._model, self.view, self._routing, self._entries.values())
        merging = place_merging(self._model, self.view, self._routing) if self._entries else []
        before, self._lean = self._lean, [*found, *merging]
        kept = {id(host) for host in self._lean}
        for host in before:
            if id(host) not in kept and isinstance(host, Host) and not (host.adapters or host.carried):
                take_off(host)

    def freeze(self, name: str) -> None:
        """Exclude an adapter and its classifier from training; it may still act.

        During training, the optimiser keeps its state, and the tensors get neither updates nor weight decay.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
            MergeError: If the model is merged.
        """
        self._set_frozen(name, True)

    def unfreeze(self, name: str) -> None:
        """Include an adapter and its classifier in training; new and loaded adapters are included.

        All of its tasks train then, also after `TaskBank.train_task`.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
            MergeError: If the model is merged.
        """
        self._set_frozen(name, False)

    def _set_frozen(self, name: str, frozen: bool) -> None:
        self._check_unmerged(f"{'freeze' if frozen else 'unfreeze'} an adapter")
        entry = self._entry(name)
        entry.frozen, entry.alone = frozen, entry.alone if frozen else None
        self._declare(entry, name)
        self._wake()

    def _declare(self, entry: Entry, name: str) -> None:
        """Set ``requires_grad`` of an adapter and its classifier."""
        head, held = self._heads.get(name), entry.held()
        modules = [(unit, key in held) for key, unit in entry.units.items()]
        for unit, stays in modules:
            unit.held = stays
        kept = entry.alone is not None or not entry.method.trains_head()
        for module, stays in [*modules, *([] if head is None else [(head, kept)])]:
            for parameter in module.parameters():
                parameter.requires_grad_(not (entry.frozen or stays))
                if entry.frozen or stays:
                    parameter.grad = None  # or an optimiser would still use it

    def _wake(self) -> None:
        """Choose the modules that follow the model's mode, and apply the mode."""
        model = cast(ModelHost, self._model)
        awake = {*self.view.head_drop_paths, *self.awake_heads()}
        if any(entry.method.trains_base for entry in self._entries.values() if not entry.frozen):
            awake.add("")
        model.awake, model.asleep = frozenset(awake), frozenset(self.frozen)
        model.train(model.training)

    def awake_heads(self) -> frozenset[str]:
        """Return the paths of the classifiers that follow the model's mode."""
        return frozenset(f"{HEADS}.{name}" for name, entry in self._entries.items() if not entry.frozen)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """List all tensors of the adapters that are not frozen, their classifiers included, by state-dict name.

        The order is that of attaching, and within an adapter that of the model. Tensors that get no gradient in this
        step are included.

        Raises:
            ConfigError: If the classifier was replaced by hand.
        """
        if self._merged is not None:
            return []
        self._heads.check_place()
        place: dict[int, int] = {}
        for number, (name, entry) in enumerate(self._entries.items()):
            if not entry.frozen:
                place.update({id(tensor): number for tensor in self._trained(name, entry)})
        found = [(name, tensor) for name, tensor in self._model.named_parameters() if id(tensor) in place]
        return sorted(found, key=lambda item: place[id(item[1])])

    def _trained(self, name: str, entry: Entry) -> list[nn.Parameter]:
        """List the tensors of an adapter that train; units that are held, and a classifier that stays, are left out."""
        if entry.alone is None and entry.method.trains_head():
            return list(self.named_tensors(name).values())
        held = entry.held()
        return [tensor.tensor for tensor in entry.tensors() if tensor.key not in held]

    def named_tensors(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters (not copies) by their names in files.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        label = self._label(name)
        head = self._heads.get(label)
        classifier = {} if head is None else {f"head/{key}": tensor for key, tensor in head.named_parameters()}
        return {**{str(e): e.tensor for e in self._entries[label].tensors()}, **classifier}

    def parameter_groups(
        self, lr: float, weight_decay: float, tables: bool = False, vectors: bool = False
    ) -> list[dict[str, Any]]:
        """Sort `trainable_parameters` into optimiser groups.

        Tensors of fewer than two dimensions, those a unit exempts and those timm exempts (positions, class tokens)
        get no weight decay.

        Args:
            lr: Learning rate; units may set a multiple of it.
            weight_decay: Weight decay of the tensors that decay.
            tables: Whether those timm exempts decay too, if they have two dimensions or more.
            vectors: Whether those of fewer than two dimensions decay too, if neither timm nor a unit exempts them.

        Returns:
            Groups with ``params``, ``lr``, ``weight_decay`` and ``name``, for ``torch.optim``; none is empty, and there
            are none where every adapter is frozen.
        """
        # walks the whole model
        timm_exempts: set[str] = set() if tables else getattr(self._model, "no_weight_decay", set)()
        entries = [tensor for entry in self._entries.values() for tensor in entry.tensors()]
        exempt = {
            id(e.tensor)
            for e in entries
            if e.name in e.unit.no_decay or ".".join(filter(None, (e.key.split("/", 1)[0], e.name))) in timm_exempts
        }
        factors = {id(e.tensor): e.unit.lr_factors.get(e.name, 1.0) for e in entries}
        own = {id(e.tensor): e.unit.decays[e.name] for e in entries if e.name in e.unit.decays}
        groups: dict[str, dict[str, Any]] = {}
        for _, parameter in self.trainable_parameters():
            decays = (vectors or parameter.ndim > 1) and id(parameter) not in exempt
            factor = factors.get(id(parameter), 1.0)
            name = ("decay" if decays else "no_decay") + ("" if factor == 1 else f" lr x {factor:g}")
            decay = own.get(id(parameter), weight_decay if decays else 0.0)
            name += f" decay {decay:g}" if id(parameter) in own else ""
            group = groups.setdefault(name, {"params": [], "lr": lr * factor, "weight_decay": decay, "name": name})
            group["params"].append(parameter)
        return list(groups.values())

    def verify(
        self, outer: nn.Module | None = None, without: Sequence[str] = (), *, names: Sequence[str] | None = None
    ) -> None:
        """Check that every tensor of each adapter that is not frozen receives a gradient.

        Runs a forward and backward pass for one noise image under each adapter's own route, for each of its tasks, with
        all units perturbed from their initial values; all values are restored.

        Args:
            outer: The module to run, if not the model itself: a wrapper that maps images to one or several tensors,
                such as the maps a decoder reads. `TaskMaps` runs all tasks.
            without: Roles that do not affect the outputs of `outer`; their units are not checked.
            names: The adapters to check; None for all that are not frozen.

        Raises:
            VerificationError: If a tensor gets no gradient; the message names the sites.
        """
        # Other threads would see the perturbed units; and two precisions could merge other tokens.
        with self.changing("verify its adapters"), without_merging(self._routing):
            self.check_ready("verify its adapters")
            for name in [n for n in self._entries if n not in self.frozen] if names is None else names:
                entry = self._entries[name]
                beside = {item.key for item in entry.plan if item.site.role in without}
                tensors = [tensor for tensor in entry.tensors() if tensor.key not in beside]
                # A method that branches by task reaches its tasks through maps alone.
                run = outer or (TaskMaps(self._model) if entry.method.one_pass else self._outer)
                tasks = None if isinstance(run, TaskMaps) else entry.tasks
                routes = [self.route((name,), task) for task in tasks or (None,)]
                probe = Probe(self._model, run, self.view, self._routing)
                find_dead(probe, routes, tensors, entry.blocks())

    def report(self, name: str | None = None) -> Report:
        """Count an adapter's trainable parameters and saved bytes; printing the result shows a table.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        label = self._label(name)
        entry, roles = self._entries[label], self._entries[label].roles()
        by_role: dict[str, int] = {}
        for tensor in entry.tensors():
            by_role[roles[tensor.key]] = by_role.get(roles[tensor.key], 0) + tensor.tensor.numel()
        head = self._heads.get(label)
        return Report(
            adapter=label,
            method=entry.method.name,
            family=self.view.family,
            trainable=sum(by_role.values()),
            trainable_head=0 if head is None else sum(p.numel() for p in head.parameters()),
            backbone=sum(tensor.numel() for _, tensor in self.base_tensors()),
            stored_bytes=self.stored_bytes(label),
            stored_bytes_head=self.stored_bytes_head(label),
            by_role=by_role,
        )

    def stored_bytes(self, name: str | None = None) -> int:
        """Return the size of an adapter's tensors in a file, its classifier's included, without headers, in bytes.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        raise NotImplementedError

    def stored_bytes_head(self, name: str | None = None) -> int:
        """Return the part of `stored_bytes` that is the classifier's.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        raise NotImplementedError
