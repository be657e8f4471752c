"""Sparse changes of frozen weights: a few entries of each matrix train (SHiRA, APET, LIFT, SFT).

Supports (which entries): ``random`` (SHiRA, arXiv 2406.13175; APET, arXiv 2306.02320), ``magnitude`` and ``gradient``
(SHiRA), ``lift`` (LIFT, arXiv 2506.00772), ``given`` (read from a file). Schedules: ``fixed`` and ``rigl`` (SFT, see
`vispeft.methods.sparse_schedules`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, nn

from vispeft.adapters.schedules import Schedule, as_callback
from vispeft.core.fields import DropPath, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import WeightUnit, with_rows
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.methods.sparse_schedules import SM3, DropAndRegrow, check_optimizer
from vispeft.methods.svfit import decompose

__all__ = ["Sparse", "SparseUnit", "largest_entries", "principal_weights"]

Support = Literal["random", "magnitude", "gradient", "lift", "given"]
TOY = Recipe(
    lr=1e-2,
    weight_decay=0.0,
    source="chosen by validation among 1e-3, 3e-3 and 1e-2 on a toy, for random entries and for lift "
    "(benchmarks/toy_deltas.py)",
)


def largest_entries(scores: Tensor, count: int) -> Tensor:
    """Find the largest entries of a matrix.

    Args:
        scores: Of any shape.
        count: Number of entries.

    Returns:
        Their positions in row-major order, int64 (count,), rising.
    """
    return scores.flatten().topk(count, sorted=False).indices.sort().values


def principal_weights(weight: Tensor, rank: int, place: str = "this layer") -> Tensor:
    """Compute the magnitudes of a weight's approximation of low rank, by which LIFT chooses.

    Args:
        weight: (out, ...).
        rank: Rank of the approximation.
        place: Where the weight is, for messages.

    Returns:
        (out, columns), in double precision.
    """
    u, s, v = decompose(weight, place)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).abs()


class _Seen(torch.autograd.Function):
    """A weight whose gradient is shown to an observer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, observer: Callable[[Tensor], None]) -> Tensor:
        ctx.observer = observer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.observer(grad.detach())
        return grad, None


class SparseUnit(WeightUnit):
    """Values that are added to some entries of a weight."""

    positions: Tensor
    """The entries, int32 (count,), in the rows of the site in row-major order; each at most once."""
    observer: Callable[[Tensor], None] | None = None
    """What is shown the gradient of the whole weight (rows, columns) in backward passes; not saved."""

    def __init__(self, site: Site, count: int, support: Support, rank: int) -> None:
        """Allocate the values, (count,).

        Args:
            site: The layer, or a slice of one.
            count: Number of entries.
            support: How they are chosen.
            rank: Rank of the approximation, for ``lift``.
        """
        super().__init__()
        self.site, self.support, self.rank, self.given = site, support, rank, False
        self.start, self.stop = site.span
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("positions", torch.empty(count, dtype=torch.int32))

    def prepare(self, weight: Tensor) -> None:
        """Choose the entries that the frozen weight decides."""
        if self.support == "magnitude":
            self.positions.copy_(largest_entries(weight.flatten(1).abs(), len(self.values)))
        elif self.support == "lift":
            scores = principal_weights(weight, self.rank, self.site.key)
            self.positions.copy_(largest_entries(scores, len(self.values)))

    def reset(self, generator: Generator) -> None:
        """Start at zero; draw the entries that nothing else decides.

        Raises:
            ConfigError: If they should be given and are not.
        """
        self.values.zero_()
        if self.support == "given" and not self.given:
            raise ConfigError(
                "Sparse(support='given') needs source, a safetensors file with the entries of each layer, unless the "
                "adapter is loaded from a file."
            )
        if self.support in ("random", "gradient"):
            size = self.site.out_features * self.site.columns
            drawn = torch.randperm(size, generator=generator)[: len(self.values)]
            self.positions.copy_(drawn.sort().values)

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Add the values to the rows of (out, columns)."""
        dtype = torch.promote_types(weight.dtype, self.values.dtype)
        rows = weight[self.start : self.stop].to(dtype)
        changed = rows.reshape(-1).index_add(0, self.positions, self.values.to(dtype)).view(rows.shape)
        if self.observer is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            changed = cast(Tensor, _Seen.apply(changed, self.observer))
        return with_rows(weight, self.start, changed)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return values and entries in rising order of the entries."""
        order = self.positions.argsort()
        return {"values": self.values.detach()[order], "positions": self.positions[order]}

    def codecs(self) -> Mapping[str, str]:
        """Store the gaps between entries."""
        return {"positions": "rice"}

    def keep_encoded(self, name: str, stored: Tensor) -> None:
        """Check the entries that were just loaded; encoding them again gives the same bytes."""
        size = self.site.out_features * self.site.columns
        if len(self.positions) and not 0 <= int(self.positions.min()) <= int(self.positions.max()) < size:
            raise FileError(
                f"{self.site.key}: entry {int(self.positions.max())} is to change, and the weight has {size:,}."
            )


