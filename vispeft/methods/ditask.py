"""DiTASK: singular values moved by a monotone map, shared and per task (Mantri et al., CVPR 2025, arXiv 2502.06029).

The layout is MTLoRA's. Formulas follow what the public layer computes (ipsitmantri/DiTASK at 7541c55, difw 0.0.29): the
index axis of the sorted singular values is warped, and the values are read between their neighbours. The paper speaks
of a map of the values. The dropout of a layer's whole input, 0.05 in the public configurations, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.families import frozen_tensor
from vispeft.core.fields import DropPath, Tasks, check_roles_in
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.sites import Site, View
from vispeft.core.streams import Stream, TaskStream
from vispeft.core.units import BranchUnit, LayerPass, WeightUnit
from vispeft.errors import ConfigError
from vispeft.methods.mtlora import BRANCHING, LINEARS, MTLoRA
from vispeft.methods.svfit import decompose

__all__ = ["DiTASK", "WarpTask", "WarpUnit", "warp"]

NEVER = 1e9
"""Time to an edge that is never reached; flows take the time 1."""
SMALL = 1e-3
"""Arguments below which functions with a removable singularity are computed as series of five terms."""
PASCAL = Recipe(
    lr=3.125e-5,
    weight_decay=0.05,
    source="PASCAL-Context at 448, batch 64, 300 epochs, drop path 0.2, 64 cells shared and 4 per task; the learning "
    "rate is MTLoRA's (ipsitmantri/DiTASK 7541c55, configs)",
)


def velocities(theta: Tensor) -> Tensor:
    """Compute the velocity at the edges of the cells: ``V_j = (j / N) sum over k >= j of theta_k / k``, 0 at the ends.

    Args:
        theta: (N - 1,), of N cells.

    Returns:
        (N + 1,).
    """
    cells = len(theta) + 1
    steps = torch.arange(1, cells, dtype=theta.dtype, device=theta.device)
    inside = steps / cells * (theta / steps).flip(0).cumsum(0).flip(0)
    return F.pad(inside, (1, 1))


def warp(theta: Tensor, grid: Tensor) -> Tensor:
    """Move points of [0, 1] for the time 1 along a velocity that is linear on equal cells (CPAB, Freifeld et al.).

    Args:
        theta: (N - 1,), of N cells, in double precision: its gradients are badly conditioned.
        grid: (n,) points.

    Returns:
        (n,), in the same order.
    """
    edges = velocities(theta)
    right = _forward(edges, grid)
    left = 1 - _forward(-edges.flip(0), 1 - grid)
    return torch.where(_velocity(edges, grid)[0] < 0, left, right)


def _velocity(edges: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the velocity at points, its slope there, and their cells."""
    cells = len(edges) - 1
    cell = (x.detach() * cells).floor().long().clamp(0, cells - 1)
    slope = cells * (edges[cell + 1] - edges[cell])
    return edges[cell] + slope * (x - cell.to(x.dtype) / cells), slope, cell


def _forward(edges: Tensor, x: Tensor) -> Tensor:
    """Move the points whose velocity is not negative; others get some value."""
    cells = len(edges) - 1
    velocity, _, cell = _velocity(edges, x)
    # From each point to the right edge of its cell, then through whole cells.
    first = _time(velocity, edges[cell + 1], (cell + 1).to(x.dtype) / cells - x)
    through = _time(edges[:-1], edges[1:], x.new_full((cells,), 1 / cells))
    later = torch.arange(cells, device=x.device) > cell[:, None]
    arrival = first[:, None] + (through * later).cumsum(1)
    crossed = later & (arrival < 1)
    moved = first < 1
    spent = torch.where(moved, first, 0) + (through * crossed).sum(1)
    target = cell + moved + crossed.sum(1)
    start = torch.where(moved, target.to(x.dtype) / cells, x)
    speed = torch.where(moved, edges[target.clamp(max=cells - 1)], velocity)
    slope = cells * (edges[1:] - edges[:-1])[target.clamp(max=cells - 1)]
    rest = 1 - spent
    return start + speed * rest * _series(slope * rest, torch.expm1, (1, 1 / 2, 1 / 6, 1 / 24, 1 / 120))


