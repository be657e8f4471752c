"""Classifiers: each adapter owns one, and the base's at timm's key dispatches to the one of the route."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.core.method import Method
from vispeft.core.route import Routing
from vispeft.core.sites import View
from vispeft.errors import ConfigError
from vispeft.hosts.base import Host, HostState, ensure_host, put_back, take_off
from vispeft.hosts.head import HeadHost
from vispeft.hosts.model import HEADS
from vispeft.storage.quantize import LowBit

__all__ = ["HeadRack", "LowBitHead", "WideHead", "own_head"]


class WideHead(nn.Linear):
    """A float32 classifier on a backbone in reduced precision, in which its small updates would be rounded away."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute (B, classes), in float32."""
        return super().forward(input.to(self.weight.dtype))


class LowBitHead(LowBit, nn.Linear):
    """A low-bit classifier without a bias (the 1-bit head of arXiv 2307.16867)."""

    matrices = ("weight",)

    def __init__(self, width: int, classes: int, bits: int) -> None:
        """Create the classifier, initialised as PyTorch initialises a linear layer.

        Args:
            width: Number of features.
            classes: Number of classes.
            bits: Bits per weight.
        """
        super().__init__(width, classes, bias=False)
        self.bits = bits

    def forward(self, input: Tensor) -> Tensor:
        """Compute (B, classes), in the weight's dtype."""
        weight = self.matrix("weight")
        return nn.functional.linear(input.to(weight.dtype), weight)


def own_head(method: Method, view: View, model: nn.Module, seed: int, classes: int | None = None) -> nn.Module | None:
    """Create the classifier of a method that needs a low-bit one or another input width than the model's.

    Args:
        method: The method.
        view: The model's description.
        model: The timm model.
        seed: Seed of its initial values.
        classes: Number of classes; None uses that of the base's classifier.

    Returns:
        The classifier; None if the method uses timm's.
    """
    bits, width = method.low_bit_head(), method.head_width(view)
    if view.head_path is None:
        return None
    if classes is None:
        classes = getattr(model.get_submodule(view.head_path), "out_features", 0)
    if (bits == 32 and width is None) or not classes:
        return None
    reference = next(model.parameters())
    width = width or cast(int, model.num_features)
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


