"""What a cheap output was computed from, so that a later layer can keep that instead and compute the output again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["MEMORY", "Memory", "Note", "Origin", "SharedOrigin", "note_of", "note_origin"]

Memory = Literal["plain", "lean", "leaner"]
MEMORY: tuple[Memory, ...] = ("plain", "lean", "leaner")
"""How much is kept for the backward pass: all that PyTorch keeps; no outputs of norms and activations; nor those of the
first layers of MLPs."""
ORIGIN = "vispeft_origin"
"""Name under which a tensor refers to its `Note`."""


class Origin:
    """How an output is computed, bit for bit, from tensors that are kept anyway.

    It holds none of them: an autograd node that refers to it would keep them after its backward pass, and under
    activation checkpointing until then.
    """

    __slots__ = ("make", "own", "parent")

    def __init__(self, make: Callable[..., Tensor], own: int, parent: Origin | None = None) -> None:
        """Store the computation.

        Args:
            make: Computes the output from its input and further tensors, on any thread and under any settings.
            own: Number of its tensors: the input, unless a parent computes it, and the further ones.
            parent: How the input is computed.
        """
        self.make, self.own, self.parent = make, own, parent

    def again(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Compute the output.

        Args:
            tensors: The tensors of its `Note`, as they come back from autograd.
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
        # The graph of a second derivative belongs to one of them.
        self.handed = None if torch.is_grad_enabled() else made
        return made

    def last(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Take the output over, or compute it."""
        handed, self.handed = self.handed, None
        return super().again(tensors) if handed is None or torch.is_grad_enabled() else handed


class Note(NamedTuple):
    """What a tensor was computed from."""

    origin: Origin
    """How it is computed."""
    tensors: tuple[Tensor | None, ...]
    """From which tensors."""
    version: int
    """The version of the tensor: changed in place, as by a hook, it is another one."""


def note_of(x: Tensor) -> Note | None:
    """Return what a tensor was computed from; None where it is not known."""
    note: Note | None = x.__dict__.get(ORIGIN)
    return note if note is not None and note.version == x._version else None


def note_origin(out: Tensor, origin: Origin, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """Note at an output how it was computed; the result of any operation on it has no such note.

    Args:
        out: The output.
        origin: How it was computed.
        tensors: From which tensors.

    Returns:
        The same tensor.
    """
    out.__dict__[ORIGIN] = Note(origin, tensors, out._version)
    return out
