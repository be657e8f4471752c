"""Polyhistor and Polyhistor-Lite: adapters generated for each task (Liu et al., NeurIPS 2022, arXiv 2210.03265).

HyperFormer (Karimi Mahabadi et al., ACL 2021, arXiv 2106.04489) is the same with full instead of low-rank generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import Tasks, check_roles_in, check_whole
from vispeft.core.generated import MakesTensors
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import MULTI_TASK, Recipe
from vispeft.core.sites import Site, View
from vispeft.core.units import ParallelUnit, SequentialUnit, SharedUnit, Unit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import linear
from vispeft.methods.adapter import ACTIVATIONS, LAYERNORM_EPS, Adapter, branch_ends
from vispeft.methods.compacter import phm_matrix

__all__ = [
    "HyperAdapter",
    "HyperNetwork",
    "LayerCode",
    "NetworkShape",
    "ParallelTaskTerm",
    "Polyhistor",
    "SequentialTaskTerm",
    "SiteShape",
    "TaskCode",
    "TaskCodes",
    "TaskTerm",
]

CODE_EPS = 1e-6
"""Of the LayerNorm in the embedding network (public code)."""
SPREAD = 0.01
"""Initial standard deviation of the weights of all networks; their biases start at zero (public code)."""
SINGLE = "all"
"""Name of the code of an adapter without tasks."""
Place = Literal["attn", "mlp"]


class Weights(NamedTuple):
    """The generated tensors of one adapter; those of templates have a leading axis, the rows of a layer's code."""

    down: Tensor
    """(middle, width)."""
    up: Tensor
    """(width, middle)."""
    down_bias: Tensor
    """(middle,)."""
    up_bias: Tensor
    """(width,)."""
    norm_weight: Tensor | None = None
    """(width,)."""
    norm_bias: Tensor | None = None
    """(width,)."""


class TaskCodes(SharedUnit):
    """Finds the code of a task; each `TaskCode` enters itself here."""

    def __init__(self) -> None:
        """Start without codes."""
        super().__init__()
        self.codes: dict[str, TaskCode] = {}  # a plain dictionary: each code is a unit with a place of its own

    def reset(self, generator: Generator) -> None:
        """Do nothing: it has no tensors."""

    def rename_task(self, old: str, new: str) -> None:
        """Find the code under the new name."""
        self.codes = {new if task == old else task: code for task, code in self.codes.items()}

    def code(self, task: str) -> Tensor:
        """Return the code of a task, (numbers,)."""
        return self.codes[task].code


class TaskCode(SharedUnit):
    """The learned code of one task (the task embedding), from which all its adapters are generated."""

    def __init__(self, task: str, width: int) -> None:
        """Allocate the code.

        Args:
            task: The task.
            width: Numbers per code.
        """
        super().__init__()
        self.task = task
        self.code = nn.Parameter(torch.empty(width))

    def borrow(self, lender: Unit) -> None:
        """Enter the code among those of all tasks."""
        super().borrow(lender)
        cast(TaskCodes, lender).codes[self.task] = self

    def reset(self, generator: Generator) -> None:
        """Draw the code from a standard normal."""
        self.code.normal_(generator=generator)


@dataclass(frozen=True)
class NetworkShape:
    """Configuration of a hypernetwork."""

    task_dim: int
    """Numbers per code."""
    hidden_dim: int
    """Hidden width of the embedding network."""
    embed_dim: int
    """Width of its output, from which the generators compute."""
    width: int
    """Channels of the generated adapter."""
    middle: int
    """Its hidden channels."""
    rank: int | None
    """Rank of the generated matrices; None to generate all entries."""
    layers: bool
    """Whether several blocks share it, told apart by codes of their own."""
    places: tuple[Place, ...] = ("mlp",)
    """The branches whose adapters it generates; several are told apart by codes."""
    post_norm: bool = True
    """Whether it generates the LayerNorm after the adapter."""

    @property
    def inputs(self) -> int:
        """Number of codes that the embedding network reads: task, block, branch."""
        return 1 + self.layers + (len(self.places) > 1)

    @property
    def numbers(self) -> int:
        """Numbers generated per matrix."""
        if self.rank is None:
            return self.width * self.middle
        return (self.width + self.middle) * self.rank

    def parameter_count(self) -> int:
        """Count ``n t h + h + h k + 3 k`` of the embedding network and ``k + 1`` per generated number."""
        t, h, k = self.task_dim, self.hidden_dim, self.embed_dim
        network = self.inputs * t * h + h + h * k + 3 * k
        vectors = self.middle + self.width + (2 * self.width if self.post_norm else 0)
        places = len(self.places) * t if len(self.places) > 1 else 0
        return network + places + (k + 1) * (2 * self.numbers + vectors)


