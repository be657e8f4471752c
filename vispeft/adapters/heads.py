"""Heads: each adapter owns its classifier; the active one stands where timm expects it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["BASE_HEAD", "HeadRack"]

BASE_HEAD = "(base)"
"""Name under which the model's original classifier waits; no adapter can be called so."""


class HeadRack:
    """Keeps the classifiers of all adapters and puts one of them into place.

    The others wait in the model's ``adapter_heads``, so that they move with it. After a call of timm's
    ``reset_classifier`` whatever stands in place belongs to the adapter that is placed.
    """

    def __init__(self, model: nn.Module, path: str | None) -> None:
        """Take stock of a bare model.

        Args:
            model: The timm model.
            path: Path of its classifier; None where there is none.
        """
        self.model = model
        self.path = path
        self.placed = BASE_HEAD
        if path is not None:
            model.adapter_heads = nn.ModuleDict()

    @property
    def waiting(self) -> nn.ModuleDict:
        """The heads that are not in place."""
        heads = self.model.adapter_heads
        assert isinstance(heads, nn.ModuleDict)
        return heads

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Give an adapter a head: its own, or a copy of the base's.

        Args:
            name: The adapter.
            head: The head; None copies the base's.
        """
        if self.path is None:
            return
        module = head or copy.deepcopy(self.get(BASE_HEAD))
        assert module is not None
        if name == self.placed:
            self._stand(module)
        else:
            self.waiting[name] = module

    def get(self, name: str) -> nn.Module | None:
        """Look up an adapter's head.

        Args:
            name: The adapter, or `BASE_HEAD`.

        Returns:
            The head; None where the model has no place for one.
        """
        if self.path is None:
            return None
        return self.model.get_submodule(self.path) if name == self.placed else self.waiting[name]

    def place(self, name: str) -> None:
        """Put a head where timm expects the classifier.

        Args:
            name: The adapter, or `BASE_HEAD`.
        """
        if self.path is None or name == self.placed:
            return
        waiting = self.waiting.pop(name)
        self.waiting[self.placed] = self.model.get_submodule(self.path)
        self._stand(waiting)
        self.placed = name

    def drop(self, name: str) -> None:
        """Forget an adapter's head, which must not be in place."""
        if self.path is not None:
            del self.waiting[name]

    def close(self) -> None:
        """Put the base's head back and leave nothing behind."""
        if self.path is not None:
            self.place(BASE_HEAD)
            del self.model.adapter_heads

    def _stand(self, module: nn.Module) -> None:
        assert self.path is not None
        parent, _, leaf = self.path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)
        if hasattr(self.model, "num_classes"):
            model: Any = self.model
            model.num_classes = module.out_features if isinstance(module, nn.Linear) else 0
