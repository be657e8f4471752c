"""The bank: the handle on all adapters of one model, from attaching to merging, saving and taking off."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.adapters import hooks
from vispeft.adapters.heads import BASE_HEAD, HeadRack, LowBitHead, WideHead
from vispeft.adapters.merge import (
    TOLERANCE,
    Merged,
    MergeReport,
    apply_merge,
    difference,
    outputs,
    plan_merge,
    undo_merge,
)
from vispeft.adapters.report import Report
from vispeft.adapters.verify import find_dead, probe_images, unit_tensors
from vispeft.core.families import describe, family_of, is_feature_getter, unwrap
from vispeft.core.method import Method, Step, method_from_dict
from vispeft.core.plan import Plan, make_plan
from vispeft.core.units import QueryUnit, SelectionUnit, SideUnit, Unit
from vispeft.errors import BaseMismatchError, ConfigError, FileError, MergeError, SiteError, UnknownNameError
from vispeft.hosts.base import PASSAGE, Host, ensure_host, take_off
from vispeft.hosts.choose import host_for, owner_host, passing_host
from vispeft.hosts.depth import StochasticDepth
from vispeft.hosts.model import ModelHost
from vispeft.storage.files import DECODER, check_tensors, read_adapter, write_adapter
from vispeft.storage.fingerprint import absent_parts, base_tensors, check_fingerprint, fingerprint, pool_of
from vispeft.storage.header import adapter_part, backbone_part, plain_values, preprocessing_part, tensor_part
from vispeft.storage.quantize import CODECS, LowBit, codec, decode

__all__ = ["AdapterBank"]

logger = logging.getLogger(__name__)

_BANK = "_vispeft_bank"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NOTES = ("class_names", "preprocessing", "metrics", "output")
"""What a file says for its user; files of earlier versions lack the last."""


@dataclass
class Adapter:
    """What the bank knows of one adapter."""

    method: Method
    plan: Plan
    units: dict[str, Unit]
    """Units by key."""
    tasks: tuple[str, ...] | None
    seed: int
    """Seed of the start values."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Class names, preprocessing and metrics, for the file."""
    merge_error: float | None = None
    """Error of the last merge, when there was one."""

    def blocks(self) -> dict[str, int | None]:
        """Give the block index of each unit by key."""
        return {item.key: item.site.block for item in self.plan}


