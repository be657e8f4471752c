"""MTLoRA and MTLoRA+: low-rank adaptation for several dense tasks (Agiza et al., CVPR 2024, arXiv 2403.20320).

Formulas, defaults and tensors follow the public code, scale-lab/MTLoRA at 333a375. Trainable scales of single tasks,
with which that code fails, work here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, FewBits, Tasks, check_factor, check_roles_in, check_share, check_whole
from vispeft.core.low_rank import Branch, Dropout
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.selection import selections
from vispeft.core.sites import Site, View
from vispeft.core.streams import Stream, TaskStream
from vispeft.core.units import BranchUnit, LayerPass
from vispeft.errors import ConfigError, SiteError
from vispeft.hosts.low_rank import low_rank_terms
from vispeft.methods.lora import Factored, Factors, LowRank

__all__ = ["MTLoRA", "SharedPair", "TaskPair", "TaskSum"]

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BRANCHING = {"attn.proj": 0, "mlp.fc1": 1, "mlp.fc1_g": 1, "mlp.fc1_x": 1, "mlp.fc2": 2}
"""Roles of the layers behind which tasks branch, in the order of the forward pass."""
MERGING = "downsample.reduction"
TABLE = "relative_position_bias_table"
PASCAL = Recipe(
    lr=3.125e-5,
    weight_decay=0.05,
    source="PASCAL-Context at 448: AdamW, batch 32, 300 epochs, 5e-4 x batch / 512, drop path 0.2 (scale-lab/MTLoRA "
    "333a375)",
    fields={"rank": 16, "task_rank": 4},
)
EPSILON = 1e-5
"""Epsilon of the norm in mode ``addition``: PyTorch's default, as in the public code."""


class _Scaled(Factored):
    """Factors whose multiplier may train."""

    def train_scale(self, trains: bool) -> None:
        """Choose whether the multiplier is a parameter, which starts at the constant."""
        if trains:
            self.first, self.scale = self.scale, 1.0
            self.multiplier = nn.Parameter(torch.empty(1))

    def reset(self, generator: Generator) -> None:
        """Initialise the factors, and the multiplier at the constant."""
        super().reset(generator)
        if "multiplier" in self._parameters:
            self.multiplier.fill_(self.first)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (rows, rank), the trained multiplier included."""
        b = self.matrix("B")
        return self.matrix("A"), b * self.multiplier if "multiplier" in self._parameters else b


class SharedPair(_Scaled, LowRank):
    """The low-rank term that all tasks share."""

    def __init__(self, site: Site, factors: Factors, dropout: float, trains_scale: bool, unread: bool) -> None:
        """Allocate the factors.

        Args:
            site: The linear layer.
            factors: Configuration of the factors.
            dropout: Dropout of the input.
            trains_scale: Whether the multiplier trains.
            unread: Whether no map of a task depends on the term.
        """
        super().__init__(site, factors, Dropout(dropout))
        self.train_scale(trains_scale)
        self.zero_gradient = frozenset({"A", "B", "multiplier"} if unread else ())


class TaskPair(_Scaled, BranchUnit):
    """The low-rank term of one task: ``W x + b + s_t B_t A_t x_t``, the frozen product taken of the shared input."""

    def __init__(
        self, site: Site, factors: Factors, dropout: float, trains_scale: bool, task: str, on_shared: bool
    ) -> None:
        """Allocate the factors.

        Args:
            site: The linear layer.
            factors: Configuration of the factors.
            dropout: Dropout of the shared input, where the task has no input of its own.
            trains_scale: Whether the multiplier trains.
            task: The task.
            on_shared: Add the term to the shared output (mode ``matrixv2``) instead of the frozen product.
        """
        super().__init__(site, factors)
        self.train_scale(trains_scale)
        self.task, self.share, self.on_shared = task, dropout, on_shared

    def streams(self) -> Sequence[Stream]:
        """Start the stream of the task."""
        return (TaskStream(self.task),)

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        """Compute the task's output."""
        x = layer.beside.get(self.task)
        if x is None:
            x = layer.dropped(self.share if self.training else 0.0)
        term = Branch(*self.factors(), self.scale, self.start, self.stop, Dropout())  # as compilers need it
        return {self.task: low_rank_terms(x, layer.shared if self.on_shared else layer.frozen, [term])}

    def rename_task(self, old: str, new: str) -> None:
        """Take another name for the task."""
        self.task = new if self.task == old else self.task