@register
@dataclass(frozen=True, kw_only=True)
class Sparse(DropPath, Method):
    """A few entries of each weight train; the file holds their changes and their places.

    The budget is a number of entries (int), a share of each weight (float), ``"lora:R"`` (as many per layer as LoRA of
    rank R trains) or ``"bitfit"`` (as many as the weights' layers have biases). Random entries are the control that a
    choice must beat; on a toy of digits none was better beyond noise. The gradient of the whole weight is computed in
    each step, so it saves parameters and bytes of files, not activations.
    """

    budget: int | float | str = "lora:4"
    """Number of entries in all layers, share of the entries of each, ``"lora:R"`` or ``"bitfit"``."""
    support: Support = "random"
    """The entries: drawn (``random``), largest in the frozen weight (``magnitude``), in its approximation of low rank
    (``lift``), in the gradient of the loss over the training images (``gradient``), or read from a file (``given``)."""
    source: str | None = None
    """For ``given``: a safetensors file with the entries of each layer, whole numbers in row-major order by the layer's
    path."""
    schedule: Literal["fixed", "rigl"] = "fixed"
    """Whether the entries stay (``fixed``), or go and come while training (``rigl``, SFT's drop and regrow)."""
    interval: int = 20
    """For ``rigl``: steps between two replacements (public code)."""
    accumulate: int = 5
    """For ``rigl``: steps before a replacement whose gradients choose (public code)."""
    regrow: float = 0.2
    """For ``rigl``: share that is replaced, falling to zero over the training; the first time, all that can be."""
    policy: Literal["linear", "cosine"] = "linear"
    """For ``rigl``: how the share falls."""
    principal: int = 8
    """For ``lift``: rank of the approximation; 32 to 64 for language models, far below the budget's rank."""

    name: ClassVar[str] = "sparse"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.13175"
    recipes: ClassVar[tuple[Recipe, ...]] = (TOY,)
    default_roles: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    training_fields: ClassVar[frozenset[str]] = frozenset(
        {"support", "source", "principal", "schedule", "interval", "accumulate", "regrow", "policy"}
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "principal", "interval", "accumulate")
        check_share(self, "regrow")
        if self.accumulate > self.interval:
            raise ConfigError(
                f"Sparse(accumulate={self.accumulate}, interval={self.interval}): gradients are summed between two "
                "replacements. Take at most the interval."
            )
        _parse_budget(self.budget)
        if self.source is not None and self.support != "given":
            raise ConfigError(
                f"Sparse(source={self.source!r}, support={self.support!r}): a file is read for support='given' alone."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each site."""
        sites = self._sites(view)
        given = _read_entries(self.source, sites, self.counts(sites)) if self.source is not None else {}
        for site, count in zip(sites, self.counts(sites), strict=True):
            if self.support == "lift" and self.principal > min(site.out_features, site.columns):
                raise SiteError(
                    f"Sparse(principal={self.principal}): {site.key} has {min(site.out_features, site.columns)} "
                    "singular values. Take a lower rank."
                )
            build = partial(SparseUnit, site, count, self.support, self.principal)
            yield PlanItem(site, "sparse", partial(_with_entries, build, given[site.key]) if given else build)

    def _sites(self, view: View) -> list[Site]:
        sites = self.sites(view)
        for site in sites:
            if site.kind not in ("linear", "conv") or site.role == "head":
                raise SiteError(f"Sparse acts on linear layers and convolutions; {site.role!r} is neither.")
        return sites

    def counts(self, sites: list[Site]) -> list[int]:
        """Split the budget.

        A number is split in proportion to the sizes of the weights, rounded down, as SFT's public code does.

        Args:
            sites: The sites.

        Returns:
            The number of entries of each.

        Raises:
            ConfigError: If there are more than the weights have.
        """
        sizes = [site.out_features * site.columns for site in sites]
        kind, amount = _parse_budget(self.budget)
        if kind == "lora":
            rank = int(amount)
            # At most all entries, as in LIFT's public code.
            return [min(rank * (s.out_features + s.columns), n) for s, n in zip(sites, sizes, strict=True)]
        total = sum(site.out_features for site in sites) if kind == "bitfit" else amount
        if kind != "share" and total > sum(sizes):
            raise ConfigError(
                f"Sparse(budget={self.budget!r}): {int(total):,} entries were asked for, and the weights have "
                f"{sum(sizes):,}. Take fewer."
            )
        share = amount if kind == "share" else total / sum(sizes)
        return [max(1, min(n, int(share * n + 1e-9))) for n in sizes]

    def parameter_count(self, view: View) -> int:
        """Count the entries: by default ``4 (in + out)`` per site."""
        return sum(self.counts(self._sites(view)))

    def file_method(self) -> Method:
        """Return the same with entries from the file: how they were chosen is no part of it."""
        return type(self)(
            roles=self.roles, blocks=self.blocks, drop_path=self.drop_path, budget=self.budget, support="given"
        )

    def callbacks(self) -> list[Any]:
        """Create the schedule."""
        rule = DropAndRegrow(self.interval, self.accumulate, self.regrow, self.policy)
        schedule = _Bound(self) if self.schedule == "fixed" else _Scheduled(self, rule)
        return [as_callback(schedule, f"sparse:{self.budget}:{self.roles}:{self.blocks}")]

    def start_from(self, bank: Any, name: str, loader: Iterable[Any]) -> None:
        """Choose the entries with the largest gradient of the loss, summed over the training images.

        Args:
            bank: The bank of the model.
            name: The adapter.
            loader: Training batches of images and class numbers, or of several 0/1 labels.
        """
        if self.support != "gradient":
            return
        units = [unit for unit in bank.units(name).values() if isinstance(unit, SparseUnit)]
        sums = dense_gradients(units, lambda: _add_gradients(bank, name, loader))
        for unit, found in zip(units, sums, strict=True):
            unit.positions.copy_(largest_entries(found.abs(), len(unit.values)))


class _Bound(Schedule):
    """Values that tell `SM3` their entries, in a task's training."""

    def __init__(self, method: Sparse) -> None:
        """Store the method.

        Args:
            method: The configuration.
        """
        self.method = method

    def _units(self, task: Any) -> list[SparseUnit]:
        names = [name for name in task.bank.names if task.bank.plan(name).method == self.method]
        units = [unit for name in names if name not in task.bank.frozen for unit in task.bank.units(name).values()]
        return [unit for unit in units if isinstance(unit, SparseUnit)]

    def begin(self, task: Any, trainer: Any) -> None:
        """Tell the optimiser which entries the values belong to."""
        for optimizer in trainer.optimizers:
            for unit in self._units(task) if isinstance(optimizer, SM3) else ():
                optimizer.bind(unit.values, unit.positions, unit.site.out_features, unit.site.columns)


class _Scheduled(_Bound):
    """Drop and regrow in a task's training."""

    def __init__(self, method: Sparse, rule: DropAndRegrow) -> None:
        """Store what is scheduled.

        Args:
            method: The configuration.
            rule: The rule.
        """
        super().__init__(method)
        self.rule = rule

    def begin(self, task: Any, trainer: Any) -> None:
        """Refuse trainings in which gradients of whole weights cannot be seen, or moments not be set."""
        optimizer, units = trainer.optimizers[0], self._units(task)
        reasons = {
            "a compiled model shows no gradients of whole weights; leave compile out": task.bank.is_compiled,
            "processes would choose other entries; train with one": trainer.world_size > 1,
            "gradients are scaled in float16; take bf16-mixed or 32-true": task.scaled,
            "an average of the values would mix those of different entries; leave ema out": task.ema is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"Sparse(schedule='rigl') cannot run here: {reason}, or schedule='fixed'.")
        check_optimizer(optimizer, [unit.values for unit in units])
        super().begin(task, trainer)

    def before(self, task: Any, trainer: Any) -> None:
        """Watch gradients where they choose."""
        self.rule.before_step(self._units(task))

    def after(self, task: Any, trainer: Any) -> None:
        """Replace entries where it is time to."""
        total = int(trainer.estimated_stepping_batches)
        self.rule.after_step(self._units(task), trainer.optimizers[0], total, trainer.accumulate_grad_batches)

    def end(self, task: Any) -> None:
        """Watch no gradients any more."""
        for unit in self._units(task):
            unit.observer = None

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return self.rule.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """
        self.rule.restore(state)


def dense_gradients(units: list[SparseUnit], run: Callable[[], None]) -> list[Tensor]:
    """Sum the gradients of whole weights over the backward passes of a function.

    Args:
        units: The units at these weights.
        run: Goes forward and backward, any number of times.

    Returns:
        The sum of each, (rows, columns).

    Raises:
        ConfigError: If there was no backward pass.
    """
    sums: list[Tensor | None] = [None] * len(units)

    def watch(index: int, grad: Tensor) -> None:
        before = sums[index]
        sums[index] = grad.clone() if before is None else before + grad

    for index, unit in enumerate(units):
        unit.observer = partial(watch, index)
    try:
        run()
    finally:
        for unit in units:
            unit.observer = None
    found = [total for total in sums if total is not None]
    if len(found) < len(units):
        raise ConfigError("Entries were to be chosen by their gradients, and there was no backward pass: no images?")
    return found


def _add_gradients(bank: Any, name: str, loader: Iterable[Any]) -> None:
    """Go forward and backward over all images; gradients of parameters are left as they were."""
    parameters = [tensor for _, tensor in bank.trainable_parameters()]
    values = [unit.values for unit in bank.units(name).values() if isinstance(unit, SparseUnit)]
    before = [tensor.grad for tensor in parameters]
    # A compiled model shows no gradients of whole weights.
    with torch.enable_grad(), bank.using(name), torch.compiler.set_stance("force_eager"):
        for images, targets in loader:
            torch.autograd.grad(_loss(bank.model(images), targets), values)
    for tensor, grad in zip(parameters, before, strict=True):
        tensor.grad = grad


def _loss(output: Tensor, targets: Any) -> Tensor:
    """Compute the loss of the usual targets: class numbers, or a row of labels or shares per image."""
    if isinstance(targets, Tensor) and output.ndim == 2:
        if targets.ndim == 1 and targets.dtype == torch.int64:
            return F.cross_entropy(output.float(), targets, reduction="sum")
        if targets.shape == output.shape and bool(((targets >= 0) & (targets <= 1)).all()):
            return F.binary_cross_entropy_with_logits(output.float(), targets.float(), reduction="sum")
    raise ConfigError(
        "Sparse(support='gradient') computes a loss of class scores before the first step, and the targets are neither "
        "class numbers nor a row of labels or shares from 0 to 1 per image, such as values of a regression. Choose "
        "another support."
    )


def _with_entries(build: Callable[[], SparseUnit], entries: Tensor) -> SparseUnit:
    """Make a unit with given entries."""
    unit = build()
    unit.given = True
    unit.positions = entries.to(device=unit.positions.device, dtype=torch.int32)
    return unit


def _parse_budget(budget: Any) -> tuple[str, float]:
    """Return the kind of a budget (``count``, ``share``, ``lora``, ``bitfit``) and its number."""
    if budget == "bitfit":
        return "bitfit", 0.0
    kind, _, rank = budget.partition(":") if isinstance(budget, str) else ("", "", "")
    if kind == "lora" and rank.isdecimal() and int(rank) > 0:
        return "lora", float(rank)
    if isinstance(budget, float) and 0 < budget < 1 and math.isfinite(budget):
        return "share", budget
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return "count", float(budget)
    raise ConfigError(
        f"Sparse(budget={budget!r}): give a whole number of entries, a share between 0 and 1, 'lora:R' with a rank R, "
        "or 'bitfit'."
    )


def _read_entries(source: str, sites: list[Site], counts: list[int]) -> dict[str, Tensor]:
    """Read the entries of each layer from a file.

    Raises:
        FileError: If the file is none, lacks a layer, or has entries that the layer does not have.
    """
    found = {}
    try:
        with safe_open(Path(source), "pt") as file:
            names = set(file.keys())
            for site in sites:
                if site.key not in names:
                    raise FileError(f"{source} has no entries for {site.key}. It has {', '.join(sorted(names)[:3])}.")
                found[site.key] = file.get_tensor(site.key).flatten()
    except (OSError, SafetensorError) as error:
        raise FileError(f"Entries were to be read from {source}, which is no safetensors file: {error}.") from error
    for site, count in zip(sites, counts, strict=True):
        entries, size = found[site.key], site.out_features * site.columns
        whole = not entries.is_floating_point() and entries.dtype != torch.bool
        if not whole or len(entries.unique()) != count or len(entries) != count:
            raise FileError(
                f"{source} has {len(entries)} entries for {site.key}; {count} different whole numbers are needed, by "
                "the budget."
            )
        if not 0 <= int(entries.min()) <= int(entries.max()) < size:
            raise FileError(f"{source} names entry {int(entries.max())} of {site.key}, whose weight has {size:,}.")
    return found
