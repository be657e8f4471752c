"""TriAdapt: low-rank terms with a core whose ranks grow where it changes most (TriAdaptLoRA, arXiv 2501.08008).

The paper's code was read in a fork of peft; three of its choices are changed here, each for a reason stated below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import numpy
import torch
from torch import Generator, Tensor, nn

from vispeft.adapters.schedules import Schedule, as_callback
from vispeft.core.fields import DropPath, check_factor, check_share, check_whole
from vispeft.core.low_rank import Dropout
from vispeft.core.method import Method, PlanItem, Step, register
from vispeft.core.recipes import FGVC, VTAB, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import DeltaUnit
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.storage.codecs import Codec, register_codec

__all__ = ["TriAdapt", "TriAdaptUnit", "ranks_of"]

STD = 0.02
"""Standard deviation of new rows of A and columns of B (public code)."""


class Leading(Codec):
    """The leading block of a tensor outside of which all entries are zero: what has grown of it.

    Bytes: the block's size along each axis as uint32, then its entries in row-major order.
    """

    name = "leading"

    def encode(self, values: Tensor) -> Tensor:
        """Encode a tensor; entries that are zero with a sign count as zero."""
        held = values.detach().cpu()
        found = held.nonzero()
        ends = (found.amax(0) + 1).tolist() if len(found) else [0] * held.ndim
        block = held[tuple(slice(end) for end in ends)].contiguous()
        head = torch.from_numpy(numpy.array(ends, "<u4").view(numpy.uint8).copy())
        return torch.cat([head, block.reshape(-1).view(torch.uint8)])

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Restore the block among zeros."""
        values, head = torch.zeros(shape, dtype=dtype), 4 * len(shape)
        ends = [int(end) for end in stored[:head].cpu().numpy().copy().view("<u4")] if len(stored) >= head else []
        fits = len(ends) == len(shape) and all(end <= size for end, size in zip(ends, shape, strict=True))
        if not fits or len(stored) != head + prod(ends) * values.element_size():
            raise FileError(f"{len(stored)} bytes are no leading block of a tensor of shape {shape}.")
        values[tuple(slice(end) for end in ends)] = stored[head:].cpu().clone().view(dtype).reshape(ends)
        return values


register_codec(Leading())


@dataclass(frozen=True)
class _Shape:
    """Configuration of the terms."""

    most: int
    """Rank that is allocated."""
    grows: int
    """Ranks of a step of growth, and at the start."""
    scale: float
    dropout: float