class TaskSum(BranchUnit):
    """Mode ``addition``: the shared output is ``W x + b + LN(sum of the tasks' outputs)``."""

    identity_at_start = False

    def __init__(self, width: int, tasks: Sequence[str], unread: bool) -> None:
        """Allocate the norm.

        Args:
            width: Width of the outputs.
            tasks: The tasks.
            unread: Whether no map of a task depends on the shared output.
        """
        super().__init__()
        self.tasks = tuple(tasks)
        self.zero_gradient = frozenset({"weight", "bias"} if unread else ())
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def reset(self, generator: Generator) -> None:
        """Start as PyTorch's norm."""
        self.weight.fill_(1)
        self.bias.zero_()

    def branches(self, layer: LayerPass) -> dict[str, Tensor]:
        """Start no stream."""
        return {}

    def join(self, layer: LayerPass, beside: Mapping[str, Tensor]) -> Tensor:
        """Add the normalised sum."""
        total = torch.stack([beside[task] for task in self.tasks]).sum(0)
        weight, bias = self.weight.to(total.dtype), self.bias.to(total.dtype)
        normed = F.layer_norm(total, total.shape[-1:], weight, bias, EPSILON)
        return layer.shared + normed.to(total.dtype)  # autocast normalises in float32

    def rename_task(self, old: str, new: str) -> None:
        """Take another name for one of the tasks."""
        self.tasks = tuple(new if task == old else task for task in self.tasks)


Whole = int | tuple[int, ...]
Number = float | tuple[float, ...]


