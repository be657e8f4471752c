"""Units: the small modules a method puts at sites. The kind of a unit determines how it composes with others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.low_rank import NO_DROPOUT, Branch, Dropout
from vispeft.core.streams import Stream

__all__ = [
    "AffineUnit",
    "BranchUnit",
    "DeltaUnit",
    "DepthUnit",
    "InputUnit",
    "LayerPass",
    "ParallelUnit",
    "PrefixUnit",
    "SelectionUnit",
    "SequentialUnit",
    "SharedUnit",
    "Unit",
    "UnitKind",
    "WeightUnit",
    "with_rows",
]

UnitKind = Literal[
    "selection",
    "weight",
    "input",
    "delta",
    "sequential",
    "affine",
    "branch",
    "parallel",
    "prefix",
    "tokens",
    "stream",
    "queries",
    "side",
    "shared",
    "depth",
]


class Unit(nn.Module):
    """The module a method puts at one site.

    A unit holds a site's trainable tensors and the arithmetic on them, and knows nothing of attaching, saving or
    merging. Subclass one of the kinds below; the kind is the rule of composition:

    * selection: replaces tensors of the base, before everything else;
    * weight: changes the weight of a linear layer as a whole;
    * input: changes the input of a linear layer;
    * delta: adds a low-rank term to the output of a linear layer, computed from the same input;
    * sequential: changes the output of a linear layer, deltas included;
    * affine: scales and shifts the resulting output;
    * branch: produces streams after a linear layer, beside its shared output;
    * parallel: adds a term to a branch of a block, computed from that branch's input or output, or from their sum;
    * prefix: adds keys and values to an attention;
    * queries: reads the tokens inside the blocks and widens the classifier's input;
    * tokens: adds tokens to the sequence;
    * stream: passes rows of its own through the blocks, beside the tokens;
    * side: reads the outputs of the blocks and computes the output of the model;
    * shared: holds tensors that other units of the adapter use, and does nothing itself;
    * depth: is the rate at which a branch of a block is dropped while the model trains.

    A unit trains its parameters and keeps other state in persistent buffers; files hold both. It is created without
    values, reads the frozen weight of its site (`prepare`), and is then either initialised (`reset`) or loaded from a
    file. Each step may be repeated.
    """

    kind: ClassVar[UnitKind]
    no_decay: frozenset[str] = frozenset()
    """Tensors without weight decay, besides those of fewer than two dimensions."""
    lr_factors: Mapping[str, float] = {}
    """Multipliers of the learning rate, by tensor."""
    decays: Mapping[str, float] = {}
    """Weight decay of its own, by tensor, in place of the optimiser's; a schedule may set it."""
    zero_gradient: frozenset[str] = frozenset()
    """Tensors whose gradient is zero by construction, which `verify` accepts."""
    running: ClassVar[tuple[str, ...]] = ()
    """Buffers that a forward pass in training mode writes, such as running statistics of the batches."""
    identity_at_start: bool = True
    """Whether a new unit leaves the model's output unchanged."""
    held: bool = False
    """Whether it stays as it is although its adapter trains: no gradient, no dropout. Not saved."""
    gain: Tensor | None
    """Multiplier of the unit's contribution, a scalar that a schedule may set; None means 1. It applies to every kind
    whose contribution is a difference: selection, weight, input, delta, sequential, affine and parallel. Not saved."""

    def __init__(self) -> None:
        """Create a unit without tensors."""
        super().__init__()
        self.register_buffer("gain", None, persistent=False)  # a buffer, so that it moves with the model

    def prepare(self, weight: Tensor) -> None:
        """Read the frozen weight of the site; called on attach and on load, before `reset`.

        Not called for units at modules without a weight, such as blocks.

        Args:
            weight: (out, ...) weight of the base, without the changes of other adapters; at a slice, its rows only. It
                is not a copy and must not be modified.
        """

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a unit that is `held` stays in evaluation mode.

        Args:
            mode: True for training mode.
        """
        return super().train(mode and not self.held)

    def rename_task(self, old: str, new: str) -> None:
        """Take another name for a task, in units that know their tasks by name.

        Args:
            old: The present name.
            new: The new name.
        """

    def makes_streams(self, layout: str) -> bool:
        """Return whether the unit passes streams through all blocks of the model.

        Args:
            layout: Order of the axes between the blocks: ``NLC`` or ``NHWC``.
        """
        return bool(self.streams())

    def routed(self, task: str | None) -> Unit | None:
        """Choose the unit that acts for a task; units of a `Method.multi_task` method override this.

        Args:
            task: The chosen task; None for no task.

        Returns:
            This unit, a child of it that is itself a unit, or None if nothing acts.
        """
        return self

    def streams(self) -> Sequence[Stream]:
        """Return the streams that the unit passes through the blocks, or that start in its block."""
        return ()

    def reset(self, generator: Generator) -> None:
        """Initialise every tensor. May be called again at any time; not called on load.

        Args:
            generator: Source of all randomness.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement reset.")

    def to_identity(self) -> bool:
        """Set the values at which a new unit changes nothing, in forms that have such values.

        Returns:
            Whether it changes nothing now.
        """
        return self.identity_at_start

    def borrow(self, lender: Unit) -> None:
        """Also use the tensors of another unit of the same adapter.

        The tensors stay with the lender, where they are counted, saved, moved and trained once.

        Args:
            lender: The unit that holds the tensors.
        """
        self._lender = (lender,)  # in a tuple, or PyTorch would register the lender as a child here

    @property
    def lender(self) -> Unit | None:
        """The unit whose tensors this one also uses, if any."""
        held: tuple[Unit, ...] = self.__dict__.get("_lender", ())
        return held[0] if held else None

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """Slice a tensor saved from the full model to the shape this truncated model's unit expects.

        Args:
            name: The tensor's name in the unit.
            tensor: The full model's tensor.
        """
        return tensor

    def takes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of other shapes than its own may be loaded: in units whose sizes data decide.

        Args:
            shapes: The shapes by the names of `state_dict`.
        """
        return False

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, under the names that `Method.file_method` gives them."""
        return dict(self.state_dict())

    def codecs(self) -> Mapping[str, str]:
        """Return the codec of each tensor in `file_tensors`, by name; those omitted are saved as they are.

        See `vispeft.storage.codecs` for the names.
        """
        return {}

    def encoded(self, name: str) -> Tensor | None:
        """Return the encoded bytes of a tensor, where encoding its values again would change them.

        Needed, with `keep_encoded`, only if the codec is lossy: the unit keeps the bytes it was loaded from and returns
        them while its tensor still has the decoded values.

        Args:
            name: The tensor's name in `file_tensors`.

        Returns:
            uint8 (bytes,), or None to encode the values.
        """
        return None

    def keep_encoded(self, name: str, stored: Tensor) -> None:
        """Keep the encoded bytes of a tensor that was just loaded and holds their decoded values.

        Args:
            name: The tensor's name in `codecs`.
            stored: Its bytes in the file, uint8 (bytes,).
        """

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Merge this unit into a layer's weight.

        Args:
            weight: (out, ...), with earlier units merged.

        Returns:
            The same shape, in the wider of the two types.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Merge this unit into a layer's bias.

        Args:
            bias: (out,), with earlier units merged.

        Returns:
            The same shape, in the wider of the two types.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def needs_bias(self) -> bool:
        """Return whether merging needs a bias."""
        return False