class HyperNetwork(SharedUnit):
    """The embedding network and the generators: from codes to the tensors of an adapter."""

    def __init__(self, shape: NetworkShape) -> None:
        """Allocate the layers.

        Args:
            shape: The configuration.
        """
        super().__init__()
        self.shape, k = shape, shape.embed_dim
        self.hidden = nn.Linear(shape.inputs * shape.task_dim, shape.hidden_dim)
        self.embed = nn.Linear(shape.hidden_dim, k)
        self.norm = nn.LayerNorm(k, eps=CODE_EPS)
        sizes = {"down": shape.numbers, "up": shape.numbers, "down_bias": shape.middle, "up_bias": shape.width}
        if shape.post_norm:
            sizes |= {"norm_weight": shape.width, "norm_bias": shape.width}
        self.generators = tuple(sizes)
        for name, size in sizes.items():
            self.add_module(f"to_{name}", nn.Linear(k, size))
        several = len(shape.places) > 1
        self.place_codes = nn.Parameter(torch.empty(len(shape.places), shape.task_dim)) if several else None

    def reset(self, generator: Generator) -> None:
        """Draw weights from a narrow normal and codes from a standard one; biases are zero, the norm is the identity.

        The generated norm thus starts near zero, and the adapter near the identity.
        """
        for name, tensor in self.named_parameters():
            if name == "place_codes":
                tensor.normal_(generator=generator)
            elif name == "norm.weight":
                tensor.fill_(1.0)
            elif tensor.ndim == 1:
                tensor.zero_()
            else:
                tensor.normal_(0.0, SPREAD, generator=generator)

    def sources(self, task: str) -> tuple[Tensor, ...]:
        """List the tensors from which the adapters of a task are generated."""
        # The tensors are looked up one by one: walking through the modules would take most of a cached pass.
        layers = (tensor for layer in self._modules.values() if layer for tensor in layer._parameters.values())
        found = (cast(TaskCodes, self.lender).code(task), self.place_codes, *layers)
        return tuple(tensor for tensor in found if tensor is not None)

    def generate(self, task: str, place: Place, layer: Tensor | None = None) -> Weights:
        """Generate the tensors of an adapter.

        Args:
            task: The task.
            place: The branch.
            layer: The code of the block, (rows, task_dim), where several blocks share the network.

        Returns:
            Tensors with a leading axis of one entry per row.
        """
        shape, rows = self.shape, 1 if layer is None else layer.shape[0]
        codes = [cast(TaskCodes, self.lender).code(task).expand(rows, -1)]
        codes += [] if layer is None else [layer]
        if self.place_codes is not None:
            codes.append(self.place_codes[shape.places.index(place)].expand(rows, -1))
        embedded = self.norm(self.embed(F.relu(self.hidden(torch.cat(codes, dim=-1)))))
        made = {name: self.get_submodule(f"to_{name}")(embedded) for name in self.generators}
        made["down"] = self._matrix(made["down"], shape.middle, shape.width)
        made["up"] = self._matrix(made["up"], shape.width, shape.middle)
        return Weights(**made)

    def _matrix(self, numbers: Tensor, rows: int, columns: int) -> Tensor:
        """Multiply the generated factors (..., rows, rank) and (..., rank, columns)."""
        rank = self.shape.rank
        if rank is None:
            return numbers.unflatten(-1, (rows, columns))
        left, right = numbers.split([rows * rank, rank * columns], dim=-1)
        return left.unflatten(-1, (rows, rank)) @ right.unflatten(-1, (rank, columns))


class LayerCode(SharedUnit):
    """The learned code of one block (the layer embedding), of several rows in a block wider than the template."""

    def __init__(self, rows: int, width: int) -> None:
        """Allocate the code.

        Args:
            rows: Number of templates of the block.
            width: Numbers per row.
        """
        super().__init__()
        self.code = nn.Parameter(torch.empty(rows, width))

    def reset(self, generator: Generator) -> None:
        """Draw the code from a standard normal."""
        self.code.normal_(generator=generator)

    def sources(self, task: str) -> tuple[Tensor, ...]:
        """List the tensors from which the adapters of a task are generated."""
        return self.code, *cast(HyperNetwork, self.lender).sources(task)

    def generate(self, task: str, place: Place) -> Weights:
        """Generate the tensors of an adapter of this block; see `HyperNetwork.generate`."""
        return cast(HyperNetwork, self.lender).generate(task, place, self.code)