@register
@dataclass(frozen=True, kw_only=True)
class MTLoRA(FewBits, DropPath, Tasks, Method):
    """One backbone for several dense tasks: low-rank terms that all tasks share, and terms of each task.

    Every block has shared terms. In the last block of each stage, output projection and both layers of the MLP have
    terms of each task too, so that the stage ends with a shared map, which the next stage reads, and a map per task,
    which decoders read (`vispeft.forward_tasks`). On a plain ViT the quarters of the blocks are the stages (form of
    this project). SwinV2 normalises each stream behind its branches, as it does the shared map.

    Numbers may be given for each stage by a list, and `task_rank` and `task_scale` also for each task by a mapping,
    whose values may be lists. Multipliers are used as they are, and not divided by the rank. `roles` and `blocks`
    choose the low-rank terms; the fields named ``train_...`` choose tensors of the base that train too.

    The shared term behind which no task reads, that of the last block's second MLP layer, gets no gradient from the
    tasks' maps (`Unit.zero_gradient`), except in mode ``matrixv2``.
    """

    rank: Whole = 16
    """Rank of the shared terms; 16, 32 and 64 in the paper."""
    task_rank: Whole | dict[str, Whole] = 4
    """Rank of the terms of each task."""
    scale: Number = 4.0
    """Multiplier of the shared terms."""
    task_scale: Number | dict[str, Number] = 4.0
    """Multiplier of the terms of each task."""
    trainable_scale_shared: bool = False
    """Whether the multipliers of the shared terms train."""
    trainable_scale_per_task: bool = False
    """Whether the multipliers of the tasks' terms train."""
    mode: Literal["matrix", "matrixv2", "addition"] = "matrix"
    """Output of a task behind a layer: frozen product and the task's term (``matrix``), the shared term too
    (``matrixv2``); ``addition`` has no shared term there, and adds the normalised sum of the tasks' outputs."""
    dropout: Number = 0.05
    """Share of the shared input's entries that low-rank terms do not see while training, as published."""
    plus: bool = False
    """MTLoRA+: a shared term at patch merging, with the stage's rank, in place of training its weight."""
    train_patch_embed: bool = True
    """Train the patch embedding."""
    train_norms: bool = True
    """Train the norms that maps pass through."""
    train_rel_pos: bool = True
    """Train the relative-position biases: Swin's tables, SwinV2's networks."""
    train_merging: bool = True
    """Train the weights of patch merging; without effect with `plus`."""
    merged_maps: bool = True
    """Hand out the maps of a Swin behind the patch merging that follows a stage, as published; those in front of it,
    which other methods hand out, are twice as high and wide."""

    name: ClassVar[str] = "mtlora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.20320"
    recipes: ClassVar[tuple[Recipe, ...]] = (PASCAL,)
    default_roles: ClassVar[tuple[str, ...]] = LINEARS
    one_pass: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = frozenset({"dropout", "drop_path"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        for field in ("rank", "task_rank", "scale", "task_scale", "dropout"):
            object.__setattr__(self, field, _frozen(getattr(self, field)))
        super().__post_init__()
        check_roles_in(self, (*LINEARS, *BRANCHING, *((MERGING,) if self.plus else ())))
        check_whole(self, "rank", "task_rank")
        check_factor(self, "scale", "task_scale")
        check_share(self, "dropout")
        for field in ("task_rank", "task_scale"):
            value = getattr(self, field)
            if isinstance(value, Mapping) and self.tasks and set(value) != set(self.tasks):
                raise ConfigError(
                    f"MTLoRA({field}={value!r}) was given for the tasks {', '.join(self.tasks)}. Give one entry for "
                    "each task, or one number for all."
                )

    def with_tasks(self, tasks: Sequence[str], before: Mapping[str, str]) -> MTLoRA:
        """Return the method after its tasks were changed; entries of mappings follow their tasks."""
        same = set(before) == set(tasks) and set(before.values()) == set(self.tasks)
        if self.mode == "addition" and not same:
            raise ConfigError(
                "In MTLoRA(mode='addition') the shared map depends on every task, so none can come or go without "
                "changing the others. Use mode 'matrix' or 'matrixv2'."
            )
        follows: dict[str, Any] = {}
        for field in ("task_rank", "task_scale"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                follows[field] = {task: value[before[task]] for task in tasks if task in before}
        return dataclasses.replace(self, tasks=tuple(tasks), **follows)

    def reads_merged(self) -> bool:
        """Return whether tasks read the maps behind patch merging."""
        return self.merged_maps

    def acts_for(self, owner: str | None, task: str | None) -> bool:
        """Return whether a unit acts: all without a task, and in mode ``addition``, where tasks need each other."""
        return task is None or owner in (None, task) or self.mode == "addition"

    def paper_roles(self) -> tuple[str, ...]:
        """Return the roles to act on by default."""
        return (*LINEARS, MERGING) if self.plus else LINEARS

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put terms at each layer, and train the chosen tensors of the base."""
        self._check_stages(view)
        sites = self.sites(view)
        branching = [site for site in sites if _branches(view, site)]
        if not branching:
            raise SiteError(
                f"MTLoRA's tasks branch at {', '.join(BRANCHING)} of the blocks {list(view.map_ends)}, and the chosen "
                "roles and blocks have none of them."
            )
        last = [BRANCHING[site.role] for site in branching if site.block == view.depth - 1]
        for site in sites:
            unread = bool(last) and site.block == view.depth - 1 and BRANCHING.get(site.role) == max(last)
            if site not in branching or self.mode != "addition":
                yield self._shared(view, site, unread and self.mode == "matrix")
            if site in branching:
                yield from self._tasks(view, site, unread)
        chosen = self._chosen(view)
        yield from selections(view, model, "base", lambda path, name: (path, name) in chosen)

    def _shared(self, view: View, site: Site, unread: bool) -> PlanItem:
        """Plan the shared term of a layer."""
        stage = _stage(view, site)
        factors, dropout = self._factors(_at(self.rank, stage), _at(self.scale, stage)), _at(self.dropout, stage)
        return PlanItem(site, "lora", partial(SharedPair, site, factors, dropout, self.trainable_scale_shared, unread))

    def _tasks(self, view: View, site: Site, unread: bool) -> Iterator[PlanItem]:
        """Plan the terms of all tasks at a layer."""
        stage = _stage(view, site)
        for task in self.tasks:
            rank, scale = (_at(_of(value, task), stage) for value in (self.task_rank, self.task_scale))
            unit = partial(TaskPair, site, self._factors(rank, scale), _at(self.dropout, stage))
            build = partial(unit, self.trainable_scale_per_task, task, self.mode == "matrixv2")
            yield PlanItem(site, "task", build, task=task)
        if self.mode == "addition":
            yield PlanItem(site, "sum", partial(TaskSum, site.out_features, self.tasks, unread))

    def _factors(self, rank: int, scale: float) -> Factors:
        return Factors(rank=rank, scale=scale, bits=self.bits, freeze_a=False, lr_ratio=1.0)

    def _check_stages(self, view: View) -> None:
        """Refuse lists that have not one number for each stage."""
        count, what = len(view.map_ends), "stages" if view.has_stages else "quarters of blocks"
        for field in ("rank", "task_rank", "scale", "task_scale", "dropout"):
            value = getattr(self, field)
            for own in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(own, tuple) and len(own) != count:
                    raise ConfigError(
                        f"MTLoRA({field}={value!r}): {len(own)} numbers were given, and this model has {count} {what}. "
                        "Give one number for each, or one for all."
                    )

    def _chosen(self, view: View) -> set[tuple[str, str]]:
        """List the tensors of the base that train, by module and name."""
        modules: set[str] = set()
        if self.train_patch_embed:
            modules |= {site.path for site in view.at("patch_embed", "patch_embed.norm")}
        if self.train_merging and not self.plus:
            modules |= {site.path for site in view.at(MERGING)}
        if self.train_norms:
            # A stage's maps are handed out without the last norm, those of a plain model behind it.
            behind = ("fc_norm", "patch_embed.norm", *(("final_norm",) if view.has_stages else ()))
            modules |= {site.path for site in view.sites if site.kind == "norm" and site.role not in behind}
        chosen = {(path, name) for path in modules for name in view.tensors.get(path, ())}
        tables = list(view.at("rel_pos")) if self.train_rel_pos else []
        for path, names in view.tensors.items():
            inside = any(not site.inside and path.startswith(f"{site.path}.") for site in tables)
            holds = any(site.inside and path == site.path for site in tables)
            chosen |= {(path, name) for name in names if inside or (holds and name == TABLE)}
        return chosen

    def parameter_count(self, view: View) -> int:
        """Count ``r (in + out)`` per term and 1 per trained multiplier, and the trained tensors of the base."""
        count = sum(view.tensors[path][name] for path, name in self._chosen(view))
        for site in self.sites(view):
            stage, wide, tasks = _stage(view, site), site.in_features + site.out_features, _branches(view, site)
            if not tasks or self.mode != "addition":
                count += _at(self.rank, stage) * wide + self.trainable_scale_shared
            else:
                count += 2 * site.out_features
            for task in self.tasks if tasks else ():
                count += _at(_of(self.task_rank, task), stage) * wide + self.trainable_scale_per_task
        return count


def _branches(view: View, site: Site) -> bool:
    """Return whether tasks branch at a layer."""
    return site.role in BRANCHING and site.block in view.map_ends


def _stage(view: View, site: Site) -> int:
    """Return the stage of a layer, or its quarter; patch merging belongs to the stage that it ends."""
    if site.block is None:
        return cast(int, site.stage) - 1
    return sum(end < site.block for end in view.map_ends)


def _frozen(value: Any) -> Any:
    """Replace lists by tuples."""
    if isinstance(value, Mapping):
        return {key: _frozen(own) for key, own in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _of(value: Any, task: str) -> Any:
    """Return the value for a task."""
    return value[task] if isinstance(value, Mapping) else value


def _at(value: Any, stage: int) -> Any:
    """Return the value for a stage."""
    return value[stage] if isinstance(value, tuple) else value