def _time(velocity: Tensor, ahead: Tensor, way: Tensor) -> Tensor:
    """Return the time from a point to an edge ahead, with the velocities at both, if both are positive."""
    moves = (velocity > 0) & (ahead > 0)
    safe = torch.where(moves, velocity, 1)
    ratio = torch.where(moves, (ahead - velocity) / safe, 0)
    return torch.where(moves, way / safe * _series(ratio, torch.log1p, (1, -1 / 2, 1 / 3, -1 / 4, 1 / 5)), NEVER)


def _series(z: Tensor, function: Any, terms: Sequence[float]) -> Tensor:
    """Compute ``function(z) / z``, near zero by its series."""
    near = z.abs() < SMALL
    small, large = torch.where(near, z, 0), torch.where(near, 1, z)
    total = torch.zeros_like(z)
    for term in reversed(terms):
        total = total * small + term
    return torch.where(near, total, function(large) / large)


class WarpUnit(WeightUnit):
    """A weight with moved singular values: ``W + U diag(s' - s) V``.

    A joint projection of three or two square parts has as many decompositions and one map, as the public code has.
    """

    U: Tensor
    """Left singular vectors, (parts, out / parts, n)."""
    s: Tensor
    """Singular values, (parts, n), in double precision."""
    V: Tensor
    """Right singular vectors, (parts, n, in)."""

    def __init__(self, site: Site, cells: int, start: str, unread: bool = False) -> None:
        """Allocate the map, (cells - 1,).

        Args:
            site: The linear layer.
            cells: Cells of the map.
            start: ``identity`` or ``uniform``.
            unread: Whether no map of a task depends on the layer's output.
        """
        super().__init__()
        self.place, self.begin, self.identity_at_start = site.key, start, start == "identity"
        self.zero_gradient = frozenset({"theta"} if unread else ())
        ratio, more = divmod(site.out_features, site.in_features)
        self.parts = ratio if not more and ratio in (2, 3) else 1
        rows, columns = site.out_features // self.parts, site.in_features
        count = min(rows, columns)
        self.theta = nn.Parameter(torch.empty(cells - 1))
        for name, shape in (("U", (rows, count)), ("s", (count,)), ("V", (count, columns))):
            self.register_buffer(name, torch.empty(self.parts, *shape), persistent=False)

    def prepare(self, weight: Tensor) -> None:
        """Decompose the parts of the frozen weight."""
        found = [decompose(part, self.place) for part in weight.chunk(self.parts)]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.U, self.s, self.V = (torch.stack(tensors).to(dtype) for tensors in zip(*found, strict=True))

    def reset(self, generator: Generator) -> None:
        """Start at the identity, or as the public code, uniform within ``1 / sqrt(cells - 1)``."""
        _start(self.theta, self.begin, generator)

    def moved(self, theta: Tensor) -> Tensor:
        """Compute the new singular values, (parts, n), in double precision."""
        values, count = self.s.double(), self.s.shape[1]
        if count == 1:
            return values
        grid = torch.arange(count, dtype=values.dtype, device=values.device) / (count - 1)
        index = (count - 1) * warp(theta.double(), grid)
        below = index.detach().floor().long().clamp(0, count - 2)
        return torch.lerp(values[:, below], values[:, below + 1], (index - below).expand_as(values))

    def fold_weight(self, weight: Tensor) -> Tensor:
        """Move the singular values of (out, in)."""
        dtype = torch.promote_types(weight.dtype, self.theta.dtype)
        shift = (self.moved(self.theta) - self.s.double()).to(dtype)
        change = (self.U.to(dtype) * shift[:, None]) @ self.V.to(dtype)
        return weight.to(dtype) + change.flatten(0, 1)


class WarpTask(BranchUnit):
    """The output of one task: the product of its input with the frozen weight under a map of the task's own."""

    bias: Tensor | None

    def __init__(self, cells: int, start: str, task: str, bias: Tensor | None) -> None:
        """Allocate the map, (cells - 1,).

        Args:
            cells: Cells of the map.
            start: ``identity`` or ``uniform``.
            task: The task.
            bias: The layer's frozen bias, (out,).
        """
        super().__init__()
        self.task, self.begin, self.identity_at_start = task, start, start == "identity"
        self.theta = nn.Parameter(torch.empty(cells - 1))
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def reset(self, generator: Generator) -> None:
        """Start as `WarpUnit` does."""
        _start(self.theta, self.begin, generator)

    def streams(self) -> Sequence[Stream]:
        """Start the stream of the task."""
        return (TaskStream(self.task),)

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        """Compute the task's output."""
        x, shared = layer.beside.get(self.task, layer.x), cast(WarpUnit, self.lender)
        dtype = layer.frozen.dtype
        values = shared.moved(self.theta).to(dtype)
        outputs = [
            F.linear(F.linear(x.to(dtype), v.to(dtype)) * value, u.to(dtype))
            for u, value, v in zip(shared.U, values, shared.V, strict=True)
        ]
        out = torch.cat(outputs, -1)
        return {self.task: out if self.bias is None else out + self.bias.to(out.dtype)}

    def rename_task(self, old: str, new: str) -> None:
        """Take another name for the task."""
        self.task = new if self.task == old else self.task