@dataclass(frozen=True)
class SiteShape:
    """Configuration of a generated adapter."""

    place: Place
    """The branch."""
    scale: int = 1
    """Width of the block relative to the template."""
    kernel_front: bool = True
    """Whether the kernel is the left factor of the Kronecker products."""
    activation: str = "swish"
    """One of `ACTIVATIONS`."""
    post_norm: bool = True
    """Whether a generated LayerNorm comes last."""

    def parameter_count(self) -> int:
        """Count ``s^3 + 2 s^2`` of the kernels in a wider block (``s^3 + s^2`` without norm), else nothing."""
        s = self.scale
        return 0 if s == 1 else s**3 + s**2 * (2 if self.post_norm else 1)


class HyperAdapter(MakesTensors, SharedUnit):
    """A bottleneck with generated tensors: ``LN(up(activation(down(x))))``, and kernels that enlarge templates."""

    def __init__(self, shape: SiteShape) -> None:
        """Allocate the kernels.

        Args:
            shape: The configuration.
        """
        super().__init__()
        self.shape, s = shape, shape.scale
        if s > 1:
            self.kernel = nn.Parameter(torch.empty(s, s, s))
            self.bias_kernel = nn.Parameter(torch.empty(s, s))
            self.norm_kernel = nn.Parameter(torch.empty(s, s)) if shape.post_norm else None

    def reset(self, generator: Generator) -> None:
        """Draw the kernels from a standard normal."""
        for kernel in self.parameters():
            kernel.normal_(generator=generator)

    def weights(self, task: str) -> Weights:
        """Generate the tensors for a task; evaluation mode caches them per state of their sources.

        Args:
            task: The task.
        """
        lender = cast("HyperNetwork | LayerCode", self.lender)
        kernels = (kernel for kernel in self._parameters.values() if kernel is not None)
        return self.once(task, (*kernels, *lender.sources(task)), partial(self._made, task))

    def _made(self, task: str) -> Weights:
        made = cast("HyperNetwork | LayerCode", self.lender).generate(task, self.shape.place)
        if self.shape.scale == 1:
            return Weights(*(None if tensor is None else tensor[0] for tensor in made))
        kernels = {"down": self.kernel, "up": self.kernel, "down_bias": self.bias_kernel, "up_bias": self.bias_kernel}
        kernels |= {name: self.norm_kernel for name in ("norm_weight", "norm_bias") if self.norm_kernel is not None}
        return Weights(**{name: self._enlarged(kernel, getattr(made, name)) for name, kernel in kernels.items()})

    def _enlarged(self, kernels: Tensor, templates: Tensor) -> Tensor:
        """Sum the Kronecker products of kernels (s, ...) and templates (s, ...); of vectors, kernels come first."""
        if templates.ndim == 2:
            return phm_matrix(kernels.unsqueeze(-1), templates.unsqueeze(-1)).squeeze(-1)
        return phm_matrix(kernels, templates) if self.shape.kernel_front else phm_matrix(templates, kernels)

    def change(self, x: Tensor, task: str) -> Tensor:
        """Compute the term that is added to the stream.

        Args:
            x: (..., width).
            task: The task.

        Returns:
            The same shape.
        """
        made = self.weights(task)
        hidden = ACTIVATIONS[self.shape.activation](linear(x, made.down, made.down_bias))
        out = linear(hidden, made.up, made.up_bias)
        if made.norm_weight is not None and made.norm_bias is not None:
            weight, bias = made.norm_weight.to(out.dtype), made.norm_bias.to(out.dtype)
            out = F.layer_norm(out, out.shape[-1:], weight, bias, LAYERNORM_EPS)
        return out


class TaskTerm(Unit):
    """The adapter of one task, whose tensors its `HyperAdapter` generates."""

    identity_at_start = False

    def __init__(self, task: str) -> None:
        """Note the task.

        Args:
            task: The task.
        """
        super().__init__()
        self.task = task

    def reset(self, generator: Generator) -> None:
        """Do nothing: it has no tensors."""

    def rename_task(self, old: str, new: str) -> None:
        """Take the new name."""
        self.task = new if self.task == old else self.task

    def change(self, x: Tensor) -> Tensor:
        """Compute the term that is added to the stream, in the shape of `x`, (..., width)."""
        return cast(HyperAdapter, self.lender).change(x, self.task)


