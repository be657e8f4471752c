"""What a cheap output was computed from, so that a later layer can keep that instead and compute the output again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MEMORY", "ORIGIN", "Memory", "Origin", "SharedOrigin", "note_origin"]

Memory = Literal["plain", "lean", "leaner"]
MEMORY: tuple[Memory, ...] = ("plain", "lean", "leaner")
"""How much is kept for the backward pass: all that PyTorch keeps; no outputs of norms and activations; nor those of the
first layers of MLPs."""
ORIGIN = "vispeft_origin"
"""Name under which a tensor refers to its `Origin`."""


class Origin:
    """How an output is computed, bit for bit, from tensors that are kept anyway."""

    __slots__ = ("make", "own", "parent", "tensors")

    def __init__(
        self, make: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], parent: Origin | None = None
    ) -> None:
        """Store the computation.

        Args:
            make: Computes the output from its input and further tensors, on any thread and under any settings.
            tensors: The input, unless a parent computes it, and the further tensors.
            parent: How the input is computed.
        """
        self.make, self.own, self.parent = make, len(tensors), parent
        self.tensors: tuple[Tensor | None, ...] = tensors if parent is None else (*parent.tensors, *tensors)

    def again(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Compute the output.

        Args:
            tensors: The `tensors`, as they come back from autograd.
        """
        if self.parent is None:
            return self.make(*tensors)
        split = len(tensors) - self.own
        return self.make(self.parent.again(tensors[:split]), *tensors[split:])


class SharedOrigin(Origin):
    """The origin of an activation's input, which the backward passes of the layer behind and of the activation need.

    The layer behind comes first, and hands it over.
    """

    __slots__ = ("handed",)

    def __init__(self, *args: Any) -> None:
        """Store the computation; nothing is handed over yet."""
        super().__init__(*args)
        self.handed: Tensor | None = None

    def again(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Compute the output for the layer behind, and hand it over."""
        made = super().again(tensors)
        if not torch.is_grad_enabled():  # the graph of a second derivative belongs to one of them
            self.handed = made
        return made

    def last(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Take the output over, or compute it."""
        handed, self.handed = self.handed, None
        return super().again(tensors) if handed is None else handed


def note_origin(out: Tensor, origin: Origin) -> Tensor:
    """Note at an output how it was computed; the result of any operation on it has no such note.

    Args:
        out: The output.
        origin: How it was computed.

    Returns:
        The same tensor.
    """
    out.__dict__[ORIGIN] = origin
    return out
