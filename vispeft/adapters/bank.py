"""The bank: the handle on all adapters of one model, from attaching to merging, saving and taking off."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.heads import own_head
from vispeft.adapters.hooks import HookBank
from vispeft.adapters.merge import Merged, MergeReport, merge_model, undo_merge
from vispeft.adapters.placing import build_units, check_base, place_units
from vispeft.adapters.porting import PortBank
from vispeft.adapters.routes import make_route, make_shared_route, recent
from vispeft.adapters.row_routes import RowRoutes, check_rows
from vispeft.adapters.sharding import ShardingBank
from vispeft.adapters.stacking import StackBank
from vispeft.adapters.task_bank import TaskBank
from vispeft.adapters.token_merging import MergingBank, check_merging
from vispeft.core.families import family_of, unwrap
from vispeft.core.fields import check_task_names
from vispeft.core.method import Method, is_registered
from vispeft.core.plan import make_plan
from vispeft.core.route import Route
from vispeft.errors import ConfigError, MergeError
from vispeft.hosts.base import Host, ensure_host, take_off
from vispeft.hosts.model import BANK, ModelHost, recompute_contexts

__all__ = ["AdapterBank"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_guard = threading.Lock()
"""Held while a bank is made, removed or counted, never while a thread waits for another."""
_users: WeakKeyDictionary[AdapterBank, int] = WeakKeyDictionary()
"""Number of calls that are adding an adapter to a bank."""


class AdapterBank(PortBank, StackBank, TaskBank, HookBank, ShardingBank, MergingBank):
    """All adapters of one model.

    Get one from `attach` or `load`. The model stays a timm model in use; the bank is only needed to manage the
    adapters. It keeps two separate records: the route determines which adapters act (`set_active`, `using`,
    `disabled`), and the declaration determines which train (`freeze`, `unfreeze`).
    """

    def __init__(self, outer: nn.Module) -> None:
        """Create a bank for a timm model without adapters, which is left as it is until the first one is added.

        Args:
            outer: The timm model, or a ``features_only`` wrapper around it.
        """
        super().__init__(outer)
        self._routes: dict[tuple[tuple[str, ...], str | tuple[str, ...] | None], Route] = {}
        self._row_routes = RowRoutes(self._heads, self._routing)
        self._requires_grad: dict[str, bool] = {}

    def __repr__(self) -> str:
        """Name the adapters, those that act, and those that are frozen."""
        lists = (("adapters", self.names), ("active", self.active), ("frozen", self.frozen))
        told = ", ".join(f"{word}={names}" for word, names in lists)
        return f"AdapterBank({told}{', merged' if self._merged is not None else ''})"

    @staticmethod
    @contextmanager
    def opened(model: nn.Module) -> Iterator[AdapterBank]:
        """Hold the bank of a model, or a new one, while a block of code adds an adapter; called by `attach` and `load`.

        Threads that add the first adapters at once get the same bank. A bank that is still empty when the last of them
        leaves the block is removed, and the model is again as it was.

        Args:
            model: A timm model, or a ``features_only`` wrapper around one.

        Yields:
            The bank.

        Raises:
            ConfigError: If it is no module.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{model!r} was given as model; give a timm model, such as one of vispeft.create_model.")
        with _guard:
            bank = AdapterBank.of(model) or AdapterBank(model)
            unwrap(model).__dict__[BANK] = bank
            _users[bank] = _users.get(bank, 0) + 1
        try:
            yield bank
        finally:
            with _guard:
                _users[bank] -= 1
            bank._close_if_empty()

    @staticmethod
    def of(model: nn.Module) -> AdapterBank | None:
        """Return the bank of a model with adapters.

        Args:
            model: A timm model, a ``features_only`` wrapper around one, or a compiled one.

        Returns:
            Its bank; None if it has no adapters.
        """
        bank = unwrap(model).__dict__.get(BANK)
        return bank if isinstance(bank, AdapterBank) else None

    # ------------------------------------------------------------------ adding and taking off

    def add(
        self, method: Method, name: str = "default", tasks: Sequence[str] | None = None, verify: bool = True
    ) -> None:
        """Add an adapter and make it the only one that acts; see `attach`."""
        seed = int(torch.randint(0, 2**31 - 1, ()))
        if isinstance(method, Method) and not is_registered(method):
            logger.warning(
                "%s is not registered as %r, so no file of this adapter can be loaded as one. Put @vispeft.register "
                "above the class, and give it a name of its own.",
                type(method).__name__,
                method.name,
            )
        with self.adding(method, name, tasks, seed):
            self._heads.put(name, own_head(method, self.view, self._model, seed))
            self.declare(name)
            if verify:
                self.verify(names=[name])
                self._check_trains(method, name)

    def _check_trains(self, method: Method, name: str) -> None:
        """Refuse an adapter without a tensor that trains."""
        if not self.named_tensors(name):
            raise ConfigError(
                f"{type(method).__name__} has nothing to train here: it adds no tensors to this backbone, and the "
                "model has no classifier. Create the model with num_classes, or choose another method. Pass "
                "verify=False if layers behind the model train."
            )

    @contextmanager
    def adding(self, method: Method, name: str, tasks: Sequence[str] | None, seed: int | None) -> Iterator[Entry]:
        """Place the units of a new adapter, without a classifier, and roll back on an error in the ``with`` block.

        Args:
            method: The method.
            name: Name of the adapter.
            tasks: Its tasks; None for none.
            seed: Seed of its initial values; None if they will come from a file.
        """
        if not isinstance(method, Method):
            raise ConfigError(
                f"attach was given {method!r} as method; give a configuration such as vispeft.SSF(), "
                "or vispeft.method('ssf')."
            )
        with self.changing("attach another adapter"):
            self._check_new_name(name)
            self.check_ready("attach another adapter")
            self._open()
            yield from self._adding(method, name, tasks, seed)

    def _open(self) -> None:
        """Freeze the base, and turn the model and its classifier into hosts, where that is not done yet."""
        check_base(self._model, self.view.head_path)
        if isinstance(self._model, ModelHost):
            return
        self._requires_grad = {name: p.requires_grad for name, p in self._model.named_parameters()}
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._heads.open()
        ensure_host(self._model, family_of(self._model).host, routing=self._routing)
        self._wake()

    def _adding(self, method: Method, name: str, tasks: Sequence[str] | None, seed: int | None) -> Iterator[Entry]:
        before = self._routing.default
        # Tensors made in inference mode could never train; on a base that was made in it, none can.
        with torch.inference_mode(next(self._model.parameters()).is_inference()):
            plan = make_plan(method, self._outer, tasks)
            units = build_units(plan, self._model, seed)
            entry = Entry(plan.method, plan, units, plan.tasks, seed or 0)
            self._entries[name] = entry
            try:
                place_units(entry, name, self._model, self.view, self._routing)
                self._place_memory()
                self._place_compiled()
                yield entry
            except BaseException:  # also an interrupt, in the middle of the verification
                self.detach(name)
                if self._entries:
                    self._routing.set(self.route(before.names, before.task, before.weights))
                raise

    def declare(self, name: str) -> None:
        """Make a new adapter trainable and the only one that acts.

        Args:
            name: The adapter, whose classifier is in place.
        """
        self._declare(self._entries[name], name)
        head = self._heads.get(name)
        if head is not None:
            head.train(self._model.training)
        model = cast(ModelHost, self._model)
        if self._entries[name].method.trains_base:
            self._wake()
        else:
            model.awake |= self.awake_heads()
        self.set_active(name)

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"An adapter was to be called {name!r}; use letters, digits, '-' and '_'.")
        if hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f"An adapter was to be called {name!r}, an attribute of PyTorch's modules, which cannot hold it. "
                f"Choose another name, such as {name + '_1'!r}."
            )
        if name in self._entries:
            raise ConfigError(
                f"There is an adapter {name!r} on this model already (all: {', '.join(self._entries)}). "
                "Choose another name, or detach it first."
            )

    def detach(self, name: str) -> None:
        """Remove an adapter; removing the last one restores the model's state before the first.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
            MergeError: If it was merged with ``keep_original=False``.
        """
        name = self._label(name)
        with self.changing("detach an adapter"):
            self._detach(name, self._entry(name))

    def _detach(self, name: str, entry: Entry) -> None:
        if self._routing.used_elsewhere(name):
            raise ConfigError(f"Adapter {name!r} acts in a block of using() of another thread; let it end first.")
        if self._merged is not None:
            self.unmerge()
        self.check_ready("detach an adapter")
        default = self._routing.default
        names = tuple(other for other in default.names if other != name)
        keeps_task = any(default.task in (self._entries[other].tasks or ()) for other in names)
        weights = tuple(w for other, w in zip(default.names, default.weights, strict=False) if other != name)
        self._routing.set(self.route(names, default.task if keeps_task else None, weights))
        for host in entry.hosts:
            if name in host.adapters:
                del host.adapters[name]
            host.carried -= {name}
            if not host.adapters and not isinstance(host, ModelHost):
                take_off(host)
        self._heads.drop(name)
        del self._entries[name]
        self._forget_routes()
        self._place_memory()
        self._place_compiled()
        self._wake()
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        """Restore the model's state before the first adapter, if none is left and nobody is about to add one."""
        if self._entries:
            return
        waiting = self.changing("become a plain one") if isinstance(self._model, ModelHost) else nullcontext()
        with waiting, _guard:
            if self._entries or _users.get(self) or self._model.__dict__.get(BANK) is not self:
                return
            if isinstance(self._model, ModelHost):
                self._heads.close()
                take_off(cast(Host, self._model))
                for name, parameter in self._model.named_parameters():
                    parameter.requires_grad_(self._requires_grad.get(name, True))
                self._model.train(self._model.training)
            del self._model.__dict__[BANK]

    # ------------------------------------------------------------------ acting: the route

    def set_active(self, names: str | Sequence[str], *, task: str | None = None) -> None:
        """Choose the adapters that act, as the default for every thread's next forward pass.

        Several act one after the other, in the given order, with the classifier of the last one that has one. This does
        not affect which adapters train: see `freeze`.

        Args:
            names: One name or several; an empty list for the base alone.
            task: The task, if an adapter has tasks.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            SiteError: If two of them replace the same tensor.
            MergeError: If the model is merged.
        """
        if not isinstance(names, str | Sequence):
            raise ConfigError(f"set_active({names!r}): give a name, a list of names, or [] for the base alone.")
        chosen = (names,) if isinstance(names, str) else tuple(names)
        with self._routing.gate.beside():
            self.check_ready("switch adapters")
            self._routing.set(self.route(chosen, task))

    def using(
        self, *names: str, task: str | None = None, rows: Sequence[str | None] | None = None
    ) -> AbstractContextManager[None]:
        """Choose the adapters that act in a ``with`` block, for the calling thread alone.

        Blocks can be nested, and the previous route is restored also after an error. The backward pass may run outside
        the block.

        Args:
            *names: The adapters, in the order in which they act; by default those that currently act.
            task: The task; names without a task clear it.
            rows: Instead of names, one adapter for each image of the batch; None for the base. Each image gets the
                output of its adapter alone, and the scores of its classifier; where classifiers differ in their
                classes, scores are filled up with minus infinity. Adapters that change low-rank terms, inputs and
                outputs of linear layers, or add terms beside branches, share one pass. The others, which change a
                norm, a bias or a weight as a whole or add tokens, run as one part of the batch each.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            ConfigError: If names and rows are given. If the batch has not one image for each row, the forward pass
                raises it.
            SiteError: If two adapters replace the same tensor.
            MergeError: If the model is merged.

        Example:
            >>> for task in ("seg", "depth"):
            ...     with bank.using(task):
            ...         loss = loss + losses[task](model(images))
            >>> loss.backward()
            >>> with bank.using(rows=["birds", "cars", None]):
            ...     scores = model(three_images)
        """
        self._check_unmerged("use other adapters")
        if any(not isinstance(name, str) for name in names):
            raise ConfigError(f"using{names!r}: give the names one after the other, as using('seg', 'depth').")
        present = self._routing.present()
        if rows is None and not names and present.rows is not None:
            rows, task = present.rows.names, present.task if task is None else task
        if rows is not None:
            chosen = check_rows(self._entries, names, rows, task)
            self._rows_route(chosen, task)
            return self._choosing("use other adapters", lambda: self._rows_route(chosen, task))
        weights: tuple[float, ...] = ()
        if not names:
            names, task, weights = present.names, present.task if task is None else task, present.weights
        # Unknown names are refused here, and again on entering, in case one was detached.
        self.route(names, task, weights)
        return self._choosing("use other adapters", lambda: self.route(names, task, weights))

    def together(self, tasks: Sequence[str]) -> AbstractContextManager[None]:
        """Let the units of several tasks act in a ``with`` block, each on its part of the batch.

        The batch holds the same images once for each task, one task after the other: ``images.repeat(len(tasks), 1, 1,
        1)``. `forward_tasks` does this with ``batched=True``.

        Args:
            tasks: The tasks, in the order of their parts.

        Raises:
            UnknownNameError: If an acting adapter has no such task.
            ConfigError: If a task has units that act on whole batches: of a kind other than parallel units, and other
                than low-rank terms, input, sequential and affine units of linear layers.
            MergeError: If the model is merged.
        """
        if self._routing.present().rows is not None:
            raise ConfigError("together(...): images that take different adapters (rows) cannot also be split by task.")
        names, chosen = self._routing.present().names, tuple(tasks)
        if self._routing.present().weights:
            raise ConfigError("together(...): the adapters act with weights, which one pass for several tasks has not.")
        check_task_names(chosen, f"together({tasks!r})")
        self._shared_route(names, chosen)
        return self._routing.choosing(lambda: self._shared_route(names, chosen))

    def disabled(self) -> AbstractContextManager[None]:
        """Run the base alone in a ``with`` block, with its own classifier.

        Example:
            >>> with bank.disabled():
            ...     base_logits = model(images)
        """
        self._check_unmerged("disable adapters")
        return self._choosing("disable adapters", lambda: self.route((), None))

    def _choosing(self, wanted: str, find: Callable[[], Route]) -> AbstractContextManager[None]:
        def found() -> Route:
            self._check_unmerged(wanted)  # another thread may have merged it since
            return find()

        return self._routing.choosing(found)

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts for activation checkpointing: the recomputation uses the route of the forward pass.

        Example:
            >>> with bank.using("seg"):
            ...     out = checkpoint(model, images, use_reentrant=False, context_fn=bank.checkpoint_context)
        """
        return recompute_contexts(self._routing)

    def route(self, names: tuple[str, ...], task: str | None, weights: tuple[float, ...] = ()) -> Route:
        """Return the route for a choice of adapters, which is cached unless it has weights.

        Args:
            names: The adapters that act, in order.
            task: The task; None for no task.
            weights: Multipliers of their contributions; empty for 1.

        Raises:
            UnknownNameError: If there is no such adapter, or it has no such task.
            SiteError: If two adapters cannot act together.
        """
        slot = cast(Host, self._model).slot
        if self._routing.merging is not None and (weights or (names, task) not in self._routes):
            check_merging({name: self._entries[name] for name in names if name in self._entries})
        if any(weight != 1 for weight in weights):
            return make_route(self._entries, self._heads, slot, names, task, weights)
        return recent(self._routes, (names, task), lambda: make_route(self._entries, self._heads, slot, names, task))

    def _rows_route(self, names: tuple[str | None, ...], task: str | None) -> Route:
        """Make the route of a batch whose images take different adapters."""
        return self._row_routes.make(self._entries, self.route, check_rows(self._entries, (), names, task), task)

    def shares_pass(self, name: str) -> bool:
        """Return whether an adapter can share a pass with others whose rows it leaves alone; see `using`.

        Args:
            name: The adapter, without tasks.
        """
        return self._row_routes.shares(self._entry(name), self._label(name), self.route((self._label(name),), None))

    def _route_again(self, route: Route) -> Route:
        """Make the route of the same choice after a change of the adapters."""
        if route.rows is not None:
            return self._rows_route(route.rows.names, route.task)
        return self.route(route.names, route.task, route.weights)

    def _shared_route(self, names: tuple[str, ...], tasks: tuple[str, ...]) -> Route:
        """Return the cached route of one pass for several tasks."""
        self._check_unmerged("use other adapters")  # another thread may have merged it since

        def make() -> Route:
            return make_shared_route(self._entries, [self.route(names, task) for task in tasks])

        return recent(self._routes, (names, tasks), make)

    # ------------------------------------------------------------------ classifiers

    @contextmanager
    def replacing_head(self, num_classes: int) -> Iterator[None]:
        """Assign the classifier timm creates in the ``with`` block to the last acting adapter, else to the base.

        Args:
            num_classes: Number of classes of the new classifier.
        """
        with self.changing("get another classifier"):
            yield from self._replacing_head(num_classes)

    def _replacing_head(self, num_classes: int) -> Iterator[None]:
        self._heads.check_place()
        route, base = self._routing.present(), self._heads.base
        if route.rows is not None:
            raise ConfigError("reset_classifier: which adapter's? Images take different ones here (using(rows=...)).")
        owner = route.owner or (route.names[-1] if route.names else None)
        before = self._model.__dict__.get("num_classes")
        yield
        if self.view.head_path is None or base is None:
            return
        made = self._model.get_submodule(self.view.head_path)
        if owner is None:
            self._heads.put_base(made)
            return
        self._heads.restore_base(base)
        self._model.__dict__["num_classes"] = before
        entry = self._entries[owner]
        own = own_head(entry.method, self.view, self._model, entry.seed, num_classes) if num_classes else None
        self.put_head(owner, made if own is None else own)

    def put_head(self, name: str, head: nn.Module | None) -> None:
        """Replace an adapter's classifier.

        Args:
            name: The adapter.
            head: The classifier; None removes it. One that stands at the base's place is moved from there.
        """
        with self.changing("get another classifier"):
            self._put_head(name, head)

    def _put_head(self, name: str, head: nn.Module | None) -> None:
        entry = self._entries[name]
        self._heads.clear_place(head)
        if head is None:
            self._heads.drop(name)
        else:
            head.train(self._model.training and not entry.frozen)
            self._heads.put(name, head)
            self._declare(entry, name)
        if len(entry.notes.get("class_names") or ()) != getattr(head, "out_features", 0):
            entry.notes.pop("class_names", None)  # those of the former classifier
        self._forget_routes()
        self._routing.refresh(self._route_again)

    # ------------------------------------------------------------------ merging

    def merge(self, keep_original: bool = True, partial: bool = False) -> MergeReport:
        """Merge the acting adapters into plain timm layers, by exact algebra in double precision.

        Every layer then has timm's own class and names again, and the model is as fast as the base.

        Args:
            keep_original: Keep the original tensors, which `unmerge` needs.
            partial: Leave layers without a plain form adapted, instead of raising.

        Returns:
            The changed layers, new keys, layers that stay adapted, and the measured error.

        Raises:
            MergeError: If no adapter acts, a layer has no plain form, a merged tensor is not finite, or the outputs
                differ beyond rounding; then nothing is changed.
        """
        if self._merged is not None:
            return self._merged.report
        with self.changing("merge its adapters"):
            return self._merge(keep_original, partial)

    def _merge(self, keep_original: bool, partial: bool) -> MergeReport:
        self.check_ready("merge its adapters")
        if self._routing.used_elsewhere():
            raise MergeError(
                "Another thread has chosen adapters in a block of using() or disabled(); let it end first."
            )
        names = tuple(self.active)
        if not names:
            raise MergeError(
                f"No adapter acts, so there is nothing to merge; attached are {', '.join(self.names)}. Choose with "
                "set_active(NAME)."
            )
        self._remove_compiled()
        try:
            merged = merge_model(self._model, self.view, partial)
        except BaseException:
            self._set_compiled()
            self._place_compiled()
            raise
        self._merged = merged
        for name in names:
            self._entries[name].merge_error = merged.report.max_error
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        if not merged.report.kept:
            self._heads.hide(self._routing.default.head)
        merged.keep_original = keep_original
        if not keep_original:
            merged.fingerprint = self.fingerprint()
            merged.hosts, merged.originals, merged.replaced = [], [], {}
            if not merged.report.kept:
                del self._model.__dict__[BANK]
        return merged.report

    def unmerge(self) -> None:
        """Undo `merge` bit for bit, from the kept originals.

        Raises:
            MergeError: If the model is not merged, or the originals were not kept.
        """
        if self._merged is None:
            raise MergeError("There is nothing to undo: the model is not merged.")
        if not self._merged.keep_original:
            raise MergeError(
                "The originals were not kept (merge(keep_original=False)). Create the backbone again and load the "
                "adapter."
            )
        with self.changing("undo its merge"):
            self._unmerge(self._merged)

    def _unmerge(self, merged: Merged) -> None:
        undo_merge(merged)
        if not merged.report.kept:
            self._heads.show()
        reference = next(self._model.parameters())
        self._heads.follow(reference)
        for entry in self._entries.values():
            for placed in entry.placed:
                placed.unit.to(reference.device)  # the model may have been moved since
        self._merged = None
        self._place_memory()
        self._set_compiled()
        self._place_compiled()
        for name, entry in self._entries.items():
            self._declare(entry, name)
        self._wake()