class TriAdaptUnit(DeltaUnit):
    """A term ``scale * B C A`` with a core C, of which a leading part is in use.

    The core of the paper is the sum of a block-lower and a block-upper triangular matrix, so that only blocks on the
    diagonal are there twice: ``C = core + blocks(diagonal)``. All tensors are allocated for the highest rank. What is
    not in use is zero in all of them, and so is its gradient, whatever the optimiser: no mask is needed.
    """

    rank: Tensor
    """Rank in use, int64 scalar."""
    last: Tensor
    """Importance when ranks last grew, float32 scalar."""
    seed: Tensor
    """Seed of the rows and columns to come, int64 scalar: all processes, and a resumed training, draw the same."""

    def __init__(self, site: Site, shape: _Shape) -> None:
        """Allocate the tensors.

        Args:
            site: The linear layer, or a slice of one.
            shape: The configuration.
        """
        super().__init__()
        self.most, self.grows, self.scale, self.dropout = shape.most, shape.grows, shape.scale, Dropout(shape.dropout)
        self.start, self.stop = site.span
        self.A = nn.Parameter(torch.empty(shape.most, site.in_features))
        self.B = nn.Parameter(torch.empty(site.out_features, shape.most))
        self.core = nn.Parameter(torch.empty(shape.most, shape.most))
        self.diagonal = nn.Parameter(torch.empty(shape.most // shape.grows, shape.grows, shape.grows))
        for name, dtype in (("rank", torch.int64), ("last", torch.float32), ("seed", torch.int64)):
            self.register_buffer(name, torch.zeros((), dtype=dtype))

    def reset(self, generator: Generator) -> None:
        """Start with the ranks of one step: A and B normal, the core at zero.

        With two factors of three at zero, as in the public code, no gradient is ever other than zero.
        """
        for tensor in (self.A, self.B, self.core, self.diagonal, self.rank, self.last):
            tensor.zero_()
        self.seed.copy_(torch.randint(2**31, (), generator=generator))
        self.grow()

    @torch.no_grad()
    def grow(self) -> None:
        """Take further ranks into use; the model's function stays as it is, since their part of the core is zero."""
        rank = int(self.rank)
        generator = torch.Generator().manual_seed(int(self.seed) + rank)
        for rows in (self.A[rank : rank + self.grows], self.B[:, rank : rank + self.grows]):
            rows.copy_(torch.empty(rows.shape).normal_(0, STD, generator=generator))
        self.rank += self.grows

    def whole_core(self) -> Tensor:
        """Compute C, (most, most)."""
        same = torch.eye(len(self.diagonal), dtype=self.core.dtype, device=self.core.device)
        blocks = self.diagonal[:, :, None] * same[:, None, :, None]
        return self.core + blocks.reshape(self.core.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (most, in) and B C (rows, most)."""
        return self.A, self.B @ self.whole_core()

    def importance(self) -> Tensor:
        """Compute the norm of the core by the number of its steps, a scalar."""
        return torch.linalg.matrix_norm(self.whole_core().detach().float()) / (int(self.rank) / self.grows)

    def penalty(self) -> Tensor:
        """Compute how far the rows of A and the columns of B in use are from orthogonal and of length one, a scalar."""
        rank = int(self.rank)
        same = torch.eye(rank, dtype=self.A.dtype, device=self.A.device)
        products = (self.A[:rank] @ self.A[:rank].t(), self.B[:, :rank].t() @ self.B[:, :rank])
        return torch.stack([(product - same).square().sum() for product in products]).sum()

    def codecs(self) -> dict[str, str]:
        """Store what is in use alone."""
        return dict.fromkeys(("A", "B", "core", "diagonal"), Leading.name)


@register
@dataclass(frozen=True, kw_only=True)
class TriAdapt(DropPath, Method):
    """Low-rank terms ``scale * B C A`` that start small; those whose cores change most get further ranks.

    Every few steps the layers whose core grew most in norm since the last time get ``step`` more ranks, until the mean
    rank is `rank`: the same budget as a LoRA of this rank, spent where it is used. Ranks grow while a task trains; a
    loop without callbacks keeps those of the start. Tensors are allocated for `most` ranks; a file holds those in use.
    Other than the public code it divides alpha by the final rank, so that growth does not change the model, and starts
    A and B at random and the core alone at zero, where the public code also has B at zero and never moves.
    """

    rank: int = 8
    """Mean rank at the end."""
    step: int | None = None
    """Ranks at the start and in a step of growth; None for half of `rank`, or 1."""
    most: int | None = None
    """Highest rank of a layer; None for twice `rank`."""
    alpha: float = 8.0
    """Numerator of the multiplier, over `rank`."""
    warmup: float = 0.1
    """Share of the steps before the first growth."""
    interval: int = 10
    """Steps between growths."""
    pace: Literal["linear", "exponential"] = "linear"
    """How many layers grow at once: the missing ranks times the share of the steps that are done, or the missing ranks
    to the power of this share."""
    orthogonal: float = 0.0
    """Weight of the penalty ``|A A^T - I|^2 + |B^T B - I|^2`` of the ranks in use in the loss; 0.5 in the public
    code."""
    dropout: float = 0.0
    """Fraction of channels dropped during training, at the input."""

    name: ClassVar[str] = "triadapt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.08008"
    recipes: ClassVar[tuple[Recipe, ...]] = (VTAB.sized(rank=8), FGVC.sized(rank=8))
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    training_fields: ClassVar[frozenset[str]] = frozenset({"warmup", "interval", "pace", "orthogonal", "dropout"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank", "step", "most", "interval")
        check_factor(self, "alpha")
        check_share(self, "warmup", "dropout")
        for field, value in (("step", max(1, self.rank // 2)), ("most", 2 * self.rank)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        if self.rank % self._step or self._most % self._step or self._most < self.rank:
            raise ConfigError(
                f"TriAdapt(rank={self.rank}, step={self.step}, most={self.most}): ranks grow in steps up to the "
                "highest one. Take a step that divides both, and a highest rank of at least the mean one."
            )
        if not (math.isfinite(self.orthogonal) and self.orthogonal >= 0):
            raise ConfigError(f"TriAdapt(orthogonal={self.orthogonal}): a weight of at least 0 is needed.")

    @property
    def _step(self) -> int:
        return self.step or 1

    @property
    def _most(self) -> int:
        return self.most or self.rank

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one term at each site."""
        shape = _Shape(self._most, self._step, self.alpha / self.rank, self.dropout)
        for site in self.sites(view):
            if site.kind != "linear" or site.role == "head":
                raise SiteError(f"TriAdapt acts on linear layers of the backbone; {site.role!r} is none.")
            if self._most > min(site.out_features, site.in_features):
                raise SiteError(
                    f"TriAdapt(rank={self.rank}, most={self.most}): {site.key} has a weight of {site.out_features} x "
                    f"{site.in_features}, whose rank is lower. Take a lower one."
                )
            yield PlanItem(site, "triadapt", partial(TriAdaptUnit, site, shape))

    def parameter_count(self, view: View) -> int:
        """Count ``m (in + out) + m^2 + m g`` per site: allocated for the highest rank m, in steps of g ranks.

        In use of them are ``r (in + out) + r^2 + r g`` at rank r, which the public code bounds by
        ``r (in + out) + 2 r^2``.
        """
        most = self._most
        return sum(most * (s.in_features + s.out_features + most + self._step) for s in self.sites(view))

    def loss_term(self, bank: Any, name: str, step: Step) -> Tensor | None:
        """Return the penalty of A and B, if it has a weight."""
        units = [unit for unit in bank.units(name).values() if isinstance(unit, TriAdaptUnit)]
        return self.orthogonal * torch.stack([unit.penalty() for unit in units]).sum() if self.orthogonal else None

    def callbacks(self) -> list[Any]:
        """Create the schedule of the ranks."""
        return [as_callback(_Growth(self), f"triadapt:{self.rank}:{self.step}:{self.roles}:{self.blocks}")]

    def growing(self, ranks: list[int], gains: list[float], progress: float) -> list[int]:
        """Choose the layers that grow next.

        Args:
            ranks: Present ranks by layer.
            gains: How much the importance of each layer grew since the last time.
            progress: Share of the steps after the warm-up that are done.

        Returns:
            Indices of the layers, those with the largest gains, so that the mean rank stays at most `rank`.
        """
        missing = self.rank * len(ranks) - sum(ranks)
        if missing < self._step:
            return []
        number = missing * progress if self.pace == "linear" else missing**progress
        free = [index for index, rank in enumerate(ranks) if rank + self._step <= self._most]
        free.sort(key=lambda index: -gains[index])
        return free[: min(max(1, int(number)), missing // self._step)]


class _Growth(Schedule):
    """The schedule of the ranks in a task's training."""

    def __init__(self, method: TriAdapt) -> None:
        """Store the configuration.

        Args:
            method: The configuration.
        """
        self.method, self.followed = method, 0

    def begin(self, task: Any, trainer: Any) -> None:
        """Refuse trainings without an end, and averages over steps."""
        if math.isinf(trainer.estimated_stepping_batches):
            raise ConfigError(
                "TriAdapt grows by the share of the steps that are done, and this training has no end. Give max_epochs "
                "or max_steps."
            )
        averaging = {type(o).__name__: "Take another optimizer" for o in trainer.optimizers if hasattr(o, "eval")}
        averaging |= {} if task.ema is None else {"ema": "Leave it out"}
        if averaging:
            name, advice = next(iter(averaging.items()))
            raise ConfigError(
                f"TriAdapt gives new ranks values of their own while it trains, and {name} averages over all steps, in "
                f"which they were zero. {advice}."
            )

    def before(self, task: Any, trainer: Any) -> None:
        """Let ranks grow, once every `interval` steps after the warm-up."""
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        first = math.ceil(self.method.warmup * total)
        if step <= max(first, self.followed) or (step - first) % self.method.interval:
            return
        self.followed = step  # not again while gradients of this step are summed
        for name in task.bank.names:
            if task.bank.plan(name).method == self.method and name not in task.bank.frozen:
                units = [unit for unit in task.bank.units(name).values() if isinstance(unit, TriAdaptUnit)]
                self._grow(units, (step - first) / max(1, total - first))

    def _grow(self, units: list[TriAdaptUnit], progress: float) -> None:
        found = torch.stack([unit.importance() for unit in units])
        gains = (found - torch.stack([unit.last for unit in units])).tolist()
        for index in self.method.growing([int(unit.rank) for unit in units], gains, progress):
            units[index].grow()
        for unit, importance in zip(units, found, strict=True):
            unit.last.copy_(importance)

    def state(self) -> dict[str, Any]:
        """Return the last step at which ranks grew; ranks and importances are in the units."""
        return {"followed": self.followed}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """
        self.followed = state["followed"]


def ranks_of(bank: Any, name: str | None = None) -> dict[str, int]:
    """List the ranks that are in use.

    Args:
        bank: The bank of the model.
        name: The adapter, a TriAdapt; may be None if only one acts.

    Returns:
        Ranks by the key of the unit.
    """
    return {key: int(unit.rank) for key, unit in bank.units(name).items() if isinstance(unit, TriAdaptUnit)}