class AdapterBank:
    """All adapters of one model.

    Get one from `attach` or `load`. The model stays usable by whoever knows timm; the bank is only needed to manage
    what was added.
    """

    def __init__(self, outer: nn.Module) -> None:
        """Take stock of a bare timm model; `attach` calls this.

        Args:
            outer: The timm model, or a ``features_only`` wrapper around it.
        """
        model = unwrap(outer)
        self._outer = outer if is_feature_getter(outer) else model
        self._model = model
        self.view = describe(self._outer)
        self._routed: tuple[str, ...] = ()
        self._adapters: dict[str, Adapter] = {}
        self._active: tuple[str, ...] = ()
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._depth = StochasticDepth(model, self.view)
        self._merged: Merged | None = None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._heads = HeadRack(model, self.view.head_path)
        ensure_host(model, family_of(model).host)
        model.__dict__[_BANK] = self

    @staticmethod
    def of(model: nn.Module) -> AdapterBank | None:
        """Find the bank of a model that has adapters.

        Args:
            model: A timm model, a ``features_only`` wrapper around one, or a compiled one.

        Returns:
            Its bank; None without adapters.
        """
        bank = unwrap(model).__dict__.get(_BANK)
        return bank if isinstance(bank, AdapterBank) else None

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order of attaching."""
        return list(self._adapters)

    @property
    def active(self) -> list[str]:
        """Names of the adapters that act, in the order in which they act."""
        return list(self._active)

    def plan(self, name: str | None = None) -> Plan:
        """Give the plan an adapter was built from.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        return self._adapter(name).plan

    # ------------------------------------------------------------------ adding and taking off

    def add(
        self, method: Method, name: str = "default", tasks: Sequence[str] | None = None, verify: bool = True
    ) -> None:
        """Put one more adapter on the model and activate it alone; see `attach`."""
        self._check_new_name(name)
        self._check_ready("attach another adapter")
        if not isinstance(method, Method):
            raise ConfigError(
                f"attach was given {method!r} as method; give a configuration such as vispeft.SSF(), "
                "or vispeft.method('ssf')."
            )
        plan = make_plan(method, self._outer)
        units, seed = self._build(plan)
        adapter = Adapter(method, plan, units, None if tasks is None else tuple(tasks), seed)
        # Hosts are chosen for all units before the first one is put into place, so that a refusal changes nothing.
        hosts = [host_for(i.site, self._model.get_submodule(i.site.path), units[i.key]) for i in plan]
        passages = self._passages(units.values())
        for item, (host, computed) in zip(plan, hosts, strict=True):
            place = ensure_host(self._model.get_submodule(item.site.path), host, computed)
            _slots(place, name)[item.slot] = units[item.key]
            if item.site.owner is not None:
                _slots(ensure_host(self._model.get_submodule(item.site.owner), *owner_host()), name)
        for module, passing in passages:
            _slots(ensure_host(module, passing), name)[PASSAGE] = nn.Identity()
        self._adapters[name] = adapter
        self._heads.add(name, self._own_head(method, seed))
        with self._or_without(name):
            self.set_active(name)
            if verify:
                self.verify()

    def _passages(self, units: Iterable[Unit]) -> list[tuple[nn.Module, type[Host]]]:
        """List blocks and attention modules, and their hosts, where units make rows beside the tokens."""
        if not any(unit.passes_rows for unit in units):
            return []
        modules = [self._model.get_submodule(site.path) for site in self.view.at("block", "attn")]
        return [(module, passing_host(module)) for module in modules]

    def _own_head(self, method: Method, seed: int, classes: int | None = None) -> nn.Module | None:
        """Make the classifier of a method that wants one of a few bits, or of another width than the model's."""
        bits, width = method.low_bit_head(), method.head_width(self.view)
        base: Any = self._heads.get(BASE_HEAD)
        classes = classes or getattr(base, "out_features", 0)
        if (bits == 32 and width is None) or not classes:
            return None
        reference = next(self._model.parameters())
        width = width or cast(int, self._model.num_features)
        head: nn.Linear
        if bits == 32:
            full = reference.dtype in (torch.float32, torch.float64)
            head = (nn.Linear if full else WideHead)(width, classes)
            with torch.no_grad():
                method.start_head(head, torch.Generator().manual_seed(seed))
        else:
            head = LowBitHead(width, classes, bits)
        head = head.to(reference.device)
        return head.double() if reference.dtype == torch.float64 else head

    def fit_head(self) -> None:
        """Give the adapter in place a classifier as its method wants it, where timm has made one of its own kind."""
        label = self._heads.placed
        if label not in self._adapters or not getattr(self._model, "num_classes", 0):
            return
        adapter = self._adapters[label]
        if adapter.method.head_width(self.view) is None:
            return
        head = self._own_head(adapter.method, adapter.seed, cast(int, self._model.num_classes))
        if head is not None:
            self._heads.add(label, head.train(self._model.training))

    @contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        """Take a new adapter off again, and switch back, when what is done with it fails."""
        before = self._active
        try:
            yield
        except Exception:
            self.detach(name)
            if self._adapters:
                self.set_active(before)
            raise

    def _check_new_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"An adapter was to be called {name!r}; use letters, digits, '-' and '_'.")
        if name in self._adapters:
            raise ConfigError(
                f"There is an adapter {name!r} on this model already (all: {', '.join(self._adapters)}). "
                "Choose another name, or detach it first."
            )

    def _build(self, plan: Plan) -> tuple[dict[str, Unit], int]:
        reference = next(self._model.parameters())
        # Adapters of a half-precision base stay in float32, or their small updates would be rounded away.
        dtype = reference.dtype if reference.dtype in (torch.float32, torch.float64) else torch.float32
        seed = int(torch.randint(0, 2**31 - 1, ()))
        generator = torch.Generator().manual_seed(seed)
        units: dict[str, Unit] = {}
        for item in plan:
            unit = item.build()
            if item.lender is not None:
                unit.borrow(units[item.lender])
            with torch.no_grad():
                unit.reset(generator)
            units[item.key] = unit.to(device=reference.device, dtype=dtype)
        return units, seed

    def detach(self, name: str) -> None:
        """Take an adapter off; with the last one the model is as it was before the first.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
            MergeError: If it is merged for good.
        """
        self._adapter(name)
        if self._merged is not None:
            self.unmerge()
        self._check_ready("detach an adapter")
        self.set_active([active for active in self._active if active != name])
        for host in self._hosts():
            if name in host.adapters:
                del host.adapters[name]
                if not host.adapters and not isinstance(host, ModelHost):
                    take_off(host)
        self._heads.drop(name)
        del self._adapters[name]
        self.close_if_empty()

    def close_if_empty(self) -> None:
        """Leave the model as it was before the first adapter, when there is none left."""
        if self._adapters or self._model.__dict__.get(_BANK) is not self:
            return
        self._depth.set(0.0)
        self._heads.close()
        take_off(cast(Host, self._model))
        del self._model.__dict__[_BANK]
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, True))
        self._model.train(self._model.training)

    # ------------------------------------------------------------------ switching

    def set_active(self, names: str | Sequence[str]) -> None:
        """Choose the adapters that act and train.

        Several act one after the other, in the given order; the classifier is that of the last one.

        Args:
            names: One name, several, or none for the base alone.

        Raises:
            UnknownNameError: If there is no such adapter.
            SiteError: If two of them replace the same tensor.
            MergeError: If the model is merged.
        """
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            self._adapter(name)
        self._check_ready("switch adapters")
        self._check_together(chosen)
        self._route(chosen)
        self._active = chosen
        for name, adapter in self._adapters.items():
            for unit in adapter.units.values():
                unit.requires_grad_(name in chosen)
            head = self._heads.get(name)
            if head is not None:
                head.requires_grad_(name == self._heads.placed)
        self._depth.set(max((self._adapters[n].method.stochastic_depth() for n in chosen), default=0.0))
        self._wake()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model the bare base for a while, its own classifier included.

        Example:
            >>> with bank.disabled():
            ...     base_logits = model(images)
        """
        self._check_unmerged("disable adapters")
        before = self._routed
        self._route(())
        try:
            yield
        finally:
            self._route(before)

    def _route(self, names: tuple[str, ...]) -> None:
        self._routed = names
        for host in self._hosts():
            host.active = tuple(name for name in names if name in host.adapters)
        self._heads.place(names[-1] if names else BASE_HEAD)

    def _check_together(self, names: tuple[str, ...]) -> None:
        if len(set(names)) < len(names):
            raise ConfigError(f"An adapter was named twice: {', '.join(names)}.")
        self._check_beside(names)
        owners: dict[str, str] = {}
        for name in names:
            for entry in unit_tensors(self._adapters[name].units):
                if not isinstance(entry.unit, SelectionUnit):
                    continue
                tensor = f"{entry.key.split('/', 1)[0]}.{entry.name}"
                if tensor in owners:
                    raise SiteError(
                        f"Adapters {owners[tensor]!r} and {name!r} both replace {tensor}; only one of them can act. "
                        "Activate one, or merge one first."
                    )
                owners[tensor] = name

    def _check_beside(self, names: tuple[str, ...]) -> None:
        """Refuse a network beside the backbone together with what it would replace or leave without a gradient."""
        beside = {n: u for n in names for u in self._adapters[n].units.values() if isinstance(u, SideUnit | QueryUnit)}
        if len(beside) > 1:
            first, second = list(beside)[:2]
            raise SiteError(
                f"Adapters {first!r} and {second!r} both replace what leaves the model; only one of them can act. "
                "Activate one."
            )
        others = [name for name in names if name not in beside and self._adapters[name].units]
        for name, unit in beside.items():
            if unit.detach_hidden and others:
                raise SiteError(
                    f"Adapter {name!r} runs the backbone without gradients, so {others[0]!r} inside of it would not "
                    "train. Activate one of them, or attach the first with detach_hidden=False, which costs the memory "
                    "it saves."
                )

    def _wake(self) -> None:
        awake = list(self.view.head_drop_paths)
        if self.view.head_path is not None:
            awake.append(self.view.head_path)
        awake += self._depth.originals
        if any(self._adapters[name].method.trains_base for name in self._active):
            awake.append("")
        cast(ModelHost, self._model).awake = tuple(awake)
        self._model.train(self._model.training)

    # ------------------------------------------------------------------ training

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """List what trains now, the active classifier included, by state-dict name.

        A tensor stays in the list while a schedule has switched its ``requires_grad`` off.
        """
        if self._merged is not None:
            return []
        units = [e.tensor for e in self._entries()]
        head = self._heads.get(self._active[-1]) if self._active else None
        declared = {id(p) for p in [*units, *([] if head is None else head.parameters())]}
        return [(name, p) for name, p in self._model.named_parameters() if id(p) in declared]

    def loss_terms(self, batch: Any, output: Any, result: Any = None) -> Tensor | None:
        """Sum the losses that the methods add to the loss of a task.

        Args:
            batch: The batch of the step.
            output: The model's output for it.
            result: Run result of the forward pass, where a method reads it (`Method.reads_result`).

        Returns:
            A scalar; None where no method adds a loss.
        """
        return hooks.loss_terms(self, Step(batch, output, result))

    def change_gradients(self) -> None:
        """Let methods change gradients; call it after the backward pass, before clipping and the optimiser's step."""
        hooks.change_gradients(self)

    def start_from(self, loader: Iterable[Any]) -> None:
        """Let methods compute start values from data; call it once, before the first step of a fresh training.

        Args:
            loader: Training batches on the model's device.
        """
        hooks.start_from(self, loader)

    def callbacks(self) -> list[Any]:
        """Collect the schedules of the methods, as Lightning callbacks."""
        return hooks.callbacks(self)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Sort what trains now into optimiser groups.

        Tensors of fewer than two dimensions, those a unit exempts and those timm exempts (positions, class tokens)
        do not decay.

        Args:
            lr: Learning rate; units may ask for a multiple of it.
            weight_decay: Weight decay of what decays.

        Returns:
            Groups with ``params``, ``lr``, ``weight_decay`` and ``name``, as ``torch.optim`` takes them.
        """
        timm_exempts: set[str] = getattr(self._model, "no_weight_decay", set)()  # walks the whole model
        exempt = {
            id(e.tensor)
            for e in self._entries()
            if e.name in e.unit.no_decay or ".".join(filter(None, (e.key.split("/", 1)[0], e.name))) in timm_exempts
        }
        factors = {id(e.tensor): e.unit.lr_factors.get(e.name, 1.0) for e in self._entries()}
        groups: dict[str, dict[str, Any]] = {}
        for _, parameter in self.trainable_parameters():
            decays = parameter.ndim > 1 and id(parameter) not in exempt
            factor = factors.get(id(parameter), 1.0)
            name = ("decay" if decays else "no_decay") + ("" if factor == 1 else f" lr x {factor:g}")
            decay = weight_decay if decays else 0.0
            group = groups.setdefault(name, {"params": [], "lr": lr * factor, "weight_decay": decay, "name": name})
            group["params"].append(parameter)
        return list(groups.values())

    def _entries(self) -> list[Any]:
        return [entry for name in self._active for entry in unit_tensors(self._adapters[name].units)]

    def verify(self, outer: nn.Module | None = None, without: Sequence[str] = ()) -> None:
        """Check that every trainable tensor of the active adapters receives a gradient.

        One image of noise goes forward and backward with every unit moved away from its start; all values are put back.

        Args:
            outer: What is run, where that is not the model as it was given: a module around it that takes images and
                gives a tensor or several, such as the maps a decoder reads.
            without: Roles that are not on the way to what `outer` gives; units there are not looked at.

        Raises:
            VerificationError: If a tensor gets none; the message names the sites.
        """
        beside = {item.key for name in self._active for item in self._adapters[name].plan if item.site.role in without}
        units = {k: u for name in self._active for k, u in self._adapters[name].units.items() if k not in beside}
        blocks = {key: block for name in self._active for key, block in self._adapters[name].blocks().items()}
        self._check_ready("verify its adapters")
        find_dead(self._model, outer or self._outer, self.view, units, blocks)

    def report(self, name: str | None = None) -> Report:
        """Count what an adapter trains and stores; print the result to see a table.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        label = self._label(name)
        adapter = self._adapters[label]
        entries = unit_tensors(adapter.units)
        by_role: dict[str, int] = {}
        roles = {item.key: item.site.role for item in adapter.plan}
        for entry in entries:
            by_role[roles[entry.key]] = by_role.get(roles[entry.key], 0) + entry.tensor.numel()
        head = self._heads.get(label)
        return Report(
            adapter=label,
            method=adapter.method.name,
            family=self.view.family,
            trainable=sum(entry.tensor.numel() for entry in entries),
            trainable_head=0 if head is None else sum(p.numel() for p in head.parameters()),
            backbone=sum(tensor.numel() for _, tensor in self._base_tensors()),
            stored_bytes=sum(t.numel() * t.element_size() for t in self._stored(label)[0].values()),
            by_role=by_role,
        )

    # ------------------------------------------------------------------ merging

    def merge(self, keep_original: bool = True, partial: bool = False) -> MergeReport:
        """Write the active adapters into plain timm layers, as exact algebra in double precision.

        Afterwards every layer has timm's own class and names again, and the model is as fast as the base.

        Args:
            keep_original: Keep what `unmerge` needs, beside the model.
            partial: Leave layers adapted that have no plain form, instead of refusing.

        Returns:
            Which layers changed, keys that are new, layers that stay, and the measured difference.

        Raises:
            MergeError: If a layer has no plain form, a merged tensor is not finite, or the outputs differ beyond
                rounding; nothing is changed then.
        """
        if self._merged is not None:
            return self._merged.report
        self._check_ready("merge its adapters")
        probe = probe_images(self._model, self.view)
        tensors, stays = plan_merge(self._model, self.view, partial)
        before = outputs(self._model, probe)
        if not all(torch.isfinite(tensor).all() for tensor in before):
            raise MergeError("The adapted model's outputs are not finite, so nothing was merged; look at its tensors.")
        self._depth.set(0.0)
        merged = Merged(MergeReport((), (), (), {}, 0.0), self._active)
        apply_merge(self._model, tensors, stays, merged)
        after = outputs(self._model, probe)
        error = difference(after, before)
        if not error <= TOLERANCE[probe.dtype]:
            undo_merge(merged)
            self.set_active(self._active)
            raise MergeError(
                f"After merging, outputs differ by {error:.1e} of the largest one; {TOLERANCE[probe.dtype]:.0e} is "
                f"rounding in {probe.dtype}. Nothing was changed. Merge in float32 or better."
            )
        changed = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
        created = tuple(name for name, old in merged.replaced.items() if old is None)
        removed = tuple(name for name in merged.replaced if tensors[name] is None)
        merged.report = MergeReport(changed, created, removed, stays, error)
        self._merged = merged
        for name in self._active:
            self._adapters[name].merge_error = error
        self._finish_merge(merged, keep_original, bool(stays))
        return merged.report

    def _finish_merge(self, merged: Merged, keep_original: bool, stays: bool) -> None:
        for _, parameter in self._model.named_parameters():
            parameter.requires_grad_(False)
        if not stays:
            self._heads.hide()
        merged.keep_original = keep_original
        if not keep_original:
            merged.fingerprint = self._fingerprint()
            merged.hosts, merged.originals, merged.replaced = [], [], {}
            if not stays:
                del self._model.__dict__[_BANK]

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit, from the kept originals.

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
        undo_merge(self._merged)
        if not self._merged.report.kept:
            self._heads.show()
        reference = next(self._model.parameters())
        for adapter in self._adapters.values():
            for unit in adapter.units.values():
                unit.to(reference.device)  # the model may have been moved since
        names, self._merged = self._merged.names, None
        self.set_active(names)

    def _check_ready(self, wanted: str) -> None:
        self._check_unmerged(wanted)
        if self._model.__dict__.get(_BANK) is not self:
            raise ConfigError(f"This bank is closed, since its model has no adapters: it cannot {wanted}. Use attach.")
        if self._routed != self._active:
            raise ConfigError(f"The adapters are disabled, so the model cannot {wanted}. Leave disabled() first.")

    def _check_unmerged(self, wanted: str) -> None:
        if self._merged is not None:
            raise MergeError(f"The model is merged, so it cannot {wanted}. Call unmerge() first.")

    # ------------------------------------------------------------------ tensors and files

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """Give an adapter's tensors under their names in files, its classifier's under ``head/``.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        label = self._label(name)
        return {**self._unit_state(label), **self._head_state(label)}

    def _unit_state(self, label: str) -> dict[str, Tensor]:
        units = self._adapters[label].units
        return {f"{key}.{name}": tensor for key, unit in units.items() for name, tensor in unit.state_dict().items()}

    def _head_state(self, label: str) -> dict[str, Tensor]:
        head = self._heads.get(label)
        return {} if head is None else {f"head/{key}": tensor.detach() for key, tensor in head.state_dict().items()}

    def named_tensors(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Give an adapter's parameters themselves, gradients included, under their names in files.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        label = self._label(name)
        head = self._heads.get(label)
        classifier = {} if head is None else {f"head/{key}": tensor for key, tensor in head.named_parameters()}
        return {**{str(e): e.tensor for e in unit_tensors(self._adapters[label].units)}, **classifier}

    def load_state_dict(self, tensors: Mapping[str, Tensor], name: str | None = None) -> None:
        """Copy tensors into an adapter.

        Args:
            tensors: All of the adapter's tensors, as `state_dict` names them; a classifier may be missing, and one with
                another class count replaces the present one.
            name: The adapter; may be left out where there is only one active.

        Raises:
            FileError: If a tensor is missing, unknown, of another shape, or not finite; nothing is copied then.
        """
        self._check_unmerged("load an adapter's tensors")
        label = self._label(name)
        own = self._unit_state(label)
        units = {key: tensor for key, tensor in tensors.items() if not key.startswith("head/")}
        check_tensors(own, units)
        head = {key.removeprefix("head/"): tensor for key, tensor in tensors.items() if key.startswith("head/")}
        if head and self.view.head_path is not None:
            self._load_head(label, head)
        with torch.no_grad():
            for key, tensor in units.items():
                own[key].copy_(tensor)

    def _load_head(self, label: str, tensors: dict[str, Tensor]) -> None:
        present = self._heads.get(label)
        assert present is not None
        adapter = self._adapters[label]
        width = adapter.method.head_width(self.view) or cast(int, self._model.num_features)
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise FileError(f"head/{key} is not finite.")
            if key == "weight" and (tensor.ndim != 2 or tensor.shape[1] != width):
                raise FileError(f"head/weight has shape {tuple(tensor.shape)}; (classes, {width}) is needed.")
        shapes = {key: tensor.shape for key, tensor in present.state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            if set(tensors) - {"weight", "bias"} or "weight" not in tensors:
                raise FileError(f"The head in the file has tensors {sorted(tensors)}, which is no linear classifier.")
            reference = next(self._model.parameters())
            classes, width = tensors["weight"].shape
            plain = nn.Linear(width, classes, bias="bias" in tensors, device=reference.device, dtype=reference.dtype)
            present = self._own_head(adapter.method, adapter.seed, classes) or plain
            present.requires_grad_(label == self._heads.placed).train(self._model.training)
            self._heads.add(label, present)
        present.load_state_dict(tensors)

    def settle(self, packed: Mapping[str, Tensor], name: str | None = None) -> None:
        """Take quantised matrices as the bytes of a file have them: they act as decoded and are stored again as such.

        Args:
            packed: Codes, mean and spread (uint8) by the matrix's name in files.
            name: The adapter; may be left out where there is only one active.

        Raises:
            UnknownNameError: If there is no such matrix.
            FileError: If the bytes do not fit one.
        """
        low = {key: (module, tensor) for key, module, tensor in self._low_bit(self._label(name)) if module.bits < 32}
        for key, content in packed.items():
            if key not in low:
                raise UnknownNameError("quantised matrix", key, low)
            module, tensor = low[key]
            module.settle(tensor, content)

    def load_base(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a plain timm state dict into the base, adapters untouched.

        Args:
            state_dict: Tensors under timm's names; a classifier of the same shape goes to the base's own.

        Raises:
            FileError: If a tensor is missing, unknown or of another shape; nothing is copied then.
        """
        self._check_unmerged("load base weights")
        own = dict(self._base_tensors())
        head = self._heads.get(BASE_HEAD)
        place = f"{self.view.head_path}."
        given = {key: tensor for key, tensor in state_dict.items() if head is None or not key.startswith(place)}
        check_tensors(own, given)
        with torch.no_grad():
            for key, tensor in given.items():
                own[key].copy_(tensor)
        if head is None:
            return
        classifier = {key.removeprefix(place): t for key, t in state_dict.items() if key.startswith(place)}
        if {k: t.shape for k, t in classifier.items()} == {k: t.shape for k, t in head.state_dict().items()}:
            head.load_state_dict(classifier)
        else:
            logger.info("The classifier in the state dict is of another shape than the base's; that one stays.")

    def annotate(
        self,
        name: str | None = None,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
    ) -> None:
        """Note what a user of the file will want to know; `save` writes it down.

        Args:
            name: The adapter; may be left out where there is only one active.
            class_names: Names of the classes, in the order of the classifier.
            preprocessing: Mean, std, size and interpolation.
            metrics: What the adapter reaches.
            output: How the model's outputs are read: kind of target, temperature, unit.
        """
        notes = self._adapter(name).notes
        if class_names is not None:
            notes["class_names"] = list(class_names)
        if preprocessing is not None:
            notes["preprocessing"] = dict(preprocessing)
        if metrics is not None:
            notes["metrics"] = dict(metrics)
        if output is not None:
            notes["output"] = dict(output)
        for key, value in notes.items():
            notes[key] = plain_values(value, key)

    def notes(self, name: str | None = None) -> dict[str, Any]:
        """Give what `annotate` noted, or what the adapter's file said.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        return dict(self._adapter(name).notes)

    def save(self, path: str | Path, name: str | None = None, *, decoder: Mapping[str, Tensor] | None = None) -> None:
        """Write an adapter: ``adapter.json``, ``adapter.safetensors`` and ``head.safetensors``, nothing of the base.

        Args:
            path: The directory; made where it is missing.
            name: The adapter; may be left out where there is only one active.
            decoder: Tensors of a decoder that belongs to the task; `files.read_decoder` gives them back.

        Raises:
            FileError: If it cannot be written; what was there before is still there.
        """
        label = self._label(name)
        adapter = self._adapters[label]
        units, head = self._stored_units(label), self._head_state(label)
        beside = {f"{DECODER}{key}": tensor for key, tensor in (decoder or {}).items()}
        for key, tensor in {**units, **head, **beside}.items():
            if not torch.isfinite(tensor).all():
                raise FileError(f"{key} of adapter {label!r} is not finite; it was not saved.")
        stored, codecs = self._stored(label)
        header = {
            **adapter_part(adapter.method.stored()),
            "backbone": {**backbone_part(self._model, self._outer), "fingerprint": self._fingerprint()},
            "tasks": None if adapter.tasks is None else list(adapter.tasks),
            "seed": adapter.seed,
            "head": self._head_part(label, head),
            "preprocessing": adapter.notes.get("preprocessing") or preprocessing_part(self._model),
            "class_names": adapter.notes.get("class_names"),
            "metrics": adapter.notes.get("metrics"),
            "output": adapter.notes.get("output"),
            "tensors": {**tensor_part(units, codecs), **tensor_part({k: head[k] for k in head if k in codecs}, codecs)},
            "merge_error": adapter.merge_error,
        }
        units, head = {key: stored[key] for key in units}, {key: stored[key] for key in head}
        write_adapter(Path(path), header, units, {**head, **beside})

    def _stored(self, label: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Give an adapter's tensors as a file holds them, and the codecs of those that are packed."""
        stored, codecs = {**self._stored_units(label), **self._head_state(label)}, {}
        for key, module, name in self._low_bit(label):
            packed = module.packed(name)
            if packed is not None:
                stored[key], codecs[key] = packed, codec(module.bits)
        return stored, codecs

    def stored_tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Give the tensors of an adapter's units under their names in files, in the form of `Method.stored`.

        Args:
            name: The adapter; may be left out where there is only one active.
        """
        return self._stored_units(self._label(name))

    def _stored_units(self, label: str) -> dict[str, Tensor]:
        units = self._adapters[label].units
        return {f"{key}.{name}": tensor for key, unit in units.items() for name, tensor in unit.stored().items()}

    def _low_bit(self, label: str) -> Iterator[tuple[str, LowBit, str]]:
        """Iterate over the tensors that may be packed: name in files, module, name inside it."""
        yield from ((str(e), e.unit, e.name) for e in unit_tensors(self._adapters[label].units))
        head = self._heads.get(label)
        if isinstance(head, LowBitHead):
            yield "head/weight", head, "weight"

    def load(self, path: str | Path, name: str | None = None, allow_base_mismatch: bool = False) -> None:
        """Put an adapter from a file on the model and activate it.

        Args:
            path: Its directory.
            name: Its name on this model; by default ``default``, or the directory's name when that is taken.
            allow_base_mismatch: Load it also on other weights.

        Raises:
            FileError: If a file is missing, truncated or altered.
            BaseMismatchError: If it was trained on another backbone.
        """
        folder = Path(path)
        self._check_ready("load an adapter")
        label = name or ("default" if "default" not in self._adapters else folder.resolve().name)
        self._check_new_name(label)
        header, units, head = read_adapter(folder)
        if not allow_base_mismatch:
            check_fingerprint(header["backbone"]["fingerprint"], self._model, self.view)
            self._check_pooling(header)
        method = method_from_dict(header["method"])
        random = torch.get_rng_state()
        self.add(method, label, header["tasks"], verify=False)
        torch.set_rng_state(random)
        adapter = self._adapters[label]
        parts = absent_parts(header["backbone"]["fingerprint"], self._model, self.view)
        own = self._unit_state(label)
        # A unit of the whole model may hold tensors for parts that a cut one lacks.
        beyond = {key for key in units if parts and key.startswith("/") and key not in own}
        lacking = [key for key in units if key in beyond or self._lacks(key, parts)]
        kept = {key: self._fitted(label, key, tensor) for key, tensor in units.items() if key not in lacking}
        with self._or_without(label):
            found = {**kept, **{key: tensor for key, tensor in head.items() if not key.startswith(DECODER)}}
            packed = {key: found[key] for key in _packed_names(header) if key in found}
            plain = {key: _unpacked(key, header, tensor) for key, tensor in found.items()}
            self.load_state_dict(plain, label)
            self.settle(packed, label)
            if header["head"] == {} and self.view.head_path is not None:
                self._heads.add(label, nn.Identity())
        if lacking:
            logger.warning("This model is cut: %d tensors of the adapter belong to parts it lacks.", len(lacking))
        adapter.seed, adapter.merge_error = header["seed"], header["merge_error"]
        self.annotate(label, **{key: header.get(key) for key in _NOTES})

    def _fitted(self, label: str, key: str, tensor: Tensor) -> Tensor:
        """Give what this model needs of a tensor of a file, which may be of a whole one that this was cut from."""
        place, _, name = key.rpartition("/")
        unit_name, _, tensor_name = name.partition(".")
        unit = self._adapters[label].units.get(f"{place}/{unit_name}")
        return tensor if unit is None else unit.fitted(tensor_name, tensor)

    def _lacks(self, key: str, parts: Sequence[str]) -> bool:
        """Tell whether a tensor of a file belongs to a part of the whole model that this one was cut off."""
        site = key.split("/", 1)[0]
        if any(site.partition(":")[0] == part or site.startswith(f"{part}.") for part in parts):
            return site not in {known.key for known in self.view.sites}
        return self.view.head_path is None and site == "norm" and not any(True for _ in self.view.at("final_norm"))

    def _check_pooling(self, header: Mapping[str, Any]) -> None:
        saved, found = header["backbone"]["fingerprint"]["function"]["pool"], pool_of(self._model)
        if header["head"] and self.view.head_path is not None and found and saved != found:
            raise BaseMismatchError(
                f"The adapter's classifier was trained behind pooling {saved!r}; this model pools by {found!r}. Create "
                f"it with global_pool={saved!r}."
            )

    def _head_part(self, label: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Describe the classifier: its shapes, none for features as they are, None without a place for one."""
        if self._heads.get(label) is None:
            return None
        return {key.removeprefix("head/"): list(tensor.shape) for key, tensor in tensors.items()}

    # ------------------------------------------------------------------ helpers

    def _label(self, name: str | None) -> str:
        if name is None:
            if len(self._active) != 1:
                raise ConfigError(
                    f"Which adapter? {len(self._active)} are active ({', '.join(self._active) or 'none'}); give a name."
                )
            return self._active[0]
        if name not in self._adapters:
            raise UnknownNameError("adapter", name, self._adapters)
        return name

    def _adapter(self, name: str | None) -> Adapter:
        return self._adapters[self._label(name)]

    def _hosts(self) -> list[Host]:
        return [module for module in self._model.modules() if isinstance(module, Host)]

    def _base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return base_tensors(self._model, self.view.head_path, self._replaced())

    def _replaced(self) -> dict[str, Tensor | None]:
        return {} if self._merged is None else self._merged.replaced

    def _fingerprint(self) -> dict[str, Any]:
        if self._merged is not None and self._merged.fingerprint is not None:
            return self._merged.fingerprint
        return fingerprint(self._model, self.view, self._replaced())


def _slots(host: Host, name: str) -> nn.ModuleDict:
    if name not in host.adapters:
        host.adapters[name] = nn.ModuleDict()
    return cast(nn.ModuleDict, host.adapters[name])


def _packed_names(header: Mapping[str, Any]) -> list[str]:
    return [key for key, entry in header["tensors"].items() if entry["codec"] in CODECS]


def _unpacked(key: str, header: Mapping[str, Any], tensor: Tensor) -> Tensor:
    """Give a tensor of a file as values."""
    entry = header["tensors"].get(key, {})
    bits = CODECS.get(entry.get("codec", ""))
    return tensor if bits is None else decode(tensor, bits, tuple(entry["shape"]))
