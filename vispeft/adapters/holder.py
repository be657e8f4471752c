"""The state of a bank and the lookups that all of its parts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.heads import HeadRack
from vispeft.adapters.merge import Merged
from vispeft.core.families import describe, is_feature_getter, unwrap
from vispeft.core.plan import Plan
from vispeft.core.route import Routing
from vispeft.core.units import Unit
from vispeft.errors import ConfigError, MergeError, UnknownNameError
from vispeft.hosts.base import Host
from vispeft.hosts.model import BANK
from vispeft.storage.fingerprint import base_tensors, fingerprint

__all__ = ["BankState"]


class BankState:
    """The adapters of one model, the route, and the classifiers."""

    def __init__(self, outer: nn.Module) -> None:
        """Describe a timm model without adapters.

        Args:
            outer: The timm model, or a ``features_only`` wrapper around it.
        """
        model = unwrap(outer)
        self._outer = outer if is_feature_getter(outer) else model
        self._model = model
        self.view = describe(self._outer)
        self._entries: dict[str, Entry] = {}
        self._routing = Routing()
        self._merged: Merged | None = None
        self._lean: list[Host] = []
        """The hosts of `place_memory`."""
        self._heads = HeadRack(model, self.view.head_path, self._routing)
        self._sharded: list[nn.Module] = []
        """The modules of which each process holds a part."""
        self._whole_fingerprint: dict[str, Any] | None = None
        """Fingerprint of a base that is sharded, and can be read no more."""

    @property
    def model(self) -> nn.Module:
        """The timm model."""
        return self._model

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order of attaching."""
        return list(self._entries)

    @property
    def active(self) -> list[str]:
        """Names of the adapters that act, in the order in which they act."""
        return list(self._routing.present().names)

    @property
    def task(self) -> str | None:
        """The chosen task, if an adapter has tasks."""
        return self._routing.present().task

    @property
    def frozen(self) -> list[str]:
        """Names of the adapters that training leaves unchanged."""
        return [name for name, entry in self._entries.items() if entry.frozen]

    def plan(self, name: str | None = None) -> Plan:
        """Return the plan an adapter was built from.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return self._entry(name).plan

    def tasks(self, name: str | None = None) -> list[str]:
        """List the tasks of an adapter; empty if it acts for every task.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return list(self._entry(name).tasks or ())

    def units(self, name: str | None = None) -> dict[str, Unit]:
        """Return an adapter's units (not copies) by their names in files.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return dict(self._entry(name).units)

    def head(self, name: str | None = None) -> nn.Module | None:
        """Return an adapter's classifier; None if it has none.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return self._heads.get(self._label(name))

    @property
    def base_head(self) -> nn.Module | None:
        """The base's own classifier; None if the model has none. Called by itself, it asks the route."""
        return self._heads.base

    def check_ready(self, wanted: str) -> None:
        """Raise if the model is merged, the bank is closed, or a ``with`` block overrides the route.

        Args:
            wanted: The requested change, for the error message.
        """
        self._check_unmerged(wanted)
        self._heads.check_place()
        if self._model.__dict__.get(BANK) is not self:
            raise ConfigError(f"This bank is closed, since its model has no adapters: it cannot {wanted}. Use attach.")
        if self._routing.is_overridden:
            raise ConfigError(
                f"The adapters are disabled or chosen for a block of code, so the model cannot {wanted} here. Leave "
                "disabled() or using() first."
            )

    def changing(self, wanted: str) -> AbstractContextManager[None]:
        """Change the model while no forward pass runs it in another thread; those that begin meanwhile wait.

        Args:
            wanted: The change, for the error message.
        """
        self.check_whole(wanted)
        return self._routing.gate.alone(self._model, wanted)

    def check_whole(self, wanted: str) -> None:
        """Raise if each process holds a part of the frozen weights.

        Args:
            wanted: The requested change, for the error message.

        Raises:
            ConfigError: If they are sharded.
        """
        if self._sharded:
            raise ConfigError(
                f"The frozen weights are sharded over the processes, so the model cannot {wanted}. Do that before "
                "(strategy fsdp2: before the training begins), or on a whole model that loads the adapter."
            )

    def _check_unmerged(self, wanted: str) -> None:
        if self._merged is not None:
            raise MergeError(f"The model is merged, so it cannot {wanted}. Call unmerge() first.")

    def _label(self, name: str | None) -> str:
        if name is None:
            acting = self.active
            if len(acting) != 1:
                raise ConfigError(
                    f"Which adapter? {len(acting)} are active ({', '.join(acting) or 'none'}); give a name."
                )
            return acting[0]
        if not isinstance(name, str):
            raise ConfigError(
                f"An adapter was asked for by {name!r}; give one name, such as {next(iter(self.names), 'default')!r}."
            )
        if name not in self._entries:
            raise UnknownNameError("adapter", name, self._entries)
        return name

    def _entry(self, name: str | None) -> Entry:
        return self._entries[self._label(name)]

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the base's original tensors by timm's names, without units or classifiers, even if merged."""
        return base_tensors(self._model, self.view.head_path, self._replaced())

    def fingerprint(self) -> dict[str, Any]:
        """Compute the fingerprint of the base, also while merged."""
        if self._merged is not None and self._merged.fingerprint is not None:
            return self._merged.fingerprint
        if self._whole_fingerprint is not None:
            return self._whole_fingerprint
        return fingerprint(self._model, self.view, self._replaced())

    def _replaced(self) -> dict[str, Tensor | None]:
        return {} if self._merged is None else self._merged.replaced