class DepthUnit(Unit):
    """The rate at which a branch of a block is dropped while the model trains (stochastic depth, arXiv 1603.09382)."""

    kind = "depth"

    rate: Tensor

    def __init__(self, rate: float) -> None:
        """Set the rate.

        Args:
            rate: Share of images for which the branch is dropped.
        """
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def reset(self, generator: Generator) -> None:
        """Do nothing: there is nothing to initialise."""


class SelectionUnit(Unit):
    """Trainable copies that replace tensors of the base.

    The base tensors stay unchanged, so that disabling, switching and detaching are exact and free.
    """

    kind = "selection"

    def __init__(self, tensors: Mapping[str, Tensor], null: Iterable[str] = ()) -> None:
        """Copy the initial values.

        Args:
            tensors: The base's tensors by name in the module.
            null: Names of those that cannot affect any output.
        """
        super().__init__()
        self.zero_gradient = frozenset(null)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def reset(self, generator: Generator) -> None:
        """Keep the values copied from the base, which are the initial ones."""

    def value(self, name: str) -> Tensor | None:
        """Return the tensor that replaces the base's tensor of this name, if any."""
        return self._parameters.get(name)


class SharedUnit(Unit):
    """Tensors that several units of one adapter use, each through `Unit.borrow`."""

    kind = "shared"


