"""PST: pruning of the backbone while it is adapted (Li et al., IJCAI 2022, arXiv 2205.11005; yuchaoli/PST c13f686)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from vispeft.adapters.schedules import Schedule, as_callback
from vispeft.core.fields import DropPath, check_factor, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import WeightUnit, with_rows
from vispeft.errors import ConfigError, SiteError
from vispeft.storage.codecs import Rice

__all__ = ["PST", "PSTUnit", "sparse_size", "sparsity_at"]

WARMUP, COOLDOWN = 0.1, 0.3
"""Shares of the steps before pruning begins and after it ends (public code)."""
TRIAL = Recipe(
    lr=1e-3,
    weight_decay=0.0,
    source="a first try for images, of the order of LoRA's. Language models: start normal, sparsity 0.9, all tensors "
    "at 3e-5 (BERT) or 5e-5 (RoBERTa) (yuchaoli/PST c13f686)",
    fields={"sparsity": 0.5, "start": "kaiming"},
)


def sparsity_at(step: int, total: int, final: float, initial: float = 0.0) -> float:
    """Compute the share of weights that are removed after a number of steps (cubic, Zhu and Gupta, arXiv 1710.01878).

    Args:
        step: Completed steps.
        total: Steps of the training.
        final: Share at the end.
        initial: Share at the start.
    """
    return cubic(step, total, (initial, final), (WARMUP, COOLDOWN))


def cubic(step: int, total: int, ends: tuple[float, float], shares: tuple[float, float]) -> float:
    """Compute `sparsity_at` for any warm-up and cool-down.

    Args:
        step: Completed steps.
        total: Steps of the training.
        ends: Sparsity at the start and at the end.
        shares: Shares of the steps of warm-up and cool-down.
    """
    (initial, final), (before, behind) = ends, shares
    if step <= before * total:
        return initial
    if step > total - behind * total:
        return final
    done = (step - before * total) / (total - (before + behind) * total)
    return final + (initial - final) * (1 - done) ** 3


@dataclass(frozen=True)
class _Shape:
    """Configuration of the terms."""

    rank: int
    mask_rank: int
    scales: tuple[float, float, float]
    """Multipliers of U V, of A B and of R + C."""
    start: str


class PSTUnit(WeightUnit):
    """A changed weight with a mask: ``W' = [S is not among the lowest] * V``, ``V = W + beta U V``.

    The scores are ``S = |V| + a1 A B + a2 (R + C)``; their gradient is that of the mask (straight-through).
    """

    pruned: Tensor
    """Number of weights that are removed, int64 scalar; the schedule sets it."""

    def __init__(self, site: Site, shape: _Shape) -> None:
        """Allocate the tensors.

        Args:
            site: The linear layer, or a slice of one.
            shape: The configuration.
        """
        super().__init__()
        rows, columns = site.out_features, site.in_features
        self.shape, self.size = shape, rows * columns
        self.start, self.stop = site.span
        self.U = nn.Parameter(torch.empty(rows, shape.rank))
        self.V = nn.Parameter(torch.empty(shape.rank, columns))
        self.A = nn.Parameter(torch.empty(rows, shape.mask_rank))
        self.B = nn.Parameter(torch.empty(shape.mask_rank, columns))
        self.R = nn.Parameter(torch.empty(rows))
        self.C = nn.Parameter(torch.empty(columns))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.int64))

    def reset(self, generator: Generator) -> None:
        """Start U and A normal, or as PyTorch's linear layer (Kaiming-uniform), and all others at zero."""
        for tensor in (self.U, self.A):
            if self.shape.start == "normal":
                tensor.normal_(0, 1, generator=generator)
            else:
                bound = 1 / math.sqrt(self.V.shape[1])
                tensor.uniform_(-bound, bound, generator=generator)
        for tensor in (self.V, self.B, self.R, self.C):
            tensor.zero_()
        self.pruned.zero_()

    def changed(self, rows: Tensor) -> Tensor:
        """Compute the changed weight before the mask, (rows, columns)."""
        return rows + self.shape.scales[0] * (self.U.to(rows.dtype) @ self.V.to(rows.dtype))

    def scores(self, changed: Tensor) -> Tensor:
        """Compute the scores, (rows, columns)."""
        _, low, sums = self.shape.scales
        dtype = changed.dtype
        both = self.R.to(dtype)[:, None] + self.C.to(dtype)
        return changed.abs() + low * (self.A.to(dtype) @ self.B.to(dtype)) + sums * both

    def mask(self, scores: Tensor) -> Tensor:
        """Compute the mask, bool (rows, columns): all but the lowest scores."""
        order = scores.detach().flatten().sort().values
        least = order.gather(0, self.pruned.clamp(max=self.size - 1).view(1))
        return scores.detach() >= least

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Change and prune the rows of (out, in)."""
        dtype = torch.promote_types(weight.dtype, self.U.dtype)
        changed = self.changed(weight[self.start : self.stop].to(dtype))
        scores = self.scores(changed)
        # The difference is zero, and its gradient is that of the mask.
        rows = changed * (self.mask(scores).to(dtype) + (scores - scores.detach()))
        return with_rows(weight, self.start, rows)


@register
@dataclass(frozen=True, kw_only=True)
class PST(DropPath, Method):
    """The backbone is pruned while a low-rank term adapts it; the masks train by low-rank scores.

    The only method here that makes the backbone's weights sparse. The share of zeros grows while training, from none in
    the first tenth of the steps to all in the last three tenths; a loop without callbacks prunes nothing. A merged
    model has zeros in matrices of full size: it is faster only with kernels for sparse matrices, and smaller only if it
    is stored as such (`sparse_size`). Scores are sorted in every pass, which takes time.
    """

    sparsity: float = 0.9
    """Share of each weight that is removed at the end (0.9 in the paper, for language models)."""
    rank: int = 8
    """Rank of the change of the weight."""
    mask_rank: int = 8
    """Rank of the scores."""
    beta: float = 1.0
    """Multiplier of the change."""
    alpha_low: float = 1.0
    """Multiplier of the low-rank scores."""
    alpha_sums: float = 1.0
    """Multiplier of the scores of rows and columns."""
    start: Literal["normal", "kaiming"] = "normal"
    """Start of the first factors: of unit variance, for learning rates near 5e-5, or as LoRA's, for those near 1e-3."""

    name: ClassVar[str] = "pst"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.11005"
    recipes: ClassVar[tuple[Recipe, ...]] = (TRIAL,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "rank", "mask_rank")
        check_share(self, "sparsity")
        check_factor(self, "beta", "alpha_low", "alpha_sums")

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each site."""
        shape = _Shape(self.rank, self.mask_rank, (self.beta, self.alpha_low, self.alpha_sums), self.start)
        for site in self.sites(view):
            if site.kind != "linear" or site.role == "head":
                raise SiteError(f"PST prunes linear layers of the backbone; {site.role!r} is none.")
            if max(self.rank, self.mask_rank) > min(site.out_features, site.in_features):
                raise SiteError(
                    f"PST(rank={self.rank}, mask_rank={self.mask_rank}): {site.key} has a weight of "
                    f"{site.out_features} x {site.in_features}, whose rank is lower. Take a lower one."
                )
            yield PlanItem(site, "pst", partial(PSTUnit, site, shape))

    def parameter_count(self, view: View) -> int:
        """Count ``(rank + mask_rank + 1) (in + out)`` per site."""
        return sum((self.rank + self.mask_rank + 1) * (s.in_features + s.out_features) for s in self.sites(view))

    def callbacks(self) -> list[Any]:
        """Create the schedule of the sparsity."""
        return [as_callback(_Pruning(self), f"pst:{self.sparsity}:{self.roles}:{self.blocks}")]


class _Pruning(Schedule):
    """The schedule of the sparsity in a task's training."""

    def __init__(self, method: PST) -> None:
        """Store the configuration.

        Args:
            method: The configuration.
        """
        self.method = method

    def begin(self, task: Any, trainer: Any) -> None:
        """Refuse trainings without an end."""
        if math.isinf(trainer.estimated_stepping_batches):
            raise ConfigError(
                "PST prunes by the share of the steps that are done, and this training has no end. Give max_epochs or "
                "max_steps."
            )

    def before(self, task: Any, trainer: Any) -> None:
        """Set the number of removed weights for the next step."""
        share = sparsity_at(trainer.global_step, int(trainer.estimated_stepping_batches), self.method.sparsity)
        for name in task.bank.names:
            if task.bank.plan(name).method == self.method and name not in task.bank.frozen:
                for unit in task.bank.units(name).values():
                    unit.pruned.fill_(int(share * unit.size))


def sparse_size(model: nn.Module) -> tuple[int, int]:
    """Measure a pruned, merged model as it would be stored by its nonzero weights.

    Args:
        model: A plain model, such as after `merge`.

    Returns:
        The number of its weights that are not zero, and the bytes of their values and places; tensors of which less
        than a quarter is zero count in full.
    """
    kept, size = 0, 0
    for tensor in model.parameters():
        places = tensor.detach().flatten().nonzero().flatten()
        kept += len(places)
        dense = len(places) > 0.75 * tensor.numel()
        size += tensor.nbytes if dense else len(places) * tensor.element_size() + Rice().encode(places).nbytes
    return kept, size
