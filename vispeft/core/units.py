"""Units: the small modules a method puts at sites. Their kind fixes how they compose with each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.low_rank import Branch, Dropout

__all__ = [
    "AffineUnit",
    "BranchUnit",
    "DeltaUnit",
    "DepthUnit",
    "InputUnit",
    "ParallelUnit",
    "PrefixUnit",
    "QueryUnit",
    "SelectionUnit",
    "SequentialUnit",
    "SharedUnit",
    "SideUnit",
    "Stream",
    "StreamRule",
    "StreamUnit",
    "TokensUnit",
    "Unit",
    "UnitKind",
    "WeightUnit",
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
    """What a method puts at one site.

    A unit holds every trainable tensor of a site and the arithmetic on it, and knows nothing of attaching, saving or
    merging. Subclass one of the kinds below; the kind is a rule of composition:

    * selection: replaces tensors of the base, before everything else;
    * weight: changes the weight of a linear layer as a whole;
    * input: changes what enters a linear layer;
    * delta: is added to the output of the base layer, computed from the same input;
    * sequential: changes what the layer and its deltas give;
    * affine: acts on what then leaves;
    * branch: gives streams of their own behind a linear layer, beside its shared output;
    * parallel: is added to a branch of a block, computed from what enters that branch;
    * prefix: adds keys and values to an attention;
    * queries: reads what is inside the blocks and widens what enters the classifier;
    * tokens: adds tokens to the sequence;
    * stream: passes rows of its own through the blocks, beside the tokens;
    * side: reads what leaves the blocks and gives what leaves the model;
    * shared: does nothing itself and holds tensors that other units of the adapter use;
    * depth: is the rate at which a branch of a block is dropped while the model trains.

    A unit trains its parameters and remembers other state in persistent buffers; files hold both. Its life: it is made
    without values, reads from the frozen weight of its site (`prepare`), and is then either drawn (`reset`) or filled
    from a file. Nothing is used up: each step may be repeated.
    """

    kind: ClassVar[UnitKind]
    no_decay: frozenset[str] = frozenset()
    """Tensors that must not decay, besides those of fewer than two dimensions."""
    lr_factors: Mapping[str, float] = {}
    """Multiples of the learning rate, by tensor."""
    zero_gradient: frozenset[str] = frozenset()
    """Tensors whose gradient is zero by construction, which `verify` must not complain about."""
    identity_at_start: bool = True
    """Whether a new unit leaves the model's function as it is."""
    gain: Tensor | None
    """Multiplier of the unit's contribution, a scalar that a schedule may set; None is 1. It acts on every kind whose
    contribution is a difference: selection, weight, input, delta, sequential, affine and parallel. It is in no file."""

    def __init__(self) -> None:
        """Make a unit without tensors."""
        super().__init__()
        self.register_buffer("gain", None, persistent=False)  # a buffer, so that it moves with the model

    def prepare(self, weight: Tensor) -> None:
        """Read from the frozen weight of the site; called on attach and on load, before `reset`.

        Units at modules without a weight, such as blocks, are not asked.

        Args:
            weight: (out, ...) weight of the base, whatever other adapters make of it, or the rows of the slice where
                the site is one. It is no copy and must not be changed.
        """

    def makes_streams(self, layout: str) -> bool:
        """Tell whether the unit passes streams through all blocks of a model.

        Args:
            layout: Order of the axes between the blocks: ``NLC`` or ``NHWC``.
        """
        return bool(self.streams())

    def routed(self, task: str | None) -> Unit | None:
        """Choose the unit that acts for a task; a method with tasks of its own overrides it.

        Args:
            task: The task that is asked for; None for none.

        Returns:
            This unit, a part of it that is a unit of its own, or None for nothing.
        """
        return self

    def streams(self) -> Sequence[Stream]:
        """List the streams that the unit passes through the blocks, or that start in its block."""
        return ()

    def reset(self, generator: Generator) -> None:
        """Give every tensor its start value; it may be called again at any time, and is not on load.

        Args:
            generator: Source of all randomness.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it starts.")

    def borrow(self, lender: Unit) -> None:
        """Use the tensors of another unit of the same adapter too.

        The lender keeps its one place in the model: there its tensors are counted, stored, moved and trained.

        Args:
            lender: The unit that holds them.
        """
        self._lender = (lender,)  # in a tuple, or PyTorch would register the lender's tensors here once more

    @property
    def lender(self) -> Unit | None:
        """The unit whose tensors this one uses too, if any."""
        held: tuple[Unit, ...] = self.__dict__.get("_lender", ())
        return held[0] if held else None

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """Give what a unit of a model that was cut off behind some block needs of a tensor of the whole model's unit.

        Args:
            name: The tensor's name in the unit.
            tensor: The whole model's.
        """
        return tensor

    def file_tensors(self) -> dict[str, Tensor]:
        """Give the tensors a file holds of this unit, by their names under `Method.file_method`."""
        return dict(self.state_dict())

    def codecs(self) -> Mapping[str, str]:
        """Codecs of the tensors in `stored`, by name; those left out are in files as they are.

        See `vispeft.storage.codecs` for the names.
        """
        return {}

    def encoded(self, name: str) -> Tensor | None:
        """Bytes that a file holds of a tensor, where encoding its values anew would change them.

        Only a unit whose codec rounds needs this and `keep_encoded`: it keeps the bytes it was loaded from, and returns
        them as long as its tensor still has the values they decode to.

        Args:
            name: The tensor's name in `stored`.

        Returns:
            uint8 (bytes,), or None to encode the values.
        """
        return None

    def keep_encoded(self, name: str, stored: Tensor) -> None:
        """Learn the bytes of a tensor that was just loaded and holds their decoded values.

        Args:
            name: The tensor's name in `codecs`.
            stored: Its bytes in the file, uint8 (bytes,).
        """

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

    def needs_bias(self) -> bool:
        """Tell whether the plain layer needs a bias for this unit."""
        return False


class StreamRule(NamedTuple):
    """What the attention of a block does with the rows of a stream."""

    seen: bool = False
    """Whether the tokens attend to them: they are keys and values, on Swin in every window of their image."""
    reads: bool = True
    """Whether they attend to the tokens and to rows that are seen. Rows that are seen and do not read end behind the
    block; rows that neither are seen nor read pass by the attention unchanged."""


class Stream:
    """A named stream of rows beside the tokens: how it starts, what a block does with it, and what leaves the model.

    Its rows pass the norms, layer scales and MLPs of the blocks like tokens. Subclass it and give it from
    `Unit.streams`; a stream may also start inside a block, from a `BranchUnit`.
    """

    name: str
    """Its name in the bundle of all streams."""
    shapes: tuple[tuple[int, int], ...] = ()
    """Rows and width of each tensor that is kept for the classifier, in the order of the blocks; empty for none."""

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Give the rows that enter a block.

        Args:
            block: Index of the block.
            present: The rows that left the block before, if any.
            tokens: The tokens that enter the block, (B, N, D) or a map (B, H, W, D).

        Returns:
            Rows (B, R, width of the block) or a map, or None for none.
        """
        return present

    def merge(self, merging: nn.Module, rows: Tensor) -> Tensor:
        """Take the rows through patch merging: a map as it is, and each row as a map of four equal pixels.

        Rows are repeated four times in the public code of VPT (KMnP/vpt).

        Args:
            merging: timm's module, which takes (B, H, W, D).
            rows: (B, R, D), or a map (B, H, W, D).
        """
        if rows.ndim == 4:
            merged: Tensor = merging(rows)
            return merged
        pixels = rows.reshape(-1, 1, 1, rows.shape[-1]).expand(-1, 2, 2, -1)
        return merging(pixels)[:, 0, 0].unflatten(0, rows.shape[:2])

    def rule(self, block: int) -> StreamRule:
        """Say what the attention of a block does with the rows.

        Args:
            block: Index of the block.
        """
        return StreamRule()

    def keeps(self, block: int) -> bool:
        """Tell whether the rows that leave a block are kept in the result of the run.

        Args:
            block: Index of the block.
        """
        return False

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Compute the features that enter the classifier.

        Args:
            pooled: The features so far (B, width).
            kept: The tensors named by `shapes`, with the batch in front.

        Returns:
            (B, features).
        """
        return pooled


class StreamUnit(Unit):
    """Passes rows of its own through the blocks, by the streams it gives."""

    kind = "stream"


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
        """Have nothing to start."""


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


class SharedUnit(Unit):
    """Tensors that several units of one adapter use; they get at them by `Unit.borrow`."""

    kind = "shared"


class WeightUnit(Unit):
    """A change of a linear layer's weight as a whole, by `Unit.fold_weight`; it knows which rows it changes.

    It is carried by the weight itself, so that the gradient of the whole weight is computed on the way: as dear as full
    fine-tuning of that layer. Low-rank terms are better off as a `DeltaUnit`.
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
    """Row behind the last one."""
    dropout: Dropout = Dropout()
    """What is dropped while training."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give A (rank, in) and B (rows, rank)."""
        raise NotImplementedError

    def branches(self) -> list[Branch]:
        """Give the term as it is computed now, in one piece or several."""
        return [Branch(*self.factors(), self.scale, self.start, self.stop, self.dropped())]

    def dropped(self) -> Dropout:
        """Give what is dropped now: nothing unless the unit trains."""
        return self.dropout if self.training else Dropout()

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
    """A linear map of what enters a linear layer: ``x' = M x + m``."""

    kind = "input"

    def transform_input(self, x: Tensor) -> Tensor:
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

    def needs_bias(self) -> bool:
        """Tell that a bias is needed."""
        return True