def with_rows(weight: Tensor, start: int, rows: Tensor) -> Tensor:
    """Put changed rows into a weight, in their dtype.

    Args:
        weight: (out, ...).
        start: The first row that changed.
        rows: (rows, ...).
    """
    return torch.cat([weight[:start].to(rows.dtype), rows, weight[start + rows.shape[0] :].to(rows.dtype)])


class WeightUnit(Unit):
    """A change of a linear layer's full weight, by `Unit.fold_weight`; the unit knows which rows it changes.

    Training computes the gradient of the full weight, which costs as much as full fine-tuning of that layer. The
    changed weight is not kept for the backward pass: `fold_weight` is called again there, on a copy of the unit whose
    tensors are views of its own, and must give the same. Implement low-rank terms as a `DeltaUnit` instead.
    """

    kind = "weight"

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Leave the bias alone."""
        return bias


class DeltaUnit(Unit):
    """A low-rank term ``scale * B A`` added to a linear layer's weight."""

    kind = "delta"

    scale: float
    """Multiplier of the term."""
    start: int
    """First output row the term is added to."""
    stop: int
    """End of these rows, exclusive."""
    dropout: Dropout = NO_DROPOUT
    """Dropout in training mode."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors A (rank, in) and B (rows, rank)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement factors.")

    def branches(self) -> list[Branch]:
        """Return the low-rank terms of this forward pass, one or several."""
        return [Branch(*self.factors(), self.scale, self.start, self.stop, self.dropped())]

    @property
    def is_one_term(self) -> bool:
        """Whether the unit is one term of its factors."""
        return type(self).branches is DeltaUnit.branches

    def dropped(self) -> Dropout:
        """Return the current dropout: none in evaluation mode."""
        return self.dropout if self.training else NO_DROPOUT

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Add ``scale * B A`` to the rows."""
        a, b = self.factors()
        dtype = torch.promote_types(weight.dtype, a.dtype)
        delta = (b.to(dtype) @ a.to(dtype)) * self.scale
        return weight + F.pad(delta, (0, 0, self.start, weight.shape[0] - self.stop))

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Leave the bias alone."""
        return bias


class InputUnit(Unit):
    """A linear map of the input of a linear layer: ``x' = M x + m``."""

    kind = "input"

    def transform_input(self, x: Tensor) -> Tensor:
        """Compute the changed input.

        Args:
            x: (..., in).

        Returns:
            The same shape.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement transform_input.")

    def input_shift(self) -> Tensor:
        """Return ``m``, (in,); `fold_weight` returns ``W M``."""
        raise NotImplementedError(f"{type(self).__name__} has no weight form.")

    def needs_bias(self) -> bool:
        """Return True: the merged layer needs a bias."""
        return True


class SequentialUnit(Unit):
    """A change of a linear layer's output, computed from that output."""

    kind = "sequential"

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the changed output.

        Args:
            x: The input of the layer, (..., in).
            y: Its output, (..., out).

        Returns:
            The shape of `y`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement after.")

    def needs_bias(self) -> bool:
        """Return True: the merged layer needs a bias."""
        return True


