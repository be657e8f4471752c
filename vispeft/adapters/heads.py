"""Heads: each adapter owns its classifier; the active one stands where timm expects it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.storage.quantize import LowBit

__all__ = ["BASE_HEAD", "HeadRack", "LowBitHead", "WideHead"]

BASE_HEAD = "(base)"
"""Name under which the model's original classifier waits; no adapter can be called so."""


class WideHead(nn.Linear):
    """A classifier in float32 behind a backbone in reduced precision, which would round its updates away."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute (B, classes), in float32."""
        return super().forward(input.to(self.weight.dtype))


class LowBitHead(LowBit, nn.Linear):
    """A classifier without a bias whose weight has a few bits (the 1-bit head of arXiv 2307.16867)."""

    matrices = ("weight",)

    def __init__(self, width: int, classes: int, bits: int) -> None:
        """Make it, drawn as PyTorch draws a linear layer.

        Args:
            width: Number of features.
            classes: Number of classes.
            bits: Bits per weight.
        """
        super().__init__(width, classes, bias=False)
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        """Compute (B, classes), in the weight's type."""
        weight = self.matrix("weight")
        return nn.functional.linear(input.to(weight.dtype), weight)


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
        self.waiting = nn.ModuleDict()
        self.num_classes = getattr(model, "num_classes", None)
        self.wide: nn.Module | None = None
        self.pooling = self._pooling()
        if path is not None:
            self.show()

    def show(self) -> None:
        """Hang the waiting heads into the model, where device moves and state dicts see them."""
        if self.path is not None:
            self.model.adapter_heads = self.waiting
            if self.wide is not None:
                self._stand(self.wide)
                self.wide = None

    def hide(self) -> None:
        """Leave a plain model with the head that is in place, for as long as it is merged."""
        if self.path is None:
            return
        del self.model.adapter_heads
        head = self.model.get_submodule(self.path)
        if isinstance(head, WideHead | LowBitHead):
            self.wide = head
            plain = nn.Linear(head.in_features, head.out_features, head.bias is not None)
            plain.load_state_dict(head.state_dict())
            if isinstance(head, LowBitHead):
                plain.weight.data = head.matrix("weight").detach().clone()
            self._stand(plain.to(next(self.model.parameters())).train(head.training))

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Give an adapter a head: its own, or a copy of the base's.

        Args:
            name: The adapter.
            head: The head; None copies the base's.
        """
        if self.path is None:
            return
        module = head if head is not None else copy.deepcopy(self.get(BASE_HEAD))
        assert module is not None
        if type(module) is nn.Linear and module.weight.dtype in (torch.bfloat16, torch.float16):
            module.__class__ = WideHead
            module.float()
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
        if name == self.placed:
            return self.wide or self.model.get_submodule(self.path)
        return self.waiting[name]

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
        """Put the base's head and pooling back and leave nothing behind."""
        if self.path is None:
            return
        self.place(BASE_HEAD)
        del self.model.adapter_heads
        for owner, name, value in self.pooling:
            setattr(owner, name, value)
        if self.num_classes is not None:
            self.model.num_classes = self.num_classes

    def _pooling(self) -> list[tuple[nn.Module, str, Any]]:
        """Note what timm's ``reset_classifier(..., global_pool=...)`` changes besides the classifier."""
        places = [(self.model, "global_pool"), (self.model, "attn_pool")]
        if self.path is not None and "." in self.path:
            places.append((self.model.get_submodule(self.path.rpartition(".")[0]), "global_pool"))
        return [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]

    def _stand(self, module: nn.Module) -> None:
        assert self.path is not None
        parent, _, leaf = self.path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)
        if self.num_classes is not None and isinstance(module, nn.Linear | nn.Identity):
            model: Any = self.model
            model.num_classes = module.out_features if isinstance(module, nn.Linear) else 0
