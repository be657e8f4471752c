"""The host of an activation: its output, or the input too, is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from vispeft.core.origin import Origin, SharedOrigin, note_of, note_origin
from vispeft.core.route import NOTHING
from vispeft.hosts.base import Host
from vispeft.hosts.functional import computes_again

__all__ = ["ELEMENTWISE", "ActivationHost"]

ELEMENTWISE = frozenset({"GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish"})
"""Activations whose backward pass reads the input, so that it is kept anyway."""


class ActivationHost(Host):
    """An activation of an MLP, element by element and without tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shape of `x`."""
        memory = self.routing.memory
        in_place = self.__dict__.get("inplace", False)
        if memory == "plain" or in_place or not computes_again(x) or self.acting is not NOTHING:
            return cast(Tensor, super().forward(x))
        compute = partial(self.replaces.forward, self)
        note = note_of(x)
        if note is None or not isinstance(note.origin, SharedOrigin):
            return note_origin(compute(x), Origin(compute, 1), (x,))
        out = cast(Tensor, _Activation.apply(x, note.origin, compute, *note.tensors))
        return note_origin(out, Origin(compute, 0, note.origin), note.tensors)


class _Activation(torch.autograd.Function):
    """An activation that keeps what its input is computed from, in place of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: SharedOrigin, compute: Any, *tensors: Tensor | None) -> Tensor:
        ctx.origin, ctx.compute = origin, compute
        ctx.save_for_backward(*tensors)
        return cast(Tensor, compute(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, twice = ctx.origin.last(ctx.saved_tensors), torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if twice else x.detach().requires_grad_()
            out = ctx.compute(x)
        slope = torch.autograd.grad(out, x, grad, create_graph=twice)[0]
        return (slope, *[None] * (len(ctx.needs_input_grad) - 1))