class AffineUnit(Unit):
    """A scale and a shift per channel after a layer."""

    kind = "affine"

    scale: nn.Parameter
    shift: nn.Parameter

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Scale the output rows: ``diag(scale) W``."""
        return self.scale.view(-1, *[1] * (weight.ndim - 1)) * weight

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Scale and shift the bias: ``scale * b + shift``."""
        return self.scale * bias + self.shift

    def needs_bias(self) -> bool:
        """Return True: the merged layer needs a bias."""
        return True


@dataclass
class LayerPass:
    """One pass of a linear layer behind which streams start, as `BranchUnit` sees it."""

    x: Tensor
    """The shared input (..., in)."""
    beside: Mapping[str, Tensor]
    """The inputs of streams that entered the layer, by name, each (..., in)."""
    frozen: Tensor
    """The product of the frozen layer with `x`, its bias included, (..., out)."""
    shared: Tensor
    """The layer's shared output, (..., out)."""
    drawn: dict[float, Tensor] = field(default_factory=dict)
    """The shared input after dropout, by the share that is dropped."""

    def dropped(self, share: float) -> Tensor:
        """Return the shared input after dropout: the same entries are dropped for every term of the layer.

        Args:
            share: Share of entries to drop; 0 for none.
        """
        if not share:
            return self.x
        if share not in self.drawn:
            self.drawn[share] = F.dropout(self.x, share)
        return self.drawn[share]


class BranchUnit(Unit):
    """Streams that start after a linear layer, such as one per task, beside the layer's shared output.

    The residual stream of such a stream starts as a copy of the tokens. The layer's block runs its branches on all
    streams.
    """

    kind = "branch"

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        """Compute the outputs of the streams that start here.

        Args:
            layer: The pass of the layer.

        Returns:
            Outputs (..., out) by the name of the stream.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement branches.")

    def join(self, layer: LayerPass, beside: Mapping[str, Tensor]) -> Tensor:
        """Compute the shared output, where it depends on the outputs of the streams; called after all `branches`.

        Args:
            layer: The pass of the layer.
            beside: The outputs of the streams that start here, by name, each (..., out).

        Returns:
            (..., out); by default `LayerPass.shared`.
        """
        return layer.shared


class ParallelUnit(Unit):
    """A term beside a branch of a block; the family's block host adds it to the residual stream."""

    kind = "parallel"

    place: Literal["attn", "mlp"]
    """The branch it stands beside."""
    reads: Literal["stream", "normed", "output", "sum"]
    """Its input: the residual stream before the branch, the output of the branch's norm, the output of the branch (with
    layer scale and stochastic depth), or the residual stream behind the branch and all terms that do not read it."""
    drops: bool = False
    """Whether stochastic depth applies to it, drawn independently of the branch."""
    needs_grid: bool = False
    """Whether it treats the tokens as an image, or needs to know which of them are patches."""
    needs_order: bool = False
    """Whether it reads tokens by their order in the sequence."""
    skips: bool = False
    """Whether tokens skip the MLP by its decision, `passes`."""

    def passes(self, x: Tensor, prefix: int) -> Tensor:
        """Decide which tokens pass through the MLP of the block, in a unit that `skips`.

        Args:
            x: The residual stream in front of the MLP and its norm, (B, N, D) or (B, H, W, D).
            prefix: Number of tokens before the patches.

        Returns:
            (B, N, 1) or (B, H, W, 1): 1 for tokens that pass, 0 for the others.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement passes.")

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term.

        Args:
            x: Tokens (B, N, D), or a map (B, H, W, D).
            grid: Height and width of the patches among tokens, for units that need them; None for a map.
            prefix: Number of tokens before the patches.

        Returns:
            The shape of `x`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement branch.")


class PrefixUnit(Unit):
    """Learned keys and values, put before those of the tokens in an attention."""

    kind = "prefix"
    identity_at_start = False

    def rows(self) -> Tensor | None:
        """Return learned inputs of the attention, (length, D), whose keys and values its own projection computes.

        None, the default, takes those of `keys_values`.
        """
        return None

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, (length, heads * width of a head) each; the keys are not normalised further."""
        raise NotImplementedError(f"{type(self).__name__} does not implement keys_values.")