class SequentialUnit(Unit):
    """A change of what a linear layer gives, computed from that."""

    kind = "sequential"

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute what leaves instead.

        Args:
            x: What entered the layer, (..., in).
            y: What it gives, (..., out).

        Returns:
            The shape of `y`.
        """
        raise NotImplementedError

    def needs_bias(self) -> bool:
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

    def needs_bias(self) -> bool:
        """Tell that a bias is needed."""
        return True


class BranchUnit(Unit):
    """Gives streams behind a linear layer, such as one per task, beside the layer's shared output.

    The residual stream of a stream that starts here is a copy of the tokens. The block of the layer runs its branches
    with all streams.
    """

    kind = "branch"

    def branches(self, x: Tensor, beside: Mapping[str, Tensor], frozen: Tensor, shared: Tensor) -> dict[str, Tensor]:
        """Compute the streams that leave the layer.

        Args:
            x: The shared input (..., in).
            beside: The inputs of streams that entered the layer, by name, each (..., in).
            frozen: The product of the frozen layer with `x`, its bias included, (..., out).
            shared: The layer's shared output, (..., out).

        Returns:
            Outputs (..., out) by the name of the stream.
        """
        raise NotImplementedError


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


class PrefixUnit(Unit):
    """Keys and values of an adapter's own, in front of those of the tokens of an attention."""

    kind = "prefix"
    identity_at_start = False

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Give keys and values, (length, heads * width of a head) each; a key is not normalised further."""
        raise NotImplementedError


class QueryUnit(Unit):
    """Queries of an adapter's own, which read the tokens of the blocks and which nothing sees."""

    kind = "queries"
    identity_at_start = False

    length: int
    """Number of queries of each block."""
    blocks: tuple[int, ...]
    """The blocks that are read."""
    widths: tuple[int, ...]
    """Their widths."""
    detach_hidden: bool
    """Whether the backbone runs without gradients."""

    def streams(self) -> Sequence[Stream]:
        """Pass the queries through the blocks."""
        return (QueryStream(self),)

    def change_tokens(self, tokens: Tensor) -> Tensor:
        """Change what enters the first block while training, if the method asks for it."""
        return tokens

    def queries(self, block: int, batch: int) -> Tensor | None:
        """Give the queries of a block.

        Args:
            block: Index of the block.
            batch: Number of images.

        Returns:
            (batch, length, width of the block), or None where the block is not read.
        """
        raise NotImplementedError

    def features(self, pooled: Tensor, reads: Sequence[Tensor]) -> Tensor:
        """Compute what enters the classifier.

        Args:
            pooled: The backbone's own feature (batch, width).
            reads: What left at the queries of each block that is read, (batch, length, width of the block).

        Returns:
            (batch, features).
        """
        raise NotImplementedError