class ParallelTaskTerm(TaskTerm, ParallelUnit):
    """The adapter of one task, parallel to a branch, which reads the residual stream."""

    reads = "stream"

    def __init__(self, task: str, place: Place) -> None:
        """Note the task and the branch.

        Args:
            task: The task.
            place: The branch.
        """
        super().__init__(task)
        self.place = place

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term, token by token, in the shape of `x`."""
        return self.change(x)


class SequentialTaskTerm(TaskTerm, SequentialUnit):
    """The adapter of one task, after the last layer of a branch."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the term to the layer's output, (..., width)."""
        return y + self.change(y)


@register
@dataclass(frozen=True, kw_only=True)
class Polyhistor(Tasks, Method):
    """Bottleneck adapters generated for each task by small networks from a learned code of the task.

    Each block has an embedding network and generators of its own, which generate two low-rank factors per matrix. With
    `lite`, one network for the whole model generates templates of the width of the first stage; in a stage s times as
    wide, s templates are enlarged and added by Kronecker products with learned kernels. All blocks of a ViT have the
    same width, so there the templates are the adapters (form of this project). HyperFormer generates all entries
    (``rank_divisor=None``).

    The adapter computes ``LN(up(activation(down(x))))`` with generated matrices, biases and norm, and its output is
    added to its input. Parallel, it reads the residual stream before the branch; sequential, it comes after the
    branch's last layer, before layer scale, stochastic depth and (SwinV2, form of this project) the norm after the
    branch. Without tasks there is a single code. The backbone runs once per task. Evaluation generates once and caches.
    """

    lite: bool = False
    """Whether one network generates templates for all blocks (Polyhistor-Lite)."""
    share: Literal["block", "stage"] = "block"
    """Without `lite`: one network per block, or per stage with a learned code per block (HyperFormer++)."""
    reduction: int | None = None
    """Width of a block divided by the hidden channels of its adapter; None for 16, or 2 with `lite`."""
    rank_divisor: int | None = 4
    """Hidden channels (or the width, if smaller) divided by the rank of the generated matrices, whose rank is at least
    1; None generates all entries. 4 reproduces the published sizes."""
    task_dim: int = 512
    """Numbers per code of a task, a block or a branch (public code)."""
    hidden_dim: int = 128
    """Hidden width of the embedding network (public code)."""
    embed_dim: int = 64
    """Width of the embedding network's output (public code)."""
    kernel_front: bool = True
    """With `lite`: whether the kernel is the left factor of the Kronecker products of matrices."""
    parallel: bool = True
    """Whether the adapter runs parallel to the branch instead of after it."""
    post_norm: bool = True
    """Whether a generated LayerNorm comes after the second layer."""
    activation: Literal["swish", "relu", "gelu"] = "swish"
    """Activation between the two layers."""

    name: ClassVar[str] = "polyhistor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.03265"
    recipes: ClassVar[tuple[Recipe, ...]] = (MULTI_TASK,)
    default_roles: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "reduction", "rank_divisor", "task_dim", "hidden_dim", "embed_dim")
        check_roles_in(self, ("attn", "mlp"))
        if self.lite and self.share != "block":
            raise ConfigError(
                f"Polyhistor(lite=True, share={self.share!r}): with lite one network serves the whole model. Leave "
                "share out."
            )

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put the codes at the first block, each network at its first block, and an adapter at each branch."""
        layout = _Layout(self, view)
        codes = PlanItem(layout.blocks[0], "polyhistor_tasks", TaskCodes)
        yield codes
        for name, task in self._codes():
            code = partial(TaskCode, name, self.task_dim)
            yield PlanItem(layout.blocks[0], "polyhistor_task", code, codes.key, task=task)
        networks: dict[int, str] = {}
        for block in layout.blocks:
            group = layout.group(block)
            if group not in networks:
                network = partial(HyperNetwork, layout.network(block))
                item = PlanItem(block, "polyhistor_network", network, codes.key)
                networks[group] = item.key
                yield item
            lender = networks[group]
            if layout.shared:
                layer = PlanItem(
                    block, "polyhistor_layer", partial(LayerCode, layout.scale(block), self.task_dim), lender
                )
                lender = layer.key
                yield layer
            yield from self._adapters(layout, block, lender)

    def _adapters(self, layout: _Layout, block: Site, lender: str) -> Iterator[PlanItem]:
        for branch in layout.branches(block):
            shape, suffix, site = layout.site(branch), "", block
            if not self.parallel:
                site = next(branch_ends(layout.view, [branch]))
            elif shape.place == "attn":
                suffix = "_attn"  # both branches of a block have their terms at the block
            shared = PlanItem(site, f"polyhistor{suffix}", partial(HyperAdapter, shape), lender)
            yield shared
            for name, task in self._codes():
                term: Callable[[], TaskTerm] = partial(SequentialTaskTerm, name)
                if self.parallel:
                    term = partial(ParallelTaskTerm, name, shape.place)
                yield PlanItem(site, f"polyhistor_term{suffix}", term, shared.key, task=task)

    def _codes(self) -> list[tuple[str, str | None]]:
        """List the codes by name, each with its task."""
        return [(task, task) for task in self.tasks] or [(SINGLE, None)]

    def for_tasks(self, tasks: Sequence[str] | None) -> Self:
        """Return the method for the tasks given to `attach`; without tasks there is one code."""
        return super().for_tasks(tasks) if tasks or self.tasks else self

    def parameter_count(self, view: View) -> int:
        """Count ``T t`` of the codes, the networks, and with shared ones the codes and kernels of the blocks."""
        layout = _Layout(self, view)
        total = len(self._codes()) * self.task_dim
        total += sum(layout.network(block).parameter_count() for block in layout.heads())
        for block in layout.blocks:
            total += layout.scale(block) * self.task_dim if layout.shared else 0
            total += sum(layout.site(branch).parameter_count() for branch in layout.branches(block))
        return total

    def plain(self) -> Adapter:
        """Return the method whose tensors are those generated for one task."""
        return Adapter(
            roles=self.roles,
            blocks=self.blocks,
            reduction=self._reduction,
            parallel=self.parallel,
            layernorm="out" if self.post_norm else "none",
            activation=self.activation,
            start="small",
        )

    @property
    def _reduction(self) -> int:
        return self.reduction or (2 if self.lite else 16)


class _Layout:
    """The sizes of networks and adapters on one model."""

    def __init__(self, method: Polyhistor, view: View) -> None:
        self.method, self.view = method, view
        self.sites = method.sites(view)
        self.blocks = list(dict.fromkeys(view.blocks_of(self.sites)))
        self.places = cast("tuple[Place, ...]", tuple(dict.fromkeys(site.role for site in self.sites)))
        self.shared = method.lite or method.share == "stage"

    def branches(self, block: Site) -> list[Site]:
        return [site for site in self.sites if site.block == block.block]

    def group(self, block: Site) -> int:
        """Number the blocks by the network that serves them."""
        if self.method.lite:
            return 0
        return cast(int, block.block) if self.method.share == "block" else block.stage or 0

    def heads(self) -> list[Site]:
        """List the first block of each network."""
        return list({self.group(block): block for block in reversed(self.blocks)}.values())

    def scale(self, block: Site) -> int:
        if not self.method.lite:
            return 1
        base = self.blocks[0].out_features
        if block.out_features % base:
            raise ConfigError(
                f"Polyhistor(lite=True) enlarges adapters of {base} channels, and {block.path} has "
                f"{block.out_features}, which is no multiple. Use lite=False."
            )
        return block.out_features // base

    def network(self, block: Site) -> NetworkShape:
        method, width = self.method, (self.blocks[0] if self.method.lite else block).out_features
        middle = max(width // method._reduction, 1)
        rank = None if method.rank_divisor is None else max(min(width, middle) // method.rank_divisor, 1)
        return NetworkShape(
            task_dim=method.task_dim,
            hidden_dim=method.hidden_dim,
            embed_dim=method.embed_dim,
            width=width,
            middle=middle,
            rank=rank,
            layers=self.shared,
            places=self.places,
            post_norm=method.post_norm,
        )

    def site(self, branch: Site) -> SiteShape:
        return SiteShape(
            place=cast(Place, branch.role),
            scale=self.scale(branch),
            kernel_front=self.method.kernel_front,
            activation=self.method.activation,
            post_norm=self.method.post_norm,
        )