def _start(theta: Tensor, start: str, generator: Generator) -> None:
    if start == "identity":
        theta.zero_()
    else:
        bound = len(theta) ** -0.5
        theta.uniform_(-bound, bound, generator=generator)


@register
@dataclass(frozen=True, kw_only=True)
class DiTASK(DropPath, Tasks, Method):
    """One backbone for several dense tasks: monotone maps of singular values, on MTLoRA's layout.

    A map bends the axis of the sorted singular values, and each takes the value at the place it is moved to: the
    largest and the smallest stay, and so does the order. A task's output has the frozen weight under the task's own
    map, and not the shared one. Singular vectors are computed on attach and on load and are in no file. As in MTLoRA,
    tensors of the base train too.
    """

    cells: int = 64
    """Cells of the shared maps (public configurations)."""
    task_cells: int = 4
    """Cells of the maps of each task."""
    start: Literal["identity", "uniform"] = "identity"
    """The model's own function, or uniform numbers, as released, which change the weights by about 1 %."""
    train_patch_embed: bool = True
    """Train the patch embedding."""
    train_norms: bool = True
    """Train the norms that maps pass through."""
    train_rel_pos: bool = True
    """Train the relative-position biases."""
    train_merging: bool = True
    """Train the weights of patch merging."""
    merged_maps: bool = True
    """Hand out the maps of a Swin behind the patch merging that follows a stage; see MTLoRA."""

    name: ClassVar[str] = "ditask"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.06029"
    recipes: ClassVar[tuple[Recipe, ...]] = (PASCAL,)
    default_roles: ClassVar[tuple[str, ...]] = LINEARS
    one_pass: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = frozenset({"start", "drop_path"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_roles_in(self, LINEARS)
        for field in ("cells", "task_cells"):
            if not isinstance(value := getattr(self, field), int) or value < 2:
                raise ConfigError(f"DiTASK({field}={value!r}): a map needs a whole number of at least 2 cells.")

    def reads_merged(self) -> bool:
        """Return whether tasks read the maps behind patch merging."""
        return self.merged_maps

    def acts_for(self, owner: str | None, task: str | None) -> bool:
        """Return whether a unit acts: all without a task."""
        return task is None or owner in (None, task)

    def _layout(self) -> MTLoRA:
        """Return MTLoRA of the same layout."""
        return MTLoRA(
            roles=self.roles,
            blocks=self.blocks,
            tasks=self.tasks,
            rank=1,
            task_rank=1,
            train_patch_embed=self.train_patch_embed,
            train_norms=self.train_norms,
            train_rel_pos=self.train_rel_pos,
            train_merging=self.train_merging,
        )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put maps where MTLoRA has terms, and train the same tensors of the base."""
        shared = ""
        for item in self._layout().items(view, model):
            if item.unit == "lora":
                # In the last block tasks go on with their own streams, and no later block reads the shared one.
                unread = item.site.block == view.depth - 1 and item.site.role in BRANCHING
                warped = PlanItem(item.site, "warp", partial(WarpUnit, item.site, self.cells, self.start, unread))
                shared = warped.key
                yield warped
            elif item.unit == "task":
                bias = frozen_tensor(model.get_submodule(item.site.path), "bias")
                build = partial(WarpTask, self.task_cells, self.start, cast(str, item.task), bias)
                yield PlanItem(item.site, "task", cast(Any, build), task=item.task, lender=shared)
            else:
                yield item

    def parameter_count(self, view: View) -> int:
        """Count ``cells - 1`` per layer, ``task_cells - 1`` per task and branching layer, and the base's tensors."""
        sites = self.sites(view)
        branching = sum(site.role in BRANCHING and site.block in view.map_ends for site in sites)
        base = sum(view.tensors[path][name] for path, name in self._layout()._chosen(view))
        return len(sites) * (self.cells - 1) + branching * len(self.tasks) * (self.task_cells - 1) + base