class HeadRack:
    """The classifiers of all adapters, in the model's ``adapter_heads``, and the base's at timm's key.

    The base's classifier is a host, which dispatches to the classifier of the route.
    """

    def __init__(self, model: nn.Module, path: str | None, routing: Routing) -> None:
        """Create the rack of a model without adapters, which is left as it is until `open`.

        Args:
            model: The timm model.
            path: Path of its classifier; None if there is none.
            routing: The route of the model.
        """
        self.model, self.path, self.routing = model, path, routing
        self.own = nn.ModuleDict()
        self._base: nn.Module | None = None
        """The base's classifier, also where another module was put at its place by hand."""
        self.hidden: tuple[nn.Module, HostState] | None = None
        """The base's classifier, while the model is merged."""
        self.pooling: list[tuple[nn.Module, str, Any]] = []
        """Attributes of the base that timm's ``reset_classifier`` changes, with their owners and values."""

    def open(self) -> None:
        """Record the base's classifier, and turn it into a host."""
        self.pooling = self._pooling()
        if self.path is not None:
            self.model.add_module(HEADS, self.own.train(self.model.training))
            self._base = ensure_host(self._at_place(), HeadHost, routing=self.routing)

    @property
    def base(self) -> nn.Module | None:
        """The base's own classifier; None if the model has none."""
        return self._base

    def check_place(self) -> None:
        """Refuse to go on with a module that somebody put at the place of the base's classifier.

        Raises:
            ConfigError: If there is one: it would answer in place of the adapters' classifiers, and be in no file.
        """
        if self._base is None or self.hidden is not None or self._at_place() is self._base:
            return
        raise ConfigError(
            f"The classifier at {self.path!r} was replaced by hand. The new {type(self._at_place()).__name__} belongs "
            f"to no adapter and would be in no file. Give it to one: bank.put_head(NAME, model.{self.path}). Another "
            "time, model.reset_classifier(num_classes) does both."
        )

    def clear_place(self, head: nn.Module | None) -> None:
        """Put the base's classifier back where one stands at its place that an adapter is given.

        Args:
            head: The adapter's classifier.
        """
        if self.path is not None and self.hidden is None and head is not self._base and self._at_place() is head:
            self._stand(cast(nn.Module, self._base))

    def get(self, name: str) -> nn.Module | None:
        """Return an adapter's classifier.

        Args:
            name: The adapter.

        Returns:
            The classifier; None if it has none.
        """
        return dict(self.own.items()).get(name)

    def put(self, name: str, head: nn.Module | None = None) -> None:
        """Set an adapter's classifier: a given one, or a copy of the base's.

        Args:
            name: The adapter.
            head: The classifier; None copies the base's.
        """
        if self.path is None:
            return
        module = self._copy_of_base() if head is None else head
        reference = next(self.model.parameters())
        module.to(reference.device)
        if type(module) is nn.Linear:
            if reference.dtype in (torch.bfloat16, torch.float16):
                module.__class__ = WideHead
            module.to(reference.dtype if reference.dtype == torch.float64 else torch.float32)
        self.own[name] = module

    def drop(self, name: str) -> None:
        """Remove an adapter's classifier, if it has one."""
        if name in self.own:
            del self.own[name]

    def put_base(self, head: nn.Module) -> None:
        """Install a new classifier of the base at timm's key.

        Args:
            head: The classifier.
        """
        self._stand(head.to(next(self.model.parameters())).requires_grad_(False))
        self._base = ensure_host(head, HeadHost, routing=self.routing)
        self.pooling = self._pooling()  # or detaching would put the class count of the former one back

    def restore_base(self, head: nn.Module) -> None:
        """Restore the base's classifier at timm's key.

        Args:
            head: The classifier, already a host.
        """
        self._stand(head)

    def hide(self, head: nn.Module | None) -> None:
        """Leave the merged model with one plain classifier.

        Args:
            head: The classifier to keep; None for the base's.
        """
        if self.path is None:
            return
        delattr(self.model, HEADS)
        base = self._at_place()
        self.hidden = (base, take_off(cast(Host, base)))
        if head is not None:
            self._stand(_plain(head, next(self.model.parameters())))
            self._count(head)

    def show(self) -> None:
        """Undo `hide`."""
        if self.path is None or self.hidden is None:
            return
        base, state = self.hidden
        self.hidden = None
        self._stand(base)
        self._count(base)
        put_back(state)
        self.model.add_module(HEADS, self.own)

    def follow(self, base: Tensor) -> None:
        """Move classifiers that were hidden to the place of a model that was moved or cast in between.

        Args:
            base: A tensor of the base.
        """
        self.own.to(base.device)
        if self.base is not None:
            self.base.to(base)

    def close(self) -> None:
        """Restore the base's classifier and pooling, and remove everything added."""
        if self.path is None:
            return
        take_off(cast(Host, self._at_place()))
        delattr(self.model, HEADS)
        for owner, name, value in self.pooling:
            setattr(owner, name, value)

    def _pooling(self) -> list[tuple[nn.Module, str, Any]]:
        """Record the attributes that timm's ``reset_classifier`` changes besides the classifier."""
        places = [(self.model, "global_pool"), (self.model, "attn_pool"), (self.model, "num_classes")]
        if self.path is not None and "." in self.path:
            places.append((self.model.get_submodule(self.path.rpartition(".")[0]), "global_pool"))
        return [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]

    def _copy_of_base(self) -> nn.Module:
        base = self._at_place()
        state = take_off(cast(Host, base))  # copying a host would copy the route and everything it refers to
        try:
            return copy.deepcopy(base)
        finally:
            put_back(state)

    def _count(self, head: nn.Module) -> None:
        if "num_classes" in self.model.__dict__ and isinstance(head, nn.Linear | nn.Identity):
            self.model.__dict__["num_classes"] = getattr(head, "out_features", 0)

    def _at_place(self) -> nn.Module:
        assert self.path is not None
        return self.model.get_submodule(self.path)

    def _stand(self, module: nn.Module) -> None:
        assert self.path is not None
        parent, _, leaf = self.path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)


def _plain(head: nn.Module, like: Tensor) -> nn.Module:
    """Convert an adapter's classifier to the equivalent plain layer."""
    if not isinstance(head, WideHead | LowBitHead):
        return head
    plain = nn.Linear(head.in_features, head.out_features, head.bias is not None)
    plain.load_state_dict(head.state_dict())
    if isinstance(head, LowBitHead):
        plain.weight.data = head.matrix("weight").detach().clone()
    return plain.to(like).train(head.training)
