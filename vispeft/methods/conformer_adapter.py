"""Conformer adapters of the audio study: convolutions over the tokens (Cappellazzo et al., arXiv 2312.03694)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vispeft.core.fields import DropPath, check_roles_in, check_whole
from vispeft.core.method import Method, PlanItem, register
from vispeft.core.recipes import Recipe
from vispeft.core.selection import selections
from vispeft.core.sites import View
from vispeft.core.tracing import in_graph
from vispeft.core.units import ParallelUnit
from vispeft.errors import ConfigError
from vispeft.hosts.functional import linear

__all__ = ["ConformerAdapter", "ConformerUnit"]

EPS, MOMENTUM = 1e-5, 0.1
"""Of the batch norm; PyTorch's defaults (public code: umbertocappellazzo/PETL_AST at 1fe23af)."""


class ConformerUnit(ParallelUnit):
    """``C(x) = up(silu(norm(depthwise(glu(down(x))))))`` over the row of all tokens, prefix included.

    The batch norm uses statistics of the batch while it trains, and its running ones, which are in the adapter's file,
    in evaluation.
    """

    zero_gradient = frozenset({"depthwise_bias"})
    running = ("mean", "variance")
    needs_order, identity_at_start = True, False
    mean: Tensor
    variance: Tensor

    def __init__(self, method: ConformerAdapter, width: int, place: Literal["attn", "mlp"]) -> None:
        """Allocate the tensors.

        Args:
            method: The configuration.
            width: Channels of the stream.
            place: The branch it belongs to.
        """
        super().__init__()
        sequential = method.mode == "sequential"
        self.place, self.reads, self.kernel = place, "output" if sequential else "normed", method.kernel
        self.passed = int(method.residual) - int(sequential)  # the branch's output is in the sum already
        middle = method.middle(width)
        shapes = {"down": (2 * middle, width), "depthwise": (middle, 1, method.kernel), "up": (width, middle)}
        shapes |= {f"{name}_bias": (shape[0],) for name, shape in shapes.items()}
        for name, shape in {**shapes, "norm_weight": (middle,), "norm_bias": (middle,)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_buffer("mean", torch.zeros(middle))
        self.register_buffer("variance", torch.ones(middle))

    def reset(self, generator: Generator) -> None:
        """Draw layers as PyTorch does; the norm starts at one and zero."""
        for name in ("down", "depthwise", "up"):
            bound = self.get_parameter(name)[0].numel() ** -0.5
            for tensor in (self.get_parameter(name), self.get_parameter(f"{name}_bias")):
                tensor.uniform_(-bound, bound, generator=generator)
        for tensor, start in ((self.norm_weight, 1), (self.norm_bias, 0), (self.mean, 0), (self.variance, 1)):
            tensor.fill_(start)

    def branch(self, x: Tensor, grid: tuple[int, int] | None, prefix: int) -> Tensor:
        """Compute the term from tokens (B, N, D), or from a map (B, H, W, D), whose pixels are read row by row."""
        row = x.flatten(1, -2)
        hidden = F.glu(linear(row, self.down, self.down_bias), dim=-1).transpose(1, 2)
        hidden = F.conv1d(
            F.pad(hidden, ((self.kernel - 1) // 2, self.kernel // 2)),  # an even kernel has one more zero on the right
            self.depthwise.to(hidden.dtype),
            self.depthwise_bias.to(hidden.dtype),
            groups=hidden.shape[1],
        )
        hidden = F.silu(self._normed(hidden.to(self.norm_weight.dtype))).to(row.dtype).transpose(1, 2)
        out = linear(hidden, self.up, self.up_bias).reshape(x.shape)
        return out + self.passed * x if self.passed else out

    def _normed(self, hidden: Tensor) -> Tensor:
        """Normalise (B, channels, N)."""
        affine = self.norm_weight, self.norm_bias
        if not self.training:
            return F.batch_norm(hidden, self.mean, self.variance, *affine, eps=EPS)
        # A checkpoint's second forward pass runs inside the backward pass, and the statistics saw the batch before. A
        # graph cannot ask; its caller restores what is named in `running`.
        again = not in_graph() and torch._C._current_graph_task_id() != -1
        mean, variance = (self.mean.clone(), self.variance.clone()) if again else (self.mean, self.variance)
        return F.batch_norm(hidden, mean, variance, *affine, training=True, momentum=MOMENTUM, eps=EPS)


@register
@dataclass(frozen=True, kw_only=True)
class ConformerAdapter(DropPath, Method):
    """Depthwise convolutions over the tokens, beside the MLP or behind it, made for audio spectrograms.

    With ``mode="parallel"`` a block computes ``y + mlp(h) + C(h)``, with h the normalised input; with ``"sequential"``
    ``y + m + C(m)``, with m the output of the MLP. The public code computes a LayerNorm in front of the adapter and
    throws its result away; its two vectors are left out here. Norms of the blocks that precede an adapted branch, and
    the last one, train as well. It does not start at the identity, as the public code does not. With gradients
    summed over devices each device normalises by its own part of the batch.
    """

    variant: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """At the MLP alone, or at attention and MLP."""
    mode: Literal["parallel", "sequential"] = "parallel"
    """Beside the branch, from its normalised input; or behind it, from its output."""
    residual: bool | None = None
    """Whether the adapter's input is added to its output; None for what the mode needs: false for ``parallel``, true
    for ``sequential``."""
    reduction: int = 96
    """Width of a block divided by the hidden channels, of which there is at least one."""
    kernel: int = 31
    """Length of the kernel."""
    train_norms: bool = True
    """Whether the norms in front of the adapted branches, and the last one, train as well."""

    name: ClassVar[str] = "conformer_adapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.03694"
    recipes: ClassVar[tuple[Recipe, ...]] = (
        Recipe(
            lr=5e-3,
            weight_decay=0.1,
            source="AST on audio sets: AdamW, betas 0.9 and 0.98, cosine by step (umbertocappellazzo/PETL_AST 1fe23af)",
        ),
    )
    default_roles: ClassVar[tuple[str, ...]] = ("attn", "mlp")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_whole(self, "reduction", "kernel")
        check_roles_in(self, ("attn", "mlp"))
        sequential = self.mode == "sequential"
        if sequential and self.residual is False:
            raise ConfigError(
                "ConformerAdapter(mode='sequential', residual=False) would lose the output of the branch. Leave "
                "residual out."
            )
        object.__setattr__(self, "residual", sequential if self.residual is None else self.residual)

    def paper_roles(self) -> tuple[str, ...]:
        """Return the variant's roles."""
        return self.default_roles if self.variant == "houlsby" else self.default_roles[1:]

    def middle(self, width: int) -> int:
        """Return the hidden channels of a block: its width divided by `reduction`, rounded, at least one."""
        return max(1, round(width / self.reduction))

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        """Put one adapter at each branch, and train the norms."""
        if self.mode == "parallel":
            view.needs_norm_first(type(self).__name__)
        sites = self.sites(view)
        for branch, block in zip(sites, view.blocks_of(sites), strict=True):
            yield PlanItem(
                block, f"conformer_{branch.role}", partial(ConformerUnit, self, block.out_features, branch.role)
            )
        norms = self._norms(view)
        yield from selections(view, model, "norm", lambda path, name: path in norms)

    def _norms(self, view: View) -> set[str]:
        """List the paths of the norms that train."""
        if not self.train_norms:
            return set()
        front = {"attn": "norm1", "mlp": "norm2"}
        wanted = {(front[branch.role], branch.block) for branch in self.sites(view)} | {("final_norm", None)}
        return {site.path for site in view.sites if (site.role, site.block) in wanted}

    def parameter_count(self, view: View) -> int:
        """Count ``3 d m + m (k + 5) + d`` per adapter, and the tensors of the norms that train."""
        norms, total = self._norms(view), 0
        for width in (site.out_features for site in self.sites(view)):
            m = self.middle(width)
            total += 3 * width * m + m * (self.kernel + 5) + width
        return total + sum(sum(own.values()) for path, own in view.tensors.items() if path in norms)
