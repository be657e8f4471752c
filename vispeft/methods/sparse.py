"""Sparse changes of frozen weights: a few entries of each matrix train (SHiRA, APET, LIFT, SFT, LT-SFT, GPS).

Supports (which entries): ``random`` (SHiRA, arXiv 2406.13175; APET, arXiv 2306.02320), ``magnitude`` and ``gradient``
(SHiRA), ``lift`` (LIFT, arXiv 2506.00772), ``gps`` (GPS, arXiv 2312.10136), ``given`` (read from a file). Schedules:
``fixed``, ``rigl`` (SFT), ``lt`` (LT-SFT, arXiv 2110.07560) and ``lift`` (LIFT's refreshed entries); see
`vispeft.methods.sparse_schedules` and `vispeft.methods.sparse_start`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vispeft.adapters.schedules import as_callback
from vispeft.core.fields import DropPath, check_share, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.selection import below, selections
from vispeft.core.sites import Site, View
from vispeft.errors import ConfigError, FileError, SiteError
from vispeft.methods.gps import is_whole
from vispeft.methods.sparse_callbacks import Bound, Refreshing, Regrowing
from vispeft.methods.sparse_schedules import DropAndRegrow, Refresh
from vispeft.methods.sparse_start import by_changes, by_contrast, by_gradient
from vispeft.methods.sparse_unit import SparseUnit, Support, largest_entries, principal_weights

__all__ = ["Sparse", "SparseUnit", "largest_entries", "principal_weights"]

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TOY = Recipe(
    lr=1e-2,
    weight_decay=0.0,
    source="chosen by validation among 1e-3, 3e-3 and 1e-2 on a toy, for random entries and for lift "
    "(benchmarks/toy_deltas.py)",
)


@register
@dataclass(frozen=True, kw_only=True)
class Sparse(DropPath, Method):
    """A few entries of each weight train; the file holds their changes and their places.

    The budget is a number of entries (int), a share of each weight (float), ``"lora:R"`` (as many per layer as LoRA of
    rank R trains), ``"row:K"`` (K of each output row) or ``"bitfit"`` (as many as the weights' layers have biases).
    Random entries are the control that a choice must beat; on a toy of digits none was better beyond noise. The
    gradient of the whole weight is computed in each step, so it saves parameters and bytes of files, not activations.
    """

    budget: int | float | str = "lora:4"
    """Number of entries in all layers, share of the entries of each, ``"lora:R"``, ``"row:K"`` or ``"bitfit"``."""
    support: Support = "random"
    """The entries: drawn (``random``), largest in the frozen weight (``magnitude``), in its approximation of low rank
    (``lift``), in the gradient of the loss over the training images (``gradient``) or of a contrastive loss of two
    views of them (``gps``, in each row: give ``budget="row:K"``), or read from a file (``given``)."""
    source: str | None = None
    """For ``given``: a safetensors file with the entries of each layer, whole numbers in row-major order by the layer's
    path."""
    everywhere: bool = False
    """As GPS does: act in patch embedding and patch merging too, and train all biases outside of norms, the scales of
    LayerScale and Swin's position tables."""
    schedule: Literal["fixed", "rigl", "lt", "lift"] = "fixed"
    """Whether the entries stay (``fixed``), go and come while training (``rigl``, SFT's drop and regrow), are those of
    all layers together that change most while all are tuned, and start anew (``lt``, LT-SFT), or are chosen again from
    the present weights (``lift``; entries that go keep their changes, so that the file grows)."""
    interval: int = 20
    """For ``rigl`` and ``lift``: steps between two replacements (SFT's public code; LIFT's scripts: 10 to 2000)."""
    accumulate: int = 5
    """For ``rigl``: steps before a replacement whose gradients choose (public code)."""
    regrow: float = 0.2
    """For ``rigl``: share that is replaced, falling to zero over the training; the first time, all that can be."""
    policy: Literal["linear", "cosine"] = "linear"
    """For ``rigl``: how the share falls."""
    principal: int = 8
    """For ``lift``: rank of the approximation; 32 to 64 for language models, far below the budget's rank."""
    dense_lr: float = 1e-4
    """For ``lt``: learning rate of AdamW while all entries are tuned, as of full fine-tuning."""
    dense_passes: int = 1
    """For ``lt``: passes over the training images while all entries are tuned."""

    name: ClassVar[str] = "sparse"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.13175"
    recipes: ClassVar[tuple[Recipe, ...]] = (TOY,)
    default_roles: ClassVar[tuple[str, ...]] = LINEARS
    optional_roles: ClassVar[frozenset[str]] = frozenset({"patch_embed", "downsample.reduction"})
    training_fields: ClassVar[frozenset[str]] = frozenset(
        {"support", "source", "principal", "schedule", "interval", "accumulate", "regrow", "policy"}
        | {"dense_lr", "dense_passes"}
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "principal", "interval", "accumulate", "dense_passes")
        check_share(self, "regrow")
        if not 0 < self.dense_lr < math.inf:
            raise ConfigError(f"Sparse(dense_lr={self.dense_lr!r}): a learning rate is a finite number above zero.")
        if self.accumulate > self.interval and self.schedule != "lift":
            raise ConfigError(
                f"Sparse(accumulate={self.accumulate}, interval={self.interval}): gradients are summed between two "
                "replacements. Take at most the interval."
            )
        self._check_schedule()
        if self.source is not None and self.support != "given":
            raise ConfigError(
                f"Sparse(source={self.source!r}, support={self.support!r}): a file is read for support='given' alone."
            )

    def _check_schedule(self) -> None:
        """Refuse a support, a schedule and a budget that do not go together."""
        per_row = _parse_budget(self.budget)[0] == "row"
        supports = {"lt": ("random", "given"), "lift": ("lift", "given")}.get(self.schedule, (self.support,))
        reasons = {
            f"support='gps', budget={self.budget!r}): GPS chooses in each output row. Give budget='row:K', such as "
            "'row:1'.": self.support == "gps" and not per_row,
            f"schedule={self.schedule!r}, budget={self.budget!r}): the schedule moves entries from row to row. Give "
            "another budget, or schedule='fixed'.": self.schedule != "fixed" and per_row,
            f"schedule={self.schedule!r}, support={self.support!r}): the schedule chooses the entries itself. Give "
            f"support={supports[0]!r}.": self.support not in supports
            or (self.schedule in ("lt", "lift") and self.source is not None),
        }
        for says, holds in reasons.items():
            if holds:
                raise ConfigError(f"Sparse({says}")

    def paper_roles(self) -> tuple[str, ...]:
        """Return the four linear layers of a block, or with ``everywhere`` those of GPS."""
        return ("patch_embed", *LINEARS, "downsample.reduction") if self.everywhere else LINEARS

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one unit at each site, and with ``everywhere`` one at each module with biases."""
        sites, per_row = self._sites(view), _parse_budget(self.budget)[0] == "row"
        given = _read_entries(self.source, sites, self.counts(sites)) if self.source is not None else {}
        for site, count in zip(sites, self.counts(sites), strict=True):
            if self.support == "lift" and self.principal > min(site.out_features, site.columns):
                raise SiteError(
                    f"Sparse(principal={self.principal}): {site.key} has {min(site.out_features, site.columns)} "
                    "singular values. Take a lower rank."
                )
            build = partial(SparseUnit, site, count, self.support, self.principal, self.schedule, per_row)
            yield PlanItem(site, "sparse", partial(_with_entries, build, given[site.key]) if given else build)
        if self.everywhere:
            yield from selections(view, model, "whole", is_whole(view, below(self, view)))

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
        if kind == "row":
            narrow = min(sites, key=lambda site: site.columns)
            if amount > narrow.columns:
                raise ConfigError(
                    f"Sparse(budget={self.budget!r}): {int(amount):,} entries of a row were asked for, and the rows of "
                    f"{narrow.key} have {narrow.columns:,}. Take fewer."
                )
            return [int(amount) * site.out_features for site in sites]
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
        """Count the entries, ``4 (in + out)`` per site by default; with ``everywhere`` also biases and the like."""
        wanted = is_whole(view, below(self, view)) if self.everywhere else lambda path, name: False
        owned = ((path, name, size) for path, own in view.tensors.items() for name, size in own.items())
        return sum(self.counts(self._sites(view))) + sum(size for path, name, size in owned if wanted(path, name))

    def file_method(self) -> Sparse:
        """Return the same with entries from the file: how they were chosen is no part of it."""
        return type(self)(
            roles=self.roles,
            blocks=self.blocks,
            drop_path=self.drop_path,
            budget=self.budget,
            support="given",
            everywhere=self.everywhere,
            # With these, the file says how many entries there are.
            schedule=self.schedule if self.schedule in ("lt", "lift") else "fixed",
        )

    def without_start(self) -> Method:
        """Return the same with any entries."""
        return replace(self.file_method(), support="random")

    def callbacks(self) -> list[Any]:
        """Create the schedule."""
        schedule = Bound(self)
        if self.schedule == "rigl":
            schedule = Regrowing(self, DropAndRegrow(self.interval, self.accumulate, self.regrow, self.policy))
        elif self.schedule == "lift":
            schedule = Refreshing(self, Refresh(self.interval, self.principal))
        return [as_callback(schedule, f"sparse:{self.budget}:{self.roles}:{self.blocks}")]

    def start_from(self, bank: Any, name: str, loader: Iterable[Any]) -> None:
        """Choose the entries that the training images decide.

        Args:
            bank: The bank of the model.
            name: The adapter.
            loader: Training batches of images and class numbers, or of several 0/1 labels.
        """
        if self.schedule == "lt":
            by_changes(bank, name, loader, self.dense_lr, self.dense_passes)
        elif self.support == "gradient":
            by_gradient(bank, name, loader)
        elif self.support == "gps":
            by_contrast(bank, name, loader)


def _with_entries(build: Callable[[], SparseUnit], entries: Tensor) -> SparseUnit:
    """Make a unit with given entries."""
    unit = build()
    unit.given = True
    unit.positions = entries.to(device=unit.positions.device, dtype=torch.int32)
    return unit


def _parse_budget(budget: Any) -> tuple[str, float]:
    """Return the kind of a budget (``count``, ``share``, ``lora``, ``row``, ``bitfit``) and its number."""
    if budget == "bitfit":
        return "bitfit", 0.0
    kind, _, rank = budget.partition(":") if isinstance(budget, str) else ("", "", "")
    if kind in ("lora", "row") and rank.isdecimal() and len(rank) < 10 and int(rank) > 0:
        return kind, float(rank)
    if isinstance(budget, float) and 0 < budget < 1 and math.isfinite(budget):
        return "share", budget
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return "count", float(budget)
    raise ConfigError(
        f"Sparse(budget={budget!r}): give a whole number of entries, a share between 0 and 1, 'lora:R' with a rank R, "
        "'row:K' with a number of entries K, or 'bitfit'."
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