class QueryStream(Stream):
    """The stream of a unit's queries: new rows in each block that is read, and the rows that leave it are kept."""

    name = "queries"

    def __init__(self, unit: QueryUnit) -> None:
        """Make the stream.

        Args:
            unit: The queries.
        """
        self.unit = unit
        self.shapes = tuple((unit.length, width) for width in unit.widths)

    def enter(self, block: int, present: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Give the block's queries."""
        return self.unit.queries(block, tokens.shape[0])

    def keeps(self, block: int) -> bool:
        """Keep the rows of each block that is read."""
        return block in self.unit.blocks

    def features(self, pooled: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Compute the features that enter the classifier."""
        return self.unit.features(pooled, kept)


class TokensUnit(Unit):
    """Learned tokens in the sequence; the family's own forward puts them there."""

    kind = "tokens"
    identity_at_start = False

    length: int
    """Number of tokens."""
    pool: str
    """The rows that average pooling sees: ``all``, ``patches`` or ``prompts``."""

    def makes_streams(self, layout: str) -> bool:
        """Tell that tokens of a map are a stream: they stand in its windows."""
        return layout == "NHWC"

    def tokens(self, block: int, batch: int) -> Tensor | None:
        """Give the tokens that enter a block.

        Args:
            block: Index of the block.
            batch: Number of images.

        Returns:
            (batch, length, width), or None where those that came out of the block before go on; a length of 0 removes
            them.
        """
        raise NotImplementedError

    def replaces(self, block: int) -> bool:
        """Tell whether tokens of its own enter a block, in place of those that came out of the block before.

        Args:
            block: Index of the block.
        """
        return False


class SideUnit(Unit):
    """A network beside the backbone, which reads what leaves its blocks and gives what leaves the model."""

    kind = "side"
    identity_at_start = False

    reads: frozenset[int]
    """The blocks whose outputs it reads; what enters the first one it always reads, as block -1."""
    depth: int
    """Number of blocks of the backbone."""
    detach_hidden: bool
    """Whether the backbone runs without gradients."""

    def climb(self, hidden: Mapping[int, Tensor], depth: int, checkpoints: bool) -> list[Tensor]:
        """Run the network.

        Args:
            hidden: What leaves each block it reads, by block.
            depth: Number of blocks of the backbone that were run.
            checkpoints: Whether to compute its blocks again in the backward pass instead of keeping what they need.

        Returns:
            Its state behind each of these blocks.
        """
        raise NotImplementedError

    def project_out(self, state: Tensor) -> Tensor:
        """Bring a state of the last stage to the backbone's width.

        Args:
            state: One of what `climb` gave.

        Returns:
            The shape of what leaves the backbone's last block.
        """
        raise NotImplementedError

    def stage_map(self, stage: int, state: Tensor) -> Tensor | None:
        """Bring the state behind an earlier stage to the backbone's width.

        Args:
            stage: Index of the stage.
            state: The state behind its last block.

        Returns:
            The shape of what leaves the stage, or None where the backbone's own map stands.
        """
        raise NotImplementedError

    def resize_with(self, blocks: Sequence[nn.Module]) -> None:
        """Take over what a change of the image size has changed in the backbone's blocks.

        Args:
            blocks: All of them.
        """
