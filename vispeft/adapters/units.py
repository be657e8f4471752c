"""Units: the small modules a method puts at sites. Their kind fixes how they compose with each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from torch import Generator, Tensor, nn

from vispeft.adapters.functional import Branch
from vispeft.adapters.quantize import LowBit

__all__ = [
    "AffineUnit",
    "DeltaUnit",
    "InputUnit",
    "ParallelUnit",
    "SelectionUnit",
    "SequentialUnit",
    "TokensUnit",
    "Unit",
    "UnitKind",
]

UnitKind = Literal["selection", "input", "delta", "sequential", "affine", "parallel", "tokens"]


class Unit(LowBit):
    """What a method puts at one site.

    A unit holds every trainable tensor of a site and the arithmetic on it, and knows nothing of attaching, saving or
    merging. Subclass one of the kinds below; the kind is a rule of composition:

    * selection: replaces tensors of the base, before everything else;
    * input: changes what enters a linear layer;
    * delta: is added to the output of the base layer, computed from the same input;
    * sequential: changes what the layer and its deltas give;
    * affine: acts on what then leaves;
    * parallel: is added to a branch of a block, computed from what enters that branch;
    * tokens: adds tokens to the sequence.
    """

    kind: ClassVar[UnitKind]
    no_decay: ClassVar[frozenset[str]] = frozenset()
    """Tensors that must not decay, besides those of fewer than two dimensions."""
    lr_factors: ClassVar[Mapping[str, float]] = {}
    """Multiples of the learning rate, by tensor."""
    zero_gradient: frozenset[str] = frozenset()
    """Tensors whose gradient is zero by construction, which `verify` must not complain about."""
    identity_at_start: bool = True
    """Whether a new unit leaves the model's function as it is."""

    def reset(self, generator: Generator) -> None:
        """Give every tensor its start value.

        Args:
            generator: Source of all randomness.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it starts.")

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Give the weight of the plain layer that does the same as `weight` and this unit together.

        Args:
            weight: (out, ...) weight so far.

        Returns:
            The same shape, in the wider of the two types.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Give the bias of the plain layer that does the same as `bias` and this unit together.

        Args:
            bias: (out,) bias so far.

        Returns:
            The same shape, in the wider of the two types.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def shifts(self) -> bool:
        """Tell whether the plain layer needs a bias for this unit."""
        return False


class SelectionUnit(Unit):
    """Trains tensors of the base, as values of its own that take their place.

    The base tensors stay as they are, so that switching off, switching over and detaching are exact and free.
    """

    kind = "selection"

    def __init__(self, tensors: Mapping[str, Tensor], null: Iterable[str] = ()) -> None:
        """Copy the start values.

        Args:
            tensors: Name inside the module to the base's tensor.
            null: Those that cannot change any output.
        """
        super().__init__()
        self.zero_gradient = frozenset(null)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def reset(self, generator: Generator) -> None:
        """Keep the base's values, which are the start."""

    def value(self, name: str) -> Tensor | None:
        """Look up the tensor that replaces the base's tensor of this name, if any."""
        return self._parameters.get(name)


class DeltaUnit(Unit):
    """A low-rank term ``scale * B A`` added to a linear layer's weight."""

    kind = "delta"

    start: int
    """First output row the term is added to."""
    stop: int
    """Row behind the last one."""

    def branch(self) -> Branch | None:
        """Give the term for the fused path, or None where only `term` computes it (dropout in training)."""
        raise NotImplementedError

    def term(self, x: Tensor) -> Tensor:
        """Compute the term by itself.

        Args:
            x: (..., in).

        Returns:
            (..., rows).
        """
        raise NotImplementedError

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Leave the bias alone."""
        return bias


class InputUnit(Unit):
    """A linear map of what enters a linear layer: ``x' = M x + m``."""

    kind = "input"

    def enter(self, x: Tensor) -> Tensor:
        """Compute what enters the layer instead.

        Args:
            x: (..., in).

        Returns:
            The same shape.
        """
        raise NotImplementedError

    def input_shift(self) -> Tensor:
        """Give ``m``, (in,); `fold_weight` gives ``W M``."""
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def shifts(self) -> bool:
        """Tell that a bias is needed."""
        return True


class SequentialUnit(Unit):
    """A change of what a linear layer gives, computed from that."""

    kind = "sequential"

    def follow(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute what leaves instead.

        Args:
            x: What entered the layer, (..., in).
            y: What it gives, (..., out).

        Returns:
            The shape of `y`.
        """
        raise NotImplementedError

    def shifts(self) -> bool:
        """Tell that a bias is needed."""
        return True


class AffineUnit(Unit):
    """A scale and a shift per channel behind a layer."""

    kind = "affine"

    scale: nn.Parameter
    shift: nn.Parameter

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Scale the output rows: ``diag(scale) W``."""
        return self.scale.view(-1, *[1] * (weight.ndim - 1)) * weight

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Scale and shift the bias: ``scale * b + shift``."""
        return self.scale * bias + self.shift

    def shifts(self) -> bool:
        """Tell that a bias is needed."""
        return True


class ParallelUnit(Unit):
    """A term beside a branch of a block; the family's own block adds it to the residual stream."""

    kind = "parallel"

    place: Literal["attn", "mlp"]
    """The branch it stands beside."""
    reads: Literal["stream", "normed"]
    """What it is computed from: the residual stream that enters the branch, or what the branch's norm makes of it."""
    drops: bool = False
    """Whether stochastic depth acts on it, by a draw of its own."""
    needs_grid: bool = False
    """Whether it looks at tokens as an image."""

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term.

        Args:
            x: Tokens (B, N, D), or a map (B, H, W, D).
            grid: Height and width of the patches among tokens, for units that need them; None for a map.
            prefix: Number of tokens in front of the patches.

        Returns:
            The shape of `x`.
        """
        raise NotImplementedError


class TokensUnit(Unit):
    """Learned tokens in the sequence; the family's own forward puts them there."""

    kind = "tokens"
    identity_at_start = False

    length: int
    """Number of tokens."""
    pool: str
    """What average pooling sees: ``all``, ``patches`` or ``prompts``."""

    def tokens(self, block: int, batch: int) -> Tensor | None:
        """Give the tokens that enter a block.

        Args:
            block: Index of the block.
            batch: Number of images.

        Returns:
            (batch, length, width), or None where those that came out of the block before go on.
        """
        raise NotImplementedError
